"""What training keeps in memory, and what it computes again instead: the `memory` section of a configuration."""

import logging
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sam3_lora_wrapper.config import Section
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.feature_cache import cache_features
from sam3_lora_wrapper.layers import adapt
from sam3_lora_wrapper.passes import PassModel
from sam3_lora_wrapper.text_cache import cache_text

MATRICES = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.MultiheadAttention)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class MemoryConfig(Section):
    """The `memory` section, checked.

    Args:
        frozen_dtype: of the frozen matrices of the backbones: `float32`, `bfloat16`, `float16`, or `auto`:
            the autocast dtype on CUDA and float32 elsewhere.
        checkpoint_vision: share of the ViT's blocks whose activations are computed again in backward, 0 to 1.
        checkpoint_text: whether those of the text encoder's blocks are.
        prompts_per_pass: prompts of an image that go through the DETR at once; None for all.
        prompts_per_validation: the same in validation, where the backbones run again for each lot (data.val).
        compile_vision: compile the blocks of the ViT.
        feature_cache: folder for the ViT's features, or None.
        feature_cache_gib: largest size of that folder.

    Raises:
        UserError: a value is impossible; the message names the field and the value.
    """

    section = "memory"

    frozen_dtype: str = "float32"
    checkpoint_vision: float = 1.0
    checkpoint_text: bool = True
    prompts_per_pass: int | None = None
    prompts_per_validation: int = 8
    compile_vision: bool = False
    feature_cache: str | None = None
    feature_cache_gib: float = 50.0

    def __post_init__(self):
        if self.frozen_dtype not in ("auto", *DTYPES):
            raise UserError(f"memory.frozen_dtype={self.frozen_dtype!r}: must be one of auto, {', '.join(DTYPES)}")
        for name, null in (("prompts_per_pass", True), ("prompts_per_validation", False)):
            value = getattr(self, name)
            if not (value is None and null or type(value) is int and value > 0):
                or_null = ", or null for all" if null else ""
                raise UserError(f"memory.{name}={value!r}: must be a whole number of at least 1{or_null}")
        if not isinstance(self.checkpoint_vision, (int, float)) or not 0 <= self.checkpoint_vision <= 1:
            raise UserError(f"memory.checkpoint_vision={self.checkpoint_vision!r}: must be a share from 0 to 1")
        for name in ("checkpoint_text", "compile_vision"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"memory.{name}={getattr(self, name)!r}: must be true or false")


def save_memory(model: nn.Module, config: MemoryConfig, device: str, autocast: torch.dtype | None) -> None:
    """Make a model with adapters train as the `memory` section says.

    Args:
        model: an official SAM3 image model, its adapters under `model.lora`.
        config: the section.
        device: type of the device that the run computes on.
        autocast: the dtype that the run computes in, or None without autocast.

    Raises:
        UserError: the section asks for what this run cannot do.
    """
    fuse_attention(model)
    cast_frozen(model.backbone, frozen_dtype(config.frozen_dtype, device, autocast))
    vision, text = model.backbone.vision_backbone, model.backbone.language_backbone
    checkpoint_blocks(vision.trunk, config.checkpoint_vision)
    text.encoder.transformer.grad_checkpointing = config.checkpoint_text
    if not any(p.requires_grad for p in text.parameters()):
        cache_text(text)
    if config.feature_cache is not None:
        cache_features(model, config.feature_cache, config.feature_cache_gib, model.lora.record["fingerprint"])
    if config.compile_vision:
        for block in vision.trunk.blocks:
            block.compile()
    model.__class__ = PassModel


def fuse_attention(model: nn.Module) -> None:
    """Let attention without adapters compute as that with adapters does.

    PyTorch projects batch-first inputs of frozen attention token by token, an order of magnitude slower; and
    out_proj's adapter is added to its output, not to a weight of few digits.
    """
    for module in list(model.modules()):
        if isinstance(module, nn.MultiheadAttention):
            adapt(module)


def checkpoint_blocks(trunk: nn.Module, share: float) -> None:
    """Checkpoint a share of a ViT's blocks, evenly spread; upstream knows all or none.

    Args:
        trunk: an official ViT, changed in place.
        share: of its blocks, 0 to 1.
    """
    trunk.use_act_checkpoint = False
    for i, block in enumerate(trunk.blocks):
        if int((i + 1) * share) > int(i * share):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def frozen_dtype(name: str, device: str, autocast: torch.dtype | None) -> torch.dtype:
    """The dtype that `memory.frozen_dtype` stands for; the arguments are those of `save_memory`."""
    if name == "auto":
        return autocast if autocast and device == "cuda" else torch.float32
    if name != "float32" and autocast is None:
        raise UserError(f"memory.frozen_dtype={name}: needs trainer.optim.amp.enabled=true, or use float32")
    return DTYPES[name]


def cast_frozen(backbone: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen matrices of the backbones in another dtype.

    Autocast rounds them to its dtype in every step anyway: where both are the same, no output changes by a bit. The
    token embedding and what is not a matrix (norms, biases) stay as they are, for autocast does not round them.

    Raises:
        UserError: a weight is beyond what the dtype can hold.
    """
    saved = 0
    for name, module in backbone.named_modules():
        if isinstance(module, MATRICES):
            for key, weight in module.named_parameters(recurse=False):
                if weight.ndim > 1 and not weight.requires_grad and weight.dtype != dtype:
                    cast = weight.data.to(dtype)
                    if not torch.isfinite(cast).all():
                        raise UserError(f"memory.frozen_dtype={dtype}: {name}.{key} is too large for it. Use bfloat16")
                    saved += weight.nbytes - cast.nbytes
                    weight.data = cast
    if saved:
        logging.info(f"frozen weights in {str(dtype).removeprefix('torch.')}: {saved / 2**20:,.0f} MiB less")
