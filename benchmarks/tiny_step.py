"""One training step of the tiny model by the official trainer: LoRA, PEFT's adapters, full fine-tuning.

    .venv/bin/python benchmarks/tiny_step.py

Forward, loss, backward, gradient clipping and optimizer, on the same images, with the same loss (that of masks and
semantic head: full fine-tuning needs a loss for every part) and with activation checkpointing for all, as the official
trainer has it. Full fine-tuning is the same trainer with the bare model. PEFT adapts the layers that LoRA adapts; in
an attention it takes q, k and v with one A, and out with them.
"""

import logging
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import peft
import torch
from hydra.utils import instantiate
from torch import nn

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from machine import write_results  # noqa: E402
from timing import DEVICE, interleaved, median_iqr, verdict  # noqa: E402

from sam3.train.utils.train_utils import AverageMeter, register_omegaconf_resolvers  # noqa: E402
from sam3_lora_wrapper.base import build_base  # noqa: E402
from sam3_lora_wrapper.config import LoraConfig  # noqa: E402
from sam3_lora_wrapper.launch import compose_config  # noqa: E402
from sam3_lora_wrapper.live_memory import LiveMemory  # noqa: E402
from sam3_lora_wrapper.synthetic import SHIFTED, write_dataset  # noqa: E402
from sam3_lora_wrapper.targets import find_targets  # noqa: E402

REPEATS, IMAGES = 7, 8
COMPONENTS = ("vision_encoder", "text_encoder", "geometry_encoder", "detr_encoder", "detr_decoder", "segmentation_head")


def adapting(**components: str) -> list[str]:
    """Overrides that adapt these components alone."""
    return [f"lora.components.{name}={components.get(name, '[]')}" for name in COMPONENTS]


FULL, PEFT = "full fine-tuning", "PEFT, everything"
ATTENTION = dict.fromkeys(("vision_encoder", "text_encoder", "detr_encoder", "detr_decoder"), "[attention]")
CANDIDATES = {
    "LoRA, everything (lora_tiny)": ("lora_tiny", []),
    "LoRA, attention (as lora_base)": ("lora_tiny", adapting(**ATTENTION)),
    "LoRA, decoder (as lora_minimal)": ("lora_tiny", adapting(detr_decoder="[attention,feed_forward]")),
    PEFT: ("lora_tiny", ["trainer.model._target_=tiny_step.peft_model",
                         "loss.criterion._target_=sam3.train.loss.sam3_loss.Sam3LossWrapper"]),
    FULL: ("tiny_full", []),
}
NOTE = (
    "The targets are those of the 840M model on a GPU. In a model this small the time is that of Python and of small "
    "operators, and ours are more: q, k and v have a pair of factors each, PEFT gives the packed weight one pair."
)
# Of full fine-tuning's time.
LIMITS = {"LoRA, attention (as lora_base)": 0.7, "LoRA, decoder (as lora_minimal)": 0.4}


def peft_model(base: dict, weights: str, lora: dict, **_unused) -> nn.Module:
    """The base with PEFT's adapters on the layers that `lora` names."""
    model, config = build_base(base, weights).requires_grad_(False), LoraConfig.from_dict(lora)
    targets = [t.module for t in find_targets(model, config) if not t.module.endswith(".out_proj")]
    return peft.inject_adapter_in_model(
        peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets), model)


def build_trainer(config: str, overrides: list[str], data: Path, folder: Path):
    """The official trainer of a configuration, in the process group that there is."""
    cfg = compose_config(config, [
        f"paths.dataset_root={data}", f"paths.experiment_log_dir={folder}", f"trainer.accelerator={DEVICE}",
        "trainer.mode=train_only", "loss=masks_semantic", "data.num_workers=0",
        "memory.checkpoint_vision=1", "memory.checkpoint_text=true", f"training.batch_size={IMAGES}", *overrides])
    with mock.patch("sam3.train.trainer.setup_distributed_backend", lambda *_: 0):
        trainer = instantiate(cfg.trainer, _recursive_=False)
    trainer.model.train()
    return trainer


def training_step(trainer, batch: dict) -> Callable[[], None]:
    """A function that does what one iteration of the trainer's `train_epoch` does with a batch."""
    losses = {"Losses/train_all_loss": AverageMeter("loss", trainer.device)}

    def step() -> None:
        trainer._run_step(dict(batch), "train", losses, {})
        trainer.scaler.unscale_(trainer.optim.optimizer)
        trainer.gradient_clipper(model=trainer.model)
        trainer.scaler.step(trainer.optim.optimizer)
        trainer.scaler.update()

    return step


def peak_live(trainer, step: Callable[[], None]) -> int:
    """Most bytes of live tensors during a step: weights, gradients, optimizer state, activations."""
    model = trainer.model
    state = [v for s in trainer.optim.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    trainer.optim.zero_grad(set_to_none=True)
    with LiveMemory([*model.parameters(), *model.buffers(), *state]) as memory:
        step()
    return memory.peak


def main() -> None:
    logging.disable(logging.WARNING)
    register_omegaconf_resolvers()
    os.environ.update(RANK="0", LOCAL_RANK="0")
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "nccl" if DEVICE == "cuda" else "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        data = write_dataset(Path(folder) / "data", SHIFTED, train=IMAGES, valid=1)
        trainers = {name: build_trainer(config, overrides, data, Path(folder) / str(i))
                    for i, (name, (config, overrides)) in enumerate(CANDIDATES.items())}
        batch = next(iter(trainers[FULL].train_dataset.get_loader(0)))
        steps = {name: training_step(trainer, batch) for name, trainer in trainers.items()}
        times = interleaved(steps, REPEATS, warmup=2)
        peaks = {name: peak_live(trainer, steps[name]) for name, trainer in trainers.items()}
        torch.distributed.destroy_process_group()
    median = {name: statistics.median(t) for name, t in times.items()}
    rows = []
    for name, trainer in trainers.items():
        limit, share = LIMITS.get(name), median[name] / median[FULL]
        rows.append({
            "method": name,
            "trained parameters": f"{sum(p.numel() for p in trainer.model.parameters() if p.requires_grad):,}",
            "step, ms: median (IQR)": median_iqr(times[name]), "time / full": f"{share:.2f}",
            "target": f"<= {limit}" if limit else "-", "": verdict(share, limit) if limit else "-",
            "time / PEFT": f"{median[name] / median[PEFT]:.2f}",
            "peak of live tensors, MB": f"{peaks[name] / 1e6:.1f}", "peak / full": f"{peaks[name] / peaks[FULL]:.2f}",
        })
    write_results("tiny_step", f"One training step of the tiny model, {IMAGES} images, {DEVICE}", rows, NOTE)


if __name__ == "__main__":
    main()
