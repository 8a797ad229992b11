"""Adapter folders in PEFT's format: written, read, and exchanged with the hub.

A folder holds `adapter_model.safetensors` and `adapter_config.json`, which PEFT itself loads onto
the official model, and a model card. What PEFT has no field for (the base's fingerprint, our
configuration, versions, training, metrics) is JSON in the metadata of the safetensors file.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import safetensors
import safetensors.torch
from omegaconf import OmegaConf
from torch import nn

from sam3_lora_wrapper.adapters import Lora
from sam3_lora_wrapper.base import build_base, identity
from sam3_lora_wrapper.checkpoint import FORMAT, check_base, check_description, describe, write_atomically
from sam3_lora_wrapper.config import LoraConfig
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.formats.hub import find_folder, upload
from sam3_lora_wrapper.formats.model_card import model_card
from sam3_lora_wrapper.formats.peft_layout import Layout, lay_out, official_layers, pack, row_norms, unpack
from sam3_lora_wrapper.targets import Target, find_targets, full_parameters
from sam3_lora_wrapper.tensors import require_tensors

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"


def official_layout(model: nn.Module, targets: list[Target], full: list[str], config: LoraConfig) -> Layout:
    """An adapter's layout on the official model."""
    parameters = dict(model.named_parameters())
    return lay_out(official_layers(model, targets, config), {k: parameters[k].shape for k in full}, config)


def peft_config(layout: Layout, config: LoraConfig, base: str | None) -> dict:
    """The fields of PEFT's LoraConfig; rank and alpha of each layer that differs stand in the patterns.

    Args:
        layout: the adapter in PEFT's layout.
        config: its configuration.
        base: name of the base model, for the reader.
    """
    alpha = {layer.path: layer.scaling * layer.rank for layer in layout.layers}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": [layer.path for layer in layout.layers],
        "rank_pattern": {layer.path: layer.rank for layer in layout.layers if layer.rank != config.rank},
        "alpha_pattern": {path: value for path, value in alpha.items() if value != config.alpha},
        "modules_to_save": list(config.modules_to_save) or None,
        "bias": config.bias,
        "use_rslora": False,  # in the scaling of each layer
        "use_dora": config.use_dora,
    }


