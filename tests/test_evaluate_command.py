"""Validation in a run of the official trainer, its best checkpoint, and the evaluate command."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam3_lora_wrapper.checkpoint import read_adapter
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.evaluate import evaluation_config
from sam3_lora_wrapper.evaluation.run_report import METERS, read_scalars, read_stats
from sam3_lora_wrapper.synthetic import BASE, write_dataset

REPOSITORY = Path(__file__).resolve().parent.parent
MASK_AP = f"{METERS}coco/mask_AP"


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True)


def evaluate(*arguments) -> subprocess.CompletedProcess:
    return command("-m", "sam3_lora_wrapper.evaluate", *arguments)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), BASE, train=4, valid=2, seed=4)


def train(data: Path, folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    return command("sam3/train/train.py", "-c", "lora_tiny.yaml", f"paths.dataset_root={data}", *overrides,
                   f"paths.experiment_log_dir={folder}", "data.num_workers=0", "training.batch_size=2")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A run that is validated after every epoch, with a rate so high that the adapter gets worse."""
    folder = tmp_path_factory.mktemp("run")
    done = train(data, folder, "augment=official", "training.lr=0.02", "training.max_epochs=2",
                 "training.val_epoch_freq=1", "trainer.skip_first_val=false")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def metrics(stats: dict) -> dict[str, float]:
    return {k: v for k, v in stats.items() if k.startswith(METERS)}


def test_validation_writes_the_numbers_of_pycocotools_on_its_dump(run, data) -> None:
    stats = read_stats(run / "logs" / "val_stats.json")
    assert sorted(stats) == [1, 2]
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        truth = COCO(str(data / "valid" / "_annotations.coco.json"))
        given = truth.loadRes(str(run / "predictions" / "coco_predictions_segm.json"))
        evaluation = COCOeval(truth, given, kind)
        for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
            step()
        assert stats[2][f"{METERS}coco/{name}_AP"] == pytest.approx(evaluation.stats[0], abs=1e-6)
        factors = [stats[2][f"{METERS}coco/{name}_{part}"] for part in ("positive_micro_F1", "IL_MCC")]
        # cgF1 is the mean over IoU thresholds of the one times the other, which is the same for all.
        assert stats[2][f"{METERS}coco/{name}_cgF1"] == pytest.approx(factors[0] * factors[1], abs=1e-6)


def test_best_checkpoint_is_the_adapter_of_the_epoch_with_the_best_metric(run) -> None:
    stats = read_stats(run / "logs" / "val_stats.json")
    best = max(stats, key=lambda epoch: stats[epoch][MASK_AP])
    assert stats[1][MASK_AP] != stats[2][MASK_AP]
    assert read_adapter(run / "checkpoints" / "checkpoint_best.pt")["epoch"] == best
    assert read_adapter(run / "checkpoints" / "checkpoint_last.pt")["epoch"] == 2
    assert (run / "checkpoints" / "adapter_best" / "adapter_model.safetensors").is_file()
    names = {p.name for p in (run / "checkpoints").glob("*.pt")}
    assert names == {"checkpoint.pt", "checkpoint_last.pt", "checkpoint_best.pt"}
    saved = json.loads((run / "logs" / "best_stats.json").read_text().splitlines()[-1])
    assert saved["val_detection/coco/mask_AP"] == stats[1][MASK_AP]  # as of the validation before


def test_every_loss_metric_and_rate_is_a_scalar_of_tensorboard(run) -> None:
    scalars = read_scalars(run / "tensorboard")
    numbers = {}
    for name in ("train_stats", "val_stats"):
        numbers |= read_stats(run / "logs" / f"{name}.json")[2]
    assert len(numbers) > 40 and not [name for name in numbers if name not in scalars]
    assert scalars[MASK_AP][-1] == (1, pytest.approx(numbers[MASK_AP]))
    assert len([name for name in scalars if name.startswith("Optim/") and name.endswith("lr")]) == 2


def test_run_leaves_a_summary(run) -> None:
    text = (run / "summary.md").read_text()
    assert "sam3/train/train.py -c lora_tiny.yaml" in text and "max_epochs: 2" in text
    assert f"{read_stats(run / 'logs' / 'val_stats.json')[2][MASK_AP]:.3f} |" in text
    assert all((run / "summary" / name).is_file() for name in ("curves.png", "best.png"))


