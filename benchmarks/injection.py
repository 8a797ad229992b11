"""Seconds that the wrapper adds at the start of a run of the 840M model: adapters injected, memory settings applied.

    .venv/bin/python benchmarks/injection.py
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from omegaconf import OmegaConf

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from machine import write_results  # noqa: E402

from sam3_lora_wrapper.adapters import Lora  # noqa: E402
from sam3_lora_wrapper.base import build_base, identity  # noqa: E402
from sam3_lora_wrapper.config import LoraConfig  # noqa: E402
from sam3_lora_wrapper.launch import compose_config  # noqa: E402
from sam3_lora_wrapper.memory import MemoryConfig, save_memory  # noqa: E402

REPEATS, TARGET = 5, 2.0


def timed(function) -> tuple[float, object]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def main() -> None:
    rows = []
    for preset in ("lora_base", "lora_full"):
        cfg = compose_config(preset, ["paths.dataset_root=unused"])
        lora_config = LoraConfig.from_dict(OmegaConf.to_container(cfg.lora))
        build, seconds = [], {"fingerprint": [], "injection": [], "casting to bfloat16": []}
        for _ in range(REPEATS):
            taken, model = timed(lambda: build_base(OmegaConf.to_container(cfg.model.base, resolve=True), "random"))
            build.append(taken)
            taken, record = timed(lambda: identity(model))
            seconds["fingerprint"].append(taken)
            seconds["injection"].append(timed(lambda: Lora(model, record).add(lora_config))[0])
            memory = MemoryConfig(frozen_dtype="bfloat16")
            seconds["casting to bfloat16"].append(timed(lambda: save_memory(model, memory, "cuda", torch.bfloat16))[0])
        median = {what: statistics.median(times) for what, times in seconds.items()}
        rows.append({"preset": preset, "official build, s": f"{statistics.median(build):.1f}",
                     **{f"{what}, s": f"{taken:.2f}" for what, taken in median.items()},
                     f"all of ours, target <= {TARGET:g}": f"{sum(median.values()):.2f}: "
                     f"{'met' if sum(median.values()) <= TARGET else 'missed'}"})
        print(rows[-1], flush=True)
    write_results("injection", "What the wrapper adds to the start of a run of the 840M model", rows)


if __name__ == "__main__":
    main()
