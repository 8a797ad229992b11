"""The official mask loss, a few masks at a time."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sam3.train.loss.loss_fns import Masks


class ChunkedMasks(Masks):
    """The official loss of masks in chunks: its memory does not grow with the number of objects.

    Upstream copies the full-size target of every matched query (five for each object), as booleans, as floats and once
    more: 8 GB for 200 objects of an image.

    Args:
        masks_per_chunk: masks whose targets are copied at once.
        kwargs: arguments of sam3.train.loss.loss_fns.Masks.
    """

    def __init__(self, masks_per_chunk: int = 16, **kwargs):
        super().__init__(**kwargs)
        self.masks_per_chunk = masks_per_chunk

    def get_loss(self, outputs: dict, targets: dict, indices: tuple, num_boxes: Tensor) -> dict[str, Tensor]:
        """`loss_mask` and `loss_dice`; the arguments are upstream's."""
        image, query, target = indices
        if targets["masks"] is None or len(image) == 0:
            return super().get_loss(outputs, targets, indices, num_boxes)
        if target is None:
            target = torch.arange(len(image), device=image.device)
        chunks = zip(*(part.split(self.masks_per_chunk) for part in (image, query, target)))
        official = super().get_loss
        # The sampled predictions are recomputed in backward instead of being kept for all masks.
        losses = [checkpoint(official, outputs, targets, chunk, num_boxes, use_reentrant=False) for chunk in chunks]
        return {key: sum(loss[key] for loss in losses) for key in losses[0]}