def test_evaluating_an_adapter_gives_the_numbers_of_its_run(run) -> None:
    path = run / "checkpoints" / "checkpoint_best.pt"
    before = path.read_bytes()
    done = evaluate("--model_path", path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = run / "evaluation" / "checkpoint_best-valid"
    expected = metrics(read_stats(run / "logs" / "val_stats.json")[read_adapter(path)["epoch"]])
    assert metrics(read_stats(folder / "logs" / "val_stats.json")[1]) == pytest.approx(expected, abs=1e-6)
    assert f"mask_AP                          {expected[MASK_AP]:.4f}" in done.stdout
    assert path.read_bytes() == before and not list(folder.rglob("*.pt"))


def test_evaluating_the_bare_base_on_another_split(data, tmp_path) -> None:
    done = evaluate("-c", "lora_tiny.yaml", "--split", "train", "--output", tmp_path / "out",
                    f"paths.dataset_root={data}", "data.num_workers=0")
    assert done.returncode == 0, done.stdout + done.stderr
    given = metrics(read_stats(tmp_path / "out" / "logs" / "val_stats.json")[1])
    for group in ("absent", "foreign"):
        assert given[f"{METERS}absent/fires_on_{group}"] == given[f"{METERS}absent/fires_on_{group}_base"]
    dumped = json.loads((tmp_path / "out" / "predictions" / "coco_predictions_segm.json").read_text())
    assert {p["image_id"] for p in dumped} == {1, 2, 3, 4}


def arguments(**given) -> argparse.Namespace:
    names = ("config", "model_path", "base", "split", "output")
    return argparse.Namespace(**dict.fromkeys(names) | {"overrides": []} | given)


def test_folder_of_an_adapter_brings_its_resolution_and_prompts(run, data, tmp_path) -> None:
    folder = run / "checkpoints" / "adapter_best"
    cfg = evaluation_config(arguments(model_path=folder, output=tmp_path))
    assert (cfg.data.val_transforms[1].sizes, dict(cfg.data.prompts)) == (96, {})
    model = instantiate(cfg.trainer.model, _convert_="all")
    saved = read_adapter(run / "checkpoints" / "checkpoint_best.pt")["adapter"]
    state = model.lora.state_dict()
    assert all(torch.equal(state[key], value) for key, value in saved.items())


def test_mistakes_are_named(run, data, tmp_path) -> None:
    last = run / "checkpoints" / "checkpoint_last.pt"
    with pytest.raises(UserError, match="nowhere: no such folder"):
        evaluation_config(arguments(model_path=last, split="nowhere", output=tmp_path))
    only = tmp_path / "only"
    shutil.copytree(data / "train", only / "train")
    with pytest.raises(UserError, match="only has no validation split. Name one with --split"):
        evaluation_config(arguments(model_path=last, output=tmp_path, overrides=[f"paths.dataset_root={only}"]))


def test_a_missing_adapter_ends_in_one_message(data, tmp_path) -> None:
    done = evaluate("--model_path", tmp_path / "none.pt", "-c", "lora_tiny.yaml", f"paths.dataset_root={data}")
    assert done.returncode == 1 and done.stderr.startswith(f"error: {tmp_path / 'none.pt'}: no such file")


def test_run_without_a_validation_split_trains_and_says_so(data, tmp_path) -> None:
    shutil.copytree(data / "train", tmp_path / "data" / "train")
    done = train(tmp_path / "data", tmp_path / "run", "training.max_epochs=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no validation split: the run trains without validation" in done.stdout + done.stderr
    assert read_adapter(tmp_path / "run" / "checkpoints" / "checkpoint_last.pt")["epoch"] == 1
    assert not (tmp_path / "run" / "checkpoints" / "checkpoint_best.pt").exists()
    assert "## Curves" in (tmp_path / "run" / "summary.md").read_text()


def test_a_best_metric_that_is_none_is_refused_before_anything_is_built(data, tmp_path) -> None:
    done = train(data, tmp_path / "run", "training.best_metric=mask_ap")
    assert done.returncode == 1 and "training.best_metric=mask_ap: no such metric" in done.stderr
    assert not (tmp_path / "run").exists()
