"""LoRA against full fine-tuning: the tiny model, the demo's data, the same number of steps.

    .venv/bin/python benchmarks/lora_vs_full.py
"""

import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from machine import write_results  # noqa: E402

from sam3_lora_wrapper.demo import run  # noqa: E402
from sam3_lora_wrapper.synthetic import SHIFTED, write_dataset  # noqa: E402

CONFIGS = {"LoRA": ("lora_tiny.yaml", "training.lr"), "full fine-tuning": ("tiny_full.yaml", "training.lr_full")}
RATES = (2.5e-3, 5e-3)
EPOCHS, IMAGES = 9, 320


def train(folder: Path, config: str, *overrides: str) -> dict:
    """Run the official trainer; return the last validation's average precisions."""
    name = "_".join([Path(config).stem, *overrides]).replace("=", "-")
    run(["sam3/train/train.py", "-c", config, f"paths.dataset_root={folder / 'data'}",
         f"paths.experiment_log_dir={folder / name}", "training.val_epoch_freq=1000", *overrides],
        folder / f"{name}.log")
    last = (folder / name / "logs" / "val_stats.json").read_text().splitlines()[-1]
    return {k.rsplit("/", 1)[1]: v for k, v in json.loads(last).items() if "/coco/" in k}


def main() -> None:
    folder = REPOSITORY / "outputs" / "lora_vs_full"
    write_dataset(folder / "data", SHIFTED, IMAGES, 40)
    before = train(folder, "lora_tiny.yaml", "trainer.mode=val")
    rows = [{"method": "base, not adapted", "learning rate": "-", "steps": 0,
             "box AP": f"{before['box_AP']:.3f}", "mask AP": f"{before['mask_AP']:.3f}"}]
    for method, (config, key) in CONFIGS.items():
        for rate in RATES:  # each method at its best of the same rates
            after = train(folder, config, f"training.max_epochs={EPOCHS}", f"{key}={rate}")
            rows.append({"method": method, "learning rate": rate, "steps": EPOCHS * IMAGES // 8,
                         "box AP": f"{after['box_AP']:.3f}", "mask AP": f"{after['mask_AP']:.3f}"})
    write_results("lora_vs_full", "LoRA against full fine-tuning of the tiny model", rows)


if __name__ == "__main__":
    main()
