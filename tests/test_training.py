"""Runs of the patched official trainer, by the commands of the README."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sam3_lora_wrapper.checkpoint import load_model, read_adapter
from sam3_lora_wrapper.synthetic import SHIFTED, write_dataset

REPOSITORY = Path(__file__).resolve().parent.parent
QUICK = ("data.num_workers=0", "training.batch_size=4")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), SHIFTED, train=8, valid=3)


def train(folder: Path, *arguments) -> subprocess.CompletedProcess:
    """Run train.py from `folder`, without PYTHONPATH and with a secret in the environment."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_TOKEN": "hf_secret"}
    return subprocess.run(
        [sys.executable, REPOSITORY / "sam3/train/train.py", *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, text=True,
    )


def run_tiny(folder: Path, data: Path, *overrides) -> subprocess.CompletedProcess:
    return train(folder, "-c", "lora_tiny.yaml", f"paths.dataset_root={data}", *QUICK, *overrides)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data) -> tuple[Path, str]:
    """Folder and output of a run of one epoch, started from a folder outside the repository."""
    folder = tmp_path_factory.mktemp("elsewhere")
    done = run_tiny(folder, data, "training.max_epochs=1")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "outputs" / "lora_tiny", done.stdout + done.stderr


def test_run_reports_adapters_steps_and_average_precision(run) -> None:
    folder, output = run
    assert "detr_decoder" in output and "frozen" in output
    assert "2 steps per epoch: 8 images, 4 per step" in output
    stats = json.loads((folder / "logs" / "val_stats.json").read_text())
    for name in ("box_AP", "mask_AP"):
        assert 0 <= stats[f"Meters_train/val_detection/coco/{name}"] <= 1
    losses = json.loads((folder / "logs" / "train_stats.json").read_text())
    assert all(math.isfinite(v) for v in losses.values())
    assert losses["Losses/train_all_loss_mask"] > 0


def test_run_writes_no_token(run) -> None:
    folder, output = run
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 5
    assert "hf_secret" not in output
    assert not [p for p in files if b"hf_secret" in p.read_bytes()]


def test_checkpoints_hold_the_adapter_and_no_base(run) -> None:
    folder, _ = run
    last = folder / "checkpoints" / "checkpoint_last.pt"
    adapter, resume = read_adapter(last), torch.load(folder / "checkpoints" / "checkpoint.pt", weights_only=True)
    trained = sum(v.numel() for v in adapter["adapter"].values())
    assert last.stat().st_size < 4 * trained + 400_000
    assert adapter["epoch"] == 1 and adapter["lora"]["rank"] == 16
    assert resume["model"].keys() == adapter["adapter"].keys()
    assert all(torch.equal(resume["model"][k], v) for k, v in adapter["adapter"].items())
    assert {"optimizer", "loss", "epoch", "steps"} <= resume.keys()
    states = resume["optimizer"]["state"]
    assert sum(s["exp_avg"].numel() for s in states.values()) == trained
    assert not list((folder / "checkpoints").glob("*.tmp"))


def test_training_moved_every_adapter_and_left_the_base_alone(run) -> None:
    folder, _ = run
    # Loading compares the fingerprint of the shipped base with that of the base that was trained on.
    model = load_model(folder / "checkpoints" / "checkpoint_last.pt")
    still = [k for k, v in model.lora.state_dict().items() if ".lora_B." in k and not v.any()]
    # With text prompts alone the geometry encoder's own tokens are one: q and k cannot matter there.
    assert all(k.startswith("geometry_encoder.encode.0.self_attn.lora_B.") for k in still)


def test_the_same_command_resumes_and_a_finished_run_says_so(run, data) -> None:
    folder, _ = run
    before = read_adapter(folder / "checkpoints" / "checkpoint_last.pt")
    done = run_tiny(folder.parent.parent, data, "training.max_epochs=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Resuming training from epoch: 1" in done.stdout
    after = read_adapter(folder / "checkpoints" / "checkpoint_last.pt")
    assert (before["epoch"], after["epoch"]) == (1, 2)
    assert any(not torch.equal(after["adapter"][k], v) for k, v in before["adapter"].items())
    again = run_tiny(folder.parent.parent, data, "training.max_epochs=2", "trainer.mode=train_only")
    assert again.returncode == 0
    resumed = read_adapter(folder / "checkpoints" / "checkpoint_last.pt")
    assert all(torch.equal(resumed["adapter"][k], v) for k, v in after["adapter"].items())


def test_two_processes_boxes_only_and_accumulation(tmp_path: Path, data: Path) -> None:
    done = run_tiny(tmp_path, data, "--num-gpus", "2", "loss=boxes", "lora.components.segmentation_head=[]",
                    "training.batch_size=2", "training.gradient_accumulation_steps=2", "training.max_epochs=1",
                    "trainer.mode=train_only")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 steps per epoch: 8 images, 4 per step" in done.stdout
    stats = json.loads((tmp_path / "outputs/lora_tiny/logs/train_stats.json").read_text())
    assert math.isfinite(stats["Losses/train_all_loss"]) and "Losses/train_all_loss_mask" not in stats


@pytest.mark.parametrize("overrides, said", [
    (["paths.dataset_root=/nowhere"], "/nowhere/train: no such folder"),
    (["trainer.accelerator=cuda"], "no CUDA device"),
    (["training.batch_size=9"], "the loader is empty"),
    (["lora.rank=0"], "lora.rank=0"),
    (["lora.components.text_encoder=[attenshun]"], "attenshun"),
    (["lora.rnak=4"], "rnak"),
    (["model.weights=/nowhere/sam3.pt"], "/nowhere/sam3.pt"),
])
def test_mistakes_end_in_one_message(tmp_path: Path, data: Path, overrides: list, said: str) -> None:
    if torch.cuda.is_available() and "cuda" in overrides[0]:
        pytest.fail("this test states what happens without CUDA: run it with CUDA_VISIBLE_DEVICES=")
    done = run_tiny(tmp_path, data, *overrides)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stdout + done.stderr
    assert said in done.stderr.strip().splitlines()[-1] or said in done.stderr
    assert not list(tmp_path.rglob("*.pt"))
