"""A few training steps of the official trainer on images of noise, measured, in a process of their own.

    .venv/bin/python benchmarks/step.py lora_base [key=value ...] [--steps 5] [--objects 4] [--categories 3] [--cap 8]

Prints one line of JSON. Weights are random. On a GPU memory is what PyTorch's allocator held at most; elsewhere it is
the most bytes of tensors alive at once, which is what that allocator would hold, without the workspaces of kernels.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from sam3.train.utils.train_utils import AverageMeter, register_omegaconf_resolvers  # noqa: E402
from sam3_lora_wrapper.launch import compose_config  # noqa: E402
from sam3_lora_wrapper.live_memory import LiveMemory  # noqa: E402

LOSS = "Losses/train_all_loss"


def measure(config: str, *overrides: str, **options) -> dict:
    """Run this file in another process; what it measured, or {"fits": False} where memory ran out."""
    flags = [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run([sys.executable, __file__, config, *overrides, *flags], capture_output=True, text=True)
    if "OutOfMemoryError" in done.stderr:
        return {"fits": False}
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    return {"fits": True, **json.loads(done.stdout.splitlines()[-1])}


def write_noise(folder: Path, images: int, side: int, categories: int, objects: int) -> None:
    """A COCO dataset of noise: every category is in one of the images, `objects` rectangles in each image."""
    rng = np.random.default_rng(0)
    (folder / "train").mkdir()
    coco = {"images": [], "annotations": [], "categories": [{"id": c, "name": f"thing {c}"} for c in range(categories)]}
    for i in range(images):
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / f"train/{i}.jpg")
        coco["images"].append({"id": i, "file_name": f"{i}.jpg", "width": side, "height": side})
        shown = [c for c in range(categories) if c % images == i] or [0]
        for k in range(max(objects, len(shown))):
            x, y = (rng.random(2) * 0.8 * side).tolist()
            s = 0.15 * side
            coco["annotations"].append({
                "id": len(coco["annotations"]), "image_id": i, "category_id": shown[k % len(shown)], "iscrowd": 0,
                "bbox": [x, y, s, s], "area": s * s, "segmentation": [[x, y, x + s, y, x + s, y + s, x, y + s]]})
    (folder / "train/_annotations.coco.json").write_text(json.dumps(coco))


def build_trainer(config: str, overrides: list[str], folder: Path, args) -> tuple:
    """The official trainer of a configuration for the device at hand, and its first batch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fixed = [f"paths.dataset_root={folder}", f"paths.experiment_log_dir={folder}/run", "trainer.mode=train_only",
             f"trainer.accelerator={device}", "model.weights=random", "data.num_workers=0",
             "training.gradient_accumulation_steps=1", "training.sizes=[${model.resolution}]",
             f"data.max_negatives={args.categories}", "data.max_foreign=0"]
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    register_omegaconf_resolvers()
    cfg = compose_config(config, [*fixed, *overrides])
    write_noise(folder, cfg.training.batch_size, cfg.model.resolution, args.categories, args.objects)
    if args.cap:
        torch.cuda.set_per_process_memory_fraction(args.cap * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    start = time.perf_counter()
    trainer = instantiate(cfg.trainer, _recursive_=False)
    trainer.model.train()
    return trainer, device, time.perf_counter() - start


def check_gradients(model) -> int:
    """Number of trained tensors with a finite gradient; B must have one that is not 0.

    With text prompts alone the geometry encoder attends to one token, whatever q and k are.

    Raises:
        SystemExit: it is not so.
    """
    trained = {n: p for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in trained.items():
        if not torch.isfinite(parameter.grad).all():
            sys.exit(f"{name}: no finite gradient")
        one_token = name.startswith("geometry_encoder") and ".self_attn." in name and name.endswith((".q", ".k"))
        if ".lora_B." in name and not one_token and not parameter.grad.any():
            sys.exit(f"{name}: the gradient is zero")
    return len(trained)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=5, help="timed, after one more")
    parser.add_argument("--objects", type=int, default=4, help="in each image")
    parser.add_argument("--categories", type=int, default=3, help="all are prompts of each image")
    parser.add_argument("--cap", type=float, help="GiB of GPU memory that may be used")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer, device, start = build_trainer(args.config, args.overrides, Path(folder), args)
        model = trainer.model.module
        batch = next(iter(trainer.train_dataset.get_loader(0)))
        weights = [*model.parameters(), *model.buffers()]
        losses, seconds, optimizer = {LOSS: AverageMeter(LOSS, device, ":.2e")}, [], trainer.optim.optimizer

        def step() -> None:
            begin = time.perf_counter()
            trainer._run_step({**batch}, "train", losses, {})
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)

        if args.steps:
            step()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(args.steps):
            step()
        if device == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:  # a step more, for the record of memory costs time
            state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
            trainer.optim.zero_grad(set_to_none=True)
            with LiveMemory([*weights, *state]) as live:
                step()
            peak = live.peak
        print(json.dumps({
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "tensors with gradients": check_gradients(model),
            "loss": losses[LOSS].val,
            "weights_gib": sum(t.nbytes for t in weights if t.device.type == device) / 2**30,
            "peak_gib": peak / 2**30,
            "rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "seconds": statistics.median(seconds[1 : args.steps + 1] or seconds),
            "all seconds": seconds,
            "build_s": start}))


if __name__ == "__main__":
    main()
