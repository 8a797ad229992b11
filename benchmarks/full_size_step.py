"""One optimizer step of a preset on the 840M model with random weights, by the official trainer.

    .venv/bin/python benchmarks/full_size_step.py lora_base [key=value ...]

1008 px, one image, three prompts, masks on. Takes minutes and up to 20 GB on a CPU. Reports the
time of forward with loss and backward, the peak memory, and whether every adapter got a gradient.
"""

import os
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from hydra.utils import instantiate

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from machine import write_results  # noqa: E402

from sam3.train.utils.train_utils import register_omegaconf_resolvers  # noqa: E402
from sam3_lora_wrapper.launch import compose_config  # noqa: E402
from sam3_lora_wrapper.synthetic import SHIFTED, write_dataset  # noqa: E402


def build_trainer(preset: str, overrides: list[str], data: Path):
    """The official trainer of a preset, on the full-size model, for the device at hand."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fixed = [f"paths.dataset_root={data}", f"paths.experiment_log_dir={data}/run", "model.weights=random",
             f"trainer.accelerator={device}", "trainer.mode=train_only", "data.num_workers=0",
             "training.gradient_accumulation_steps=1", "training.sizes=[1008]"]
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    register_omegaconf_resolvers()
    cfg = compose_config(preset, [*fixed, *overrides])
    return instantiate(cfg.trainer, _recursive_=False), device


def check_gradients(model) -> int:
    """Number of adapter tensors with a gradient; B must have one, A's is 0 while B is 0.

    Raises:
        SystemExit: a gradient is missing, not finite, or zero where it must not be.
    """
    tensors = model.module.lora.tensors()
    for name, parameter in tensors.items():
        if parameter.grad is None or not torch.isfinite(parameter.grad).all():
            sys.exit(f"{name}: no finite gradient")
        if ".lora_B." in name and not parameter.grad.any():
            sys.exit(f"{name}: the gradient is zero")
    return len(tensors)


def main() -> None:
    preset, overrides = sys.argv[1], sys.argv[2:]
    with tempfile.TemporaryDirectory() as folder:
        # Three concepts, all prompts: the absent ones are negatives.
        domain = replace(SHIFTED, concepts=SHIFTED.concepts[:3])
        data = write_dataset(folder, domain, train=4, valid=1, size=1008)
        trainer, device = build_trainer(preset, overrides, data)
        batch = next(iter(trainer.train_dataset.get_loader(0)))
        trainer.model.train()
        steps = {}
        forward = trainer._step

        def timed_forward(*args):
            start = time.time()
            out = forward(*args)
            steps["forward"] = time.time() - start
            return out

        trainer._step = timed_forward
        losses = {"Losses/train_all_loss": instantiate({"_target_": "sam3.train.utils.train_utils.AverageMeter",
                                                        "name": "loss", "device": device})}
        start = time.time()
        trainer._run_step(batch, "train", losses, {})
        backward = time.time() - start - steps["forward"]
        tensors = check_gradients(trainer.model)
        start = time.time()
        trainer.optim.optimizer.step()
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        write_results(f"full_size_step_{preset}_{device}", f"One step of {preset} on the 840M model, {device}", [{
            "preset": preset, "trainable parameters": f"{trained:,}",
            "adapter tensors with a finite gradient": tensors,
            "loss": f"{losses['Losses/train_all_loss'].val:.1f}",
            "forward and loss, s": round(steps["forward"], 1), "backward, s": round(backward, 1),
            "optimizer, s": round(time.time() - start, 2), "peak memory, GiB": round(peak, 2)}])


if __name__ == "__main__":
    main()
