"""Resizing the masks of an image, each at the cost of its object's size."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache(maxsize=4)
def filter_weights(old: int, new: int) -> Tensor:
    """Weights (new, old) of PyTorch's antialiased bilinear filter from `old` pixels to `new`."""
    return F.interpolate(torch.eye(old)[None, None], (new, old), mode="bilinear", antialias=True)[0, 0]


def span(filled: Tensor) -> slice:
    """From the first true value to the last."""
    where = filled.nonzero()
    return slice(int(where[0]), int(where[-1]) + 1)


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """A mask as torchvision's antialiased `resize` gives it; only the rows and columns of its object are filtered.

    Args:
        mask: (H, W), uint8.
        height, width: of the result, (height, width), uint8.
    """
    resized = mask.new_zeros(height, width)
    if mask.any():
        rows, columns = span(mask.any(1)), span(mask.any(0))
        down = filter_weights(mask.shape[0], height)[:, rows]
        across = filter_weights(mask.shape[1], width)[:, columns]
        y, x = span(down.any(1)), span(across.any(1))
        resized[y, x] = (down[y] @ mask[rows, columns].float() @ across[x].T).round().to(mask.dtype)
    return resized