def write_folder(folder: Path, tensors: dict, config: dict, description: dict, card: str) -> None:
    """Write the three files of an adapter folder, each replaced atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", FORMAT: json.dumps(description)}
    content = {
        WEIGHTS: safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, metadata),
        CONFIG: json.dumps(config, indent=2).encode(),
        CARD: card.encode(),
    }
    for name, data in content.items():
        write_atomically(folder / name, lambda file, data=data: file.write(data))


def run_record(checkpoints: str | Path) -> dict:
    """What a run's folder says of it: the configuration of the training, and the last metrics.

    Args:
        checkpoints: the run's folder of checkpoints, beside its config.yaml and logs.
    """
    run, record = Path(checkpoints).parent, {}
    if (run / "config.yaml").is_file():
        config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
        record["training"] = {key: config[key] for key in ("training", "loss", "data") if key in config}
    metrics = {}
    for stats in ("train_stats.json", "val_stats.json"):
        if (run / "logs" / stats).is_file():
            metrics |= json.loads((run / "logs" / stats).read_text().splitlines()[-1])
    return record | {"metrics": metrics}


def save_pretrained(
    lora: Lora, folder: str | Path, name: str | None = None, epoch: int | None = None, run: dict | None = None
) -> None:
    """Write an adapter as a folder that PEFT loads onto the official model.

    DoRA on nn.MultiheadAttention is stored too, although PEFT refuses to load it; the card says so.

    Args:
        lora: the adapters of a model (`model.lora`).
        folder: folder to write, made where there is none.
        name: the adapter; the active one if None.
        epoch: number of epochs trained.
        run: what else to record of the training (see run_record).
    """
    name = name or lora.only_active()
    named = lora.named[name]
    layout = official_layout(lora.model, named.targets, list(named.full), named.config)
    tensors = pack(layout, lora.state_dict(name), row_norms(layout, lora.model))
    description = describe(lora, name, epoch) | (run or {})
    config = peft_config(layout, named.config, base_name(lora.record))
    card = model_card(description, lora.table(name), peft_loads(layout, named.config))
    write_folder(Path(folder), tensors, config, description, card)


def base_name(record: dict) -> str | None:
    """What the base is called, for the reader of a folder; None where nothing is recorded."""
    weights = record.get("weights")
    return "facebook/sam3" if weights == "hub" else weights


def peft_loads(layout: Layout, config: LoraConfig) -> bool:
    """Whether PEFT can load an adapter: it has no DoRA for nn.MultiheadAttention."""
    return not (config.use_dora and any(len(layer.weights) > 1 for layer in layout.layers))


def read_folder(folder: Path) -> tuple[dict, dict, dict]:
    """Description, PEFT's configuration and tensors of an adapter folder.

    Raises:
        UserError: a file is missing, cut short, or not written by this project.
    """
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not an adapter folder: it has no {name}")
    try:
        config = json.loads((folder / CONFIG).read_text())
        with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
            description = json.loads((file.metadata() or {}).get(FORMAT, "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (ValueError, OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder} cannot be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(description, dict):
        raise UserError(f"{folder} cannot be read: {CONFIG} or the metadata of {WEIGHTS} is no mapping")
    check_description(description, folder / WEIGHTS)
    return description, config, tensors


def check_config(found: dict, expected: dict, folder: Path) -> None:
    """Raise UserError where PEFT's configuration says other things than the tensors' own description."""
    for key, value in expected.items():
        if key != "base_model_name_or_path" and found.get(key) != value:
            raise UserError(
                f"{folder / CONFIG}: {key}={found.get(key)!r}, but {WEIGHTS} beside it was written with "
                f"{value!r}. The two files are not of one adapter, or one was altered"
            )


def from_pretrained(base: nn.Module, source: str | Path, name: str = "default") -> nn.Module:
    """Load an adapter folder onto the base that it was trained on.

    Args:
        base: the official model with its weights; with or without other adapters (`base.lora`).
        source: folder written by `save_pretrained`, or the name of a repository on the hub.
        name: what to call the adapter.

    Returns:
        The same model, the adapter active and trainable (`base.lora`).

    Raises:
        UserError: the folder or the base is not what it must be; the base is as it was.
    """
    folder = find_folder(source, [WEIGHTS, CONFIG])
    description, found, tensors = read_folder(folder)
    lora = getattr(base, "lora", None)
    check_base(description["base"], lora.record if lora else identity(base), folder)
    config = LoraConfig.from_dict(description["lora"])
    targets = find_targets(base, config)
    layout = official_layout(base, targets, full_parameters(base, config, targets), config)
    require_tensors(tensors, layout.shapes, f"{folder / WEIGHTS} does not fit the model")
    check_config(found, peft_config(layout, config, None), folder)
    own = unpack(layout, tensors)
    if lora is None:
        Lora.check_name(name, ())
        lora = Lora(base, description["base"])
    lora.add(config, name)
    lora.load_state_dict(own, name)
    return base


def load_folder(folder: Path, weights: str | None = None) -> nn.Module:
    """Rebuild base and adapter from an adapter folder.

    Args:
        folder: written by `save_pretrained`.
        weights: where the base's weights are, if not where they were in training.
    """
    record = read_folder(folder)[0]["base"]
    if not {"config", "weights"} <= record.keys():
        raise UserError(f"{folder} does not say how its base is built: use from_pretrained(base, folder)")
    return from_pretrained(build_base(record["config"], weights or record["weights"]), folder)


def push_to_hub(
    lora: Lora, repository: str, name: str | None = None, private: bool | None = None, run: dict | None = None
) -> str:
    """Upload an adapter as a repository of the hub.

    Args:
        lora: the adapters of a model (`model.lora`).
        repository: its name there, `owner/name`; made where there is none.
        name: the adapter; the active one if None.
        private: whether a new repository is private; the owner's default if None.
        run: what else to record of the training (see run_record).

    Returns:
        Address of the upload.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    with TemporaryDirectory() as folder:
        save_pretrained(lora, folder, name, run=run)
        return upload(folder, repository, private)
