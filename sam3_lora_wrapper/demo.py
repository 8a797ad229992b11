"""The whole path on made-up data: evaluate a base, adapt it, evaluate again, segment a picture.

    python -m sam3_lora_wrapper.demo

Trains the tiny SAM3 with the official trainer (`lora_tiny.yaml`) on a domain that its base has
not seen, in a few minutes on two CPU cores. Everything lands in outputs/demo/.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from sam3_lora_wrapper.checkpoint import read_adapter
from sam3_lora_wrapper.synthetic import SHIFTED, write_dataset

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRESS = re.compile(r"Train Epoch: \[(\d+)\]\[ *(\d+)/(\d+)\].*train_all_loss: \S+ \((\S+?)\)")


def run(command: list, log: Path) -> None:
    """Run a program of this repository; its output goes to `log`, its progress to the screen.

    Raises:
        SystemExit: the program failed; the end of its output is shown.
    """
    print("$ python " + " ".join(str(c) for c in command), flush=True)
    with open(log, "w") as file, subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=REPOSITORY, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:
        for line in process.stdout:
            file.write(line)
            step = PROGRESS.search(line)
            if step:
                epoch, at, steps, loss = step.groups()
                print(f"  epoch {int(epoch) + 1}, step {int(at)}/{steps}, mean loss {float(loss):.0f}", flush=True)
    if process.returncode != 0:
        sys.exit(f"{log.read_text()[-2000:]}\nfailed: the whole output is in {log}")


def train(folder: Path, name: str, *overrides: str) -> dict[str, float]:
    """Run the official trainer on the demo's data; return the last validation's numbers."""
    run_folder = folder / name
    run(["sam3/train/train.py", "-c", "lora_tiny.yaml", f"paths.dataset_root={folder / 'data'}",
         f"paths.experiment_log_dir={run_folder}", *overrides], folder / f"{name}.log")
    last = (run_folder / "logs" / "val_stats.json").read_text().splitlines()[-1]
    return {k.rsplit("/", 1)[1]: v for k, v in json.loads(last).items() if "/coco/" in k}


def pick_image(folder: Path) -> Path:
    """The validation image with the most objects."""
    coco = json.loads((folder / "data" / "valid" / "_annotations.coco.json").read_text())
    shown = [a["image_id"] for a in coco["annotations"]]
    best = max(coco["images"], key=lambda i: shown.count(i["id"]))
    return folder / "data" / "valid" / best["file_name"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder, emptied first")
    parser.add_argument("--epochs", type=int, default=9)
    args = parser.parse_args()
    folder = args.output.resolve()
    shutil.rmtree(folder, ignore_errors=True)

    print(f"1. data: 320 training and 40 validation images -> {folder / 'data'}")
    write_dataset(folder / "data", SHIFTED, train=320, valid=40)
    print("2. the unadapted base")
    before = train(folder, "before", "trainer.mode=val")
    print("3. LoRA training with the official trainer")
    start = time.time()
    after = train(folder, "run", f"training.max_epochs={args.epochs}", "training.val_epoch_freq=1000")
    seconds = time.time() - start
    print("4. segmentation with the adapter")
    adapter, image = folder / "run" / "checkpoints" / "checkpoint_last.pt", pick_image(folder)
    run(["inference.py", "--model_path", adapter, "--image_path", image, "--prompt", *SHIFTED.concepts,
         "--output_dir", folder], folder / "inference.log")

    content = read_adapter(adapter)
    summary = {
        "box_ap_before": before["box_AP"],
        "box_ap_after": after["box_AP"],
        "mask_ap_before": before["mask_AP"],
        "mask_ap_after": after["mask_AP"],
        "train_seconds": round(seconds, 1),
        "trainable_parameters": sum(v.numel() for v in content["adapter"].values()),
        "total_parameters": content["base"]["parameters"],
        "overlay": str(folder / f"{image.stem}_overlay.png"),
        "adapter": str(adapter),
        "image": str(image),
        "torch_threads": torch.get_num_threads(),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print((folder / "inference.log").read_text())
    print(f"           before  after\n"
          f"  box AP   {before['box_AP']:6.3f} {after['box_AP']:6.3f}\n"
          f"  mask AP  {before['mask_AP']:6.3f} {after['mask_AP']:6.3f}\n"
          f"trained {summary['trainable_parameters']:,} parameters beside {summary['total_parameters']:,} "
          f"frozen ones in {seconds:.0f} s\n"
          f"adapter: {adapter} ({adapter.stat().st_size / 1e6:.2f} MB)\n"
          f"picture: {summary['overlay']}\n"
          f"numbers: {folder / 'summary.json'}")


if __name__ == "__main__":
    main()
