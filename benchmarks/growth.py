"""How memory and time of a training step grow with prompts, objects, batch size and resolution.

    .venv/bin/python benchmarks/growth.py

The tiny model on a CPU, lora_base on a GPU; a process for each row, a median of five steps.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from machine import write_results  # noqa: E402
from step import measure  # noqa: E402

CUDA = torch.cuda.is_available()
CONFIG, SIDES = ("lora_base", (336, 672, 1008)) if CUDA else ("lora_tiny", (96, 192, 288))
BATCH = {"prompts": (1, 2, 10, 80), "objects": (1, 50, 200), "batch": (1, 2, 4), "resolution": SIDES}


def run(what: str, value: int, memory: str) -> dict:
    """One row: the quantity at this value, all others at their smallest."""
    batch, side = value if what == "batch" else 1, value if what == "resolution" else SIDES[0 if not CUDA else 2]
    overrides = [f"training.memory={memory}", f"training.batch_size={batch}", f"model.resolution={side}"]
    options = {"categories": value if what == "prompts" else 2, "objects": value if what == "objects" else 1}
    return measure(CONFIG, *overrides, steps=5, **options)


def main() -> None:
    rows = []
    for what, values in BATCH.items():
        for memory in ("low", "balanced", "fast"):
            first = None
            for value in values:
                done = run(what, value, memory)
                first = first or done
                fits = done["fits"]
                rows.append({
                    "what grows": what, "to": value, "training.memory": memory,
                    "peak, MiB": round(done["peak_gib"] * 1024) if fits else "out of memory",
                    "of the first": f"{done['peak_gib'] / first['peak_gib']:.2f}" if fits else "-",
                    "step, s": f"{done['seconds']:.2f}" if fits else "-",
                })
                print(rows[-1], flush=True)
    write_results(f"growth_{'gpu' if CUDA else 'cpu'}", f"Growth of a training step of {CONFIG}", rows)


if __name__ == "__main__":
    main()
