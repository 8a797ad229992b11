"""The demo as a user runs it: what `make demo` promises."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[dict, str]:
    """Summary and output of the whole demo."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    done = subprocess.run([sys.executable, "-m", "sam3_lora_wrapper.demo", "--output", folder],
                          cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "summary.json").read_text()), done.stdout


def test_adapter_finds_what_the_base_does_not(demo) -> None:
    summary, _ = demo
    assert summary["mask_ap_after"] - summary["mask_ap_before"] >= 0.30
    assert summary["box_ap_after"] - summary["box_ap_before"] >= 0.30
    assert summary["trainable_parameters"] == 295_936
    assert summary["total_parameters"] == 2_900_478


def test_output_names_the_numbers_and_the_picture(demo) -> None:
    summary, output = demo
    for name in ("box_ap_before", "box_ap_after", "mask_ap_before", "mask_ap_after"):
        assert f"{summary[name]:.3f}" in output
    assert summary["overlay"] in output
    picture, original = Image.open(summary["overlay"]), Image.open(summary["image"])
    shown = picture.crop((0, picture.height - picture.width, picture.width, picture.height))
    changed = np.abs(np.asarray(shown, int) - np.asarray(original.resize(shown.size), int)).max(-1) > 40
    assert changed.mean() > 0.02


def test_example_runs_after_the_demo(demo) -> None:
    summary, _ = demo
    folder = Path(summary["overlay"]).parent
    done = subprocess.run([sys.executable, REPOSITORY / "example_usage.py", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "score" in done.stdout and (folder / "example.png").is_file()
    assert len((REPOSITORY / "example_usage.py").read_text().splitlines()) < 60
