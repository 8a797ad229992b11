"""Prompts go through the DETR a few at a time, loss and gradients included.

Every prompt of an image has activations of its own in DETR and segmentation head: held all at once, as the
official forward does, memory grows with the number of prompts. Here

- the collator puts the prompts of a batch into stages of a few (`query_processing_order`, upstream's own notion);
- `PassModel`, in training, runs the backbones and returns the rest as `Passes`;
- `PassLoss` runs a pass, takes the official loss and differentiates it at once down to the backbones' features, then
  the next. Loss and gradients are those of all prompts at once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sam3.model.geometry_encoders import Prompt
from sam3.model.sam3_image import Sam3Image
from sam3.train.loss.loss_fns import CORE_LOSS_KEY
from sam3.train.loss.sam3_loss import Sam3LossWrapper


class Passes:
    """Outputs of the backbones, and the passes of prompts that are still to run on them.

    Args:
        model: the model.
        features: what its backbones put out.
        inputs: the batch (BatchedDatapoint), a stage per pass.
    """

    def __init__(self, model: "PassModel", features: dict, inputs):
        self.model, self.inputs = model, inputs
        self.outputs: list[Tensor] = []   # of the backbones, in their graph
        self.leaves: list[Tensor] = []    # the same values, cut off from it
        self.features = tree_map_only(Tensor, self._cut, features)

    def _cut(self, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        for output, leaf in zip(self.outputs, self.leaves):
            if output is tensor:
                return leaf
        self.outputs.append(tensor)
        self.leaves.append(tensor.detach().requires_grad_())
        return self.leaves[-1]

    def parameters(self) -> list[nn.Parameter]:
        """What is trained behind the backbones."""
        return [p for n, p in self.model.named_parameters() if p.requires_grad and not n.startswith("backbone.")]

    def __iter__(self) -> Iterator[dict]:
        """The official outputs of a pass after the other."""
        for find, target in zip(self.inputs.find_inputs, self.inputs.find_targets):
            boxes = Prompt(find.input_boxes, find.input_boxes_mask, box_labels=find.input_boxes_label)
            yield self.model.forward_grounding(dict(self.features), find, target, boxes)


class PassModel(Sam3Image):
    """The official model whose training forward leaves the DETR to the loss."""

    def forward(self, inputs):
        if not self.training:
            return super().forward(inputs)
        features = {
            "img_batch_all_stages": inputs.img_batch,
            **self.backbone.forward_image(inputs.img_batch),
            **self.backbone.forward_text(inputs.find_text_batch, device=self.device),
        }
        return Passes(self, features, inputs)


class PassLoss(Sam3LossWrapper):
    """The official loss of `Passes`: its value and gradients, one pass of prompts in memory at a time."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gradient_scale = 1.0  # that of the step before: float16 gradients need the GradScaler's inside a pass
        self._boxes = None

    def _get_num_boxes(self, targets):
        return self._boxes

    def forward(self, passes: Passes, find_targets: list[dict]) -> dict[str, Tensor]:
        """Losses as the official wrapper names them, of all prompts; F1 and accuracy are means over passes.

        Args:
            passes: of the model.
            find_targets: of each pass, in upstream's form.
        """
        counts = torch.cat([t["num_boxes"] for t in find_targets])
        boxes = super()._get_num_boxes({"num_boxes": counts, "boxes": torch.cat([t["boxes"] for t in find_targets])})
        present = (counts > 0).sum().clamp(min=1)
        parameters = passes.parameters()
        inputs = passes.leaves + parameters
        gradients: list[Tensor | None] = [None] * len(inputs)
        losses: dict[str, Tensor] = {}
        for outputs, targets in zip(passes, find_targets):
            # Terms of prompts are means over prompts, terms of objects are sums over the number of objects.
            share = len(targets["num_boxes"]) / len(counts)
            self._boxes = boxes * share
            terms = {k: v * share for k, v in self.compute_loss(outputs, targets).items()}
            if self.loss_fn_semantic_seg is not None:
                share = (targets["num_boxes"] > 0).sum() / present
                for key, value in self.loss_fn_semantic_seg(outputs, targets).items():
                    terms[key] = terms.get(key, 0) + value * share
            if self.scale_by_find_batch_size:
                terms[CORE_LOSS_KEY] = terms[CORE_LOSS_KEY] * len(counts) ** 0.5
            self._differentiate(terms[CORE_LOSS_KEY], inputs, gradients)
            for key, value in terms.items():
                losses[key] = losses.get(key, 0) + torch.as_tensor(value).detach()
            del outputs, terms
        losses[CORE_LOSS_KEY] = Differentiated.apply(
            losses[CORE_LOSS_KEY], self, gradients, *passes.outputs, *parameters)
        return losses

    def _differentiate(self, loss: Tensor, inputs: list[Tensor], gradients: list[Tensor | None]) -> None:
        """Add the gradients of one pass; its graph is freed."""
        with torch.autocast(loss.device.type, enabled=False):
            new = torch.autograd.grad(loss * self.gradient_scale, inputs, allow_unused=True)
        for i, gradient in enumerate(new):
            if gradient is not None:
                # Not in place: autograd may hand out one tensor for several inputs.
                gradients[i] = gradient if gradients[i] is None else gradients[i] + gradient


class Differentiated(torch.autograd.Function):
    """A loss whose gradients are there already: backward hands them on, scaled."""

    @staticmethod
    def forward(ctx, loss, owner, gradients, *inputs):
        ctx.owner, ctx.gradients, ctx.scale = owner, gradients, owner.gradient_scale
        return loss.clone()

    @staticmethod
    def backward(ctx, d_loss):
        ctx.owner.gradient_scale = d_loss
        factor, gradients = d_loss / ctx.scale, ctx.gradients
        for i, gradient in enumerate(gradients):  # one by one, so that there are no two copies of all
            gradients[i] = None if gradient is None else gradient * factor
        return None, None, None, *gradients
