"""`_target_` of `trainer.model`: an official SAM3 with LoRA adapters, or trainable as a whole."""

import logging

from torch import nn

from sam3.train.utils.train_utils import get_amp_type
from sam3_lora_wrapper.adapters import Lora
from sam3_lora_wrapper.base import build_base, identity, set_resolution
from sam3_lora_wrapper.config import LoraConfig
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.memory import MemoryConfig, save_memory


def trainable_base(
    base: dict, weights: str, resolution: int, masks: bool, memory: dict, semantic_loss: dict | None, **_unused
) -> nn.Module:
    """The official model, every parameter trainable: full fine-tuning.

    Raises:
        UserError: the configuration asks for passes of prompts, or trains masks without the semantic head.
    """
    if memory["prompts_per_pass"] is not None:
        passes = memory["prompts_per_pass"]
        raise UserError(f"memory.prompts_per_pass={passes}: full fine-tuning has no passes, give null")
    if masks and semantic_loss is None:
        raise UserError("method=full: every part that computes needs a loss. Give loss=masks_semantic or loss=boxes")
    model = build_base(base, weights)
    set_resolution(model, resolution)
    if not masks:
        model.segmentation_head = None
    return model


def lora_model(
    base: dict,
    weights: str,
    resolution: int,
    lora: dict,
    masks: bool = True,
    prompts: dict | None = None,
    memory: dict | None = None,
    amp: dict | None = None,
    device: str = "cpu",
) -> nn.Module:
    """Build the official base, freeze it and inject LoRA adapters.

    Args:
        base: Hydra configuration of the official model.
        weights: where its weights come from (see base.build_base).
        resolution: side of the square input images, in pixels; recorded for inference.
        lora: the `lora` section (see config.LoraConfig).
        masks: whether masks are trained; without them the segmentation head is left out of
            training and stays that of the base at inference.
        prompts: texts of categories (`data.prompts`), recorded for inference.
        memory: the `memory` section (see memory.MemoryConfig); without it the forward stays the official one.
        amp: the trainer's autocast: enabled, amp_dtype.
        device: type of the device that the trainer will move the model to.

    Returns:
        The official model, its adapters under `model.lora`; only they require gradients.
    """
    model = build_base(base, weights)
    record = {
        "config": base,
        "weights": str(weights),
        "resolution": int(resolution),
        "prompts": dict(prompts or {}),
        **identity(model),
    }
    set_resolution(model, resolution)
    if not masks:
        model.segmentation_head = None
    adapters = Lora(model, record)
    adapters.add(LoraConfig.from_dict(lora))
    logging.info("LoRA adapters:\n" + adapters.table())
    if memory is not None:
        autocast = get_amp_type(amp["amp_dtype"]) if amp and amp["enabled"] else None
        save_memory(model, MemoryConfig.from_dict(memory), device, autocast)
    return model
