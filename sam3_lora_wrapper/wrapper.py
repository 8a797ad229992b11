"""`_target_` of `trainer.model`: an official SAM3, with LoRA adapters or trainable as a whole."""

from omegaconf import DictConfig
from torch import nn

from .base import build_base


def trainable_base(base: DictConfig, weights: str, resolution: int, lora: None = None) -> nn.Module:
    """The official model, every parameter trainable: full fine-tuning."""
    return build_base(base, weights)
