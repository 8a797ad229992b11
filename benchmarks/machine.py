"""Description of the machine that a benchmark ran on, and its results as files."""

import json
import os
import platform
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict:
    """Processor, cores, memory, GPU and versions."""
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write_results(name: str, title: str, rows: list[dict], note: str = "") -> None:
    """Write `results/<name>.json` and a Markdown table `results/<name>.md` with a note below, and print the table."""
    RESULTS.mkdir(exist_ok=True)
    where = machine()
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")
    head = list(rows[0])
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    lines += [" | ".join(str(row[h]) for h in head) for row in rows]
    table = "\n".join(f"| {line} |" for line in lines)
    there = f"{where['cores']} cores {where['cpu']}, {where['memory_gib']} GiB, GPU: {where['gpu'] or 'none'}, " \
            f"torch {where['torch']}"
    text = f"# {title}\n\n{there}\n\n{table}\n" + (f"\n{note}\n" if note else "")
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
