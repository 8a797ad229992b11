"""Training steps of the 840M model: peak memory at 1008 px, and time against full fine-tuning.

    .venv/bin/python benchmarks/full_size.py

Random weights, one image of noise with four objects, masks on. On a GPU every row is of six steps at 1008 px, with all
memory and with no more than 16, 12 and 8 GiB of it. On a CPU memory at 1008 px is of one step, which takes minutes, and
time is of six steps at 336 px; the frozen weights are in bfloat16 as on a GPU. Rounds are interleaved.
"""

import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from machine import write_results  # noqa: E402
from step import measure  # noqa: E402

CUDA = torch.cuda.is_available()
ROUNDS, STEPS = 2, 3
FULL = ("lora_base", "method=full", "loss=masks_semantic")
# Configuration and overrides, prompts of the image; the targets of peak GiB and of time against full fine-tuning.
RUNS = {
    "minimal, low": (("lora_minimal", "training.memory=low"), 2, 3.3, 0.4),
    "minimal, low, 10 prompts": (("lora_minimal", "training.memory=low"), 10, 3.3, None),
    "base, low": (("lora_base", "training.memory=low"), 2, 6.0, 0.7),
    "base, balanced": (("lora_base", "training.memory=balanced"), 2, None, 0.7),
    "base, fast": (("lora_base", "training.memory=fast"), 2, None, 0.7),
    "full preset, low": (("lora_full", "training.memory=low"), 2, 8.0, None),
    "full fine-tuning": (FULL, 2, None, None),
}
CAPS = (16, 12, 8)
CPU_NOTE = (
    "Peaks are the most bytes of tensors alive at once, of the first step. In later ones the optimizer's state is beside the "
    "activations: 0.08 GiB or less for adapters; of full fine-tuning a second step did not fit into 24 GB. A GPU holds the "
    "workspaces of its kernels as well, and where text is not adapted about 0.6 GiB less: the text encoder waits on the CPU. "
    "The targets are for a GPU, where nothing was measured. `low` computes the whole forward twice and one of two backward "
    "products: three quarters of full fine-tuning is the least that it can take."
)


def overrides(run: tuple) -> list[str]:
    config, *rest = run
    return [config, *rest, *([] if CUDA or run is FULL else ["memory.frozen_dtype=bfloat16"])]


def seconds_of(names: list[str]) -> dict[str, list[float]]:
    """Seconds of the steps of each run, of interleaved rounds."""
    seconds = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name in names:
            run, prompts, *_ = RUNS[name]
            side = [] if CUDA else ["model.resolution=336"]
            done = measure(*overrides(run), *side, categories=prompts, steps=STEPS)
            seconds[name] += done["all seconds"][1 : STEPS + 1]
    return seconds


def verdict(value: float, target: float | None) -> str:
    return "-" if target is None else f"{target:g}: {'met' if value <= target else 'missed'}"


def memory_row(name: str) -> dict:
    """Memory of one step, on a GPU also whether it fits into less."""
    run, prompts, target, _ = RUNS[name]
    done = measure(*overrides(run), categories=prompts, steps=STEPS if CUDA else 0)
    row = {"run": name, "prompts": prompts, "trained": f"{done['trained']:,}",
           "weights, GiB": round(done["weights_gib"], 2), "peak, GiB": round(done["peak_gib"], 2),
           "target, GiB": verdict(done["peak_gib"], target)}
    if CUDA:
        fits = [cap for cap in CAPS if measure(*overrides(run), categories=prompts, steps=1, cap=cap)["fits"]]
        row["fits in, GiB"] = ", ".join(map(str, fits)) or "none of 16, 12, 8"
    print(row, flush=True)
    return row


def main() -> None:
    rows = [memory_row(name) for name in RUNS]
    seconds = seconds_of([name for name in RUNS if "10 prompts" not in name])
    whole = statistics.median(seconds["full fine-tuning"])
    for row in rows:
        target, times = RUNS[row["run"]][3], seconds.get(row["run"])
        time = statistics.median(times) if times else None
        row |= {
            f"step, s, at {1008 if CUDA else 336} px": f"{time:.2f}" if time else "-",
            "of full fine-tuning": f"{time / whole:.2f}" if time else "-",
            "target, time": verdict(time / whole, target) if time else "-",
        }
    note = "" if CUDA else CPU_NOTE
    name = f"full_size_{'gpu' if CUDA else 'cpu'}"
    write_results(name, "Training steps of the 840M model, memory at 1008 px", rows, note)


if __name__ == "__main__":
    main()
