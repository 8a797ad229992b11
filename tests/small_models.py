"""Adapters of small official models, for the tests: made, moved, run and compared."""

import copy
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from sam3.model.data_misc import FindStage
from sam3.model.geometry_encoders import Prompt
from sam3_lora_wrapper.adapters import Lora
from sam3_lora_wrapper.config import LoraConfig

EVERYTHING = {
    "vision_encoder": ["attention", "feed_forward"],
    "text_encoder": ["attention", "feed_forward"],
    "geometry_encoder": ["attention", "feed_forward"],
    "detr_encoder": ["attention", "feed_forward"],
    "detr_decoder": ["attention", "feed_forward"],
    "segmentation_head": ["attention"],
}


def copied(model: nn.Module) -> nn.Module:
    """A copy of an official model that shares its tokenizer, a large constant."""
    tokenizer = model.backbone.language_backbone.tokenizer
    return copy.deepcopy(model, {id(tokenizer): tokenizer})


def config(**options) -> LoraConfig:
    return LoraConfig(**{"rank": 2, "alpha": 4, "components": EVERYTHING} | options)


def randomise(lora: Lora, name: str = "default", seed: int = 1, size: float = 0.05) -> None:
    """Move every trained tensor of an adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in lora.tensors(name).items():
            if ".start." not in key:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the base's own tensors."""
    return {k: v.clone() for k, v in model.state_dict().items() if ".adapters." not in k}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max((a[k] - b[k]).abs().max().item() for k in a)


def run_forward(model: nn.Module) -> dict[str, Tensor]:
    """All outputs of an official model for one fixed input, in its training or eval mode."""
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    images = torch.randn(2, 3, 96, 96, generator=generator).to(dtype)
    boxes = (0.3 + 0.3 * torch.rand(2, 2, 4, generator=generator)).to(dtype)
    backbone = model.backbone.forward_image(images)
    backbone |= {"img_batch_all_stages": images} | model.backbone.forward_text(["circle", "a red star"], device="cpu")
    find = FindStage(*[torch.arange(2)] * 2, *[None] * 5)
    target = SimpleNamespace(
        boxes=boxes[0], boxes_padded=boxes[0][:, None], num_boxes=torch.ones(2, dtype=torch.long),
        segments=None, semantic_segments=None, is_valid_segment=None, is_exhaustive=None,
        object_ids=None, object_ids_padded=None,
    )
    prompt = Prompt(
        box_embeddings=boxes, box_mask=torch.zeros(2, 2, dtype=torch.bool), box_labels=torch.tensor([[1, 1], [0, 1]])
    )
    out = model.forward_grounding(backbone, find, target, prompt)
    names = ("pred_logits", "pred_boxes", "pred_masks", "semantic_seg", "presence_logit_dec")
    return {name: out[name] for name in names if name in out}
