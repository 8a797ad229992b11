"""Adapter files: what `checkpoint_last.pt` holds, and a model rebuilt from it.

A file holds the adapter's tensors, the LoRA configuration, and what its base was: the Hydra
configuration that builds it, where its weights came from, and their fingerprint. It holds only
tensors and plain values, so it loads with `weights_only=True`.
"""

import os
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from sam3_lora_wrapper.adapters import Lora
from sam3_lora_wrapper.base import build_base, identity, read_checkpoint, set_resolution
from sam3_lora_wrapper.config import LoraConfig
from sam3_lora_wrapper.errors import UserError

FORMAT = "sam3-lora"
VERSION = 1


def write_atomically(path: str | Path, write) -> None:
    """Call `write(file)` on a file beside `path` and put it in the place of `path` when done."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def describe(lora: Lora, name: str, epoch: int | None = None) -> dict:
    """What a file says of an adapter beside its tensors: plain values alone."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "lora": lora.named[name].config.to_dict(),
        "base": lora.record,
        "epoch": epoch,
        "packages": {package: version(package) for package in ("sam3", "torch")},
    }


def check_description(content: dict, path: str | Path) -> None:
    """Raise UserError unless a file's description is one that this version reads."""
    if content.get("format") != FORMAT:
        hint = " (this is the trainer's own checkpoint: take checkpoint_last.pt beside it)" \
            if "optimizer" in content else ""
        raise UserError(f"{path} is not an adapter of SAM3-LoRA{hint}")
    if not isinstance(content.get("version"), int) or content["version"] > VERSION:
        raise UserError(
            f"{path} was written by a newer SAM3-LoRA (format {content.get('version')}, this one reads "
            f"up to {VERSION}): update this repository"
        )
    for key in ("lora", "base"):
        if not isinstance(content.get(key), dict):
            raise UserError(f"{path}: its description has no `{key}`: it was altered")


def save_adapter(lora: Lora, path: str | Path, epoch: int | None = None) -> None:
    """Write the active adapter of a model.

    Args:
        lora: the adapters of a model (`model.lora`).
        path: file to write, replaced atomically.
        epoch: number of epochs trained.
    """
    content = describe(lora, lora.only_active(), epoch)
    content["adapter"] = {k: v.cpu() for k, v in lora.state_dict().items()}
    write_atomically(path, lambda file: torch.save(content, file))


def read_adapter(path: str | Path) -> dict:
    """Read an adapter file.

    Raises:
        UserError: it is missing, cut short, not an adapter, or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file. Training writes checkpoints/checkpoint_last.pt")
    content = read_checkpoint(path)
    check_description(content, path)
    return content


def check_base(record: dict, base: dict, path: str | Path) -> None:
    """Raise UserError where an adapter was trained on another base.

    Args:
        record: what the adapter's file says of its base.
        base: identity of the base at hand.
        path: the adapter's file.
    """
    if record.get("parameters") != base["parameters"]:
        raise UserError(
            f"{path} is an adapter of another model: of {record.get('parameters')} parameters, this one "
            f"has {base['parameters']}"
        )
    theirs, ours = str(record.get("fingerprint")), base["fingerprint"]
    if theirs != ours:
        raise UserError(
            f"{path} was trained on a base with other weights (fingerprint {theirs[:12]}, this "
            f"base {ours[:12]}). Give the base it was trained on with --base"
        )


def load_model(path: str | Path | None, weights: str | None = None) -> nn.Module:
    """Rebuild base and adapter from an adapter file.

    Args:
        path: file written by `save_adapter`, or folder written by `save_pretrained`.
        weights: where the base's weights are, if not where they were in training.

    Returns:
        The official model with the adapter active (`model.lora`), on the CPU, in eval mode, for images of the
        base's side.

    Raises:
        UserError: the file or the base is not what it must be.
    """
    if path and Path(path).is_dir():
        from sam3_lora_wrapper.formats.peft_format import load_folder

        return load_folder(Path(path), weights).eval()
    content = read_adapter(path)
    base = content["base"]
    model = build_base(base["config"], weights or base["weights"])
    check_base(base, identity(model), path)
    lora = Lora(model, base)
    lora.add(LoraConfig.from_dict(content["lora"]))
    lora.load_state_dict(content["adapter"])
    return model.eval()


def load_trained(path: str | Path, weights: str | None = None) -> nn.Module:
    """`load_model`, for images of the side that the adapter was trained on."""
    model = load_model(path, weights)
    set_resolution(model, model.lora.record["resolution"])
    return model
