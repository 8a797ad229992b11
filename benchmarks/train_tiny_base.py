"""Train the tiny base model that comes with this repository, from random weights.

    .venv/bin/python benchmarks/train_tiny_base.py

Draws 4,000 images of the domain synthetic.BASE, trains `tiny_base.yaml` on them with the
official trainer, and writes sam3_lora_wrapper/assets/sam3_tiny.pt: float16 tensors in the
official release layout (keys with the prefix `detector.`). About an hour on two CPU cores.
Started again after an interruption, it goes on where it was.
"""

import subprocess
import sys
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from sam3_lora_wrapper.base import SHIPPED  # noqa: E402
from sam3_lora_wrapper.checkpoint import write_atomically  # noqa: E402
from sam3_lora_wrapper.synthetic import BASE, write_dataset  # noqa: E402


def main() -> None:
    data, run = (REPOSITORY / "outputs" / name for name in ("tiny_base_data", "tiny_base"))
    if not data.exists():
        write_dataset(data, BASE, train=4000, valid=100)
    subprocess.run(
        [sys.executable, REPOSITORY / "sam3/train/train.py", "-c", "tiny_base.yaml",
         f"paths.dataset_root={data}", f"paths.experiment_log_dir={run}"], check=True)
    release(run / "checkpoints" / "checkpoint.pt")


def release(checkpoint: Path) -> None:
    """Rewrite a checkpoint of the official trainer in the layout of the official release."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
    halves = {f"detector.{k}": v.half() if v.is_floating_point() else v for k, v in state.items()}
    write_atomically(SHIPPED["sam3_tiny"], lambda file: torch.save(halves, file))
    print(f"{SHIPPED['sam3_tiny']}: {SHIPPED['sam3_tiny'].stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
