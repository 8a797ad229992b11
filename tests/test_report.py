"""What there is to be seen of a run: bars, pictures, curves, the summary, and Weights & Biases."""

import io
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from sam3.train.utils.train_utils import AverageMeter, MemMeter, ProgressMeter
from sam3_lora_wrapper.dataset.contact_sheet import TILE
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.evaluation.run_report import METERS, after_validation, read_scalars, read_stats, write_summary
from sam3_lora_wrapper.evaluation.step_bar import under_bar
from sam3_lora_wrapper.evaluation.tracker import start_wandb
from sam3_lora_wrapper.evaluation.visuals import Validation

REPOSITORY = Path(__file__).resolve().parent.parent
SIZE, SIDE = 64, 20
CORNERS = {1: [(4, 4), (36, 36)], 2: [(10, 10)], 3: []}  # of the squares on each image
# Of image 1 one square is found and one missed, image 2 has a false one beside the right one.
GIVEN = {1: [(4, 4, 0.9), (36, 36, 0.3)], 2: [(10, 10, 0.8), (40, 40, 0.7)], 3: []}


def squares(corners: list, **fields) -> list[dict]:
    return [{"category_id": 1, "bbox": [x, y, SIDE, SIDE], "iscrowd": 0, "area": SIDE * SIDE, **fields,
             "segmentation": [[x, y, x + SIDE, y, x + SIDE, y + SIDE, x, y + SIDE]]} for x, y in corners]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of two epochs, each validated, as the trainer leaves it."""
    folder, images = tmp_path / "run", tmp_path / "valid"
    for made in (images, folder / "logs", folder / "predictions"):
        made.mkdir(parents=True)
    annotations, predictions = [], []
    for i in CORNERS:
        Image.new("RGB", (SIZE, SIZE), "black").save(images / f"{i}.png")
        annotations += [a | {"image_id": i} for a in squares(CORNERS[i])]
        predictions += [{"image_id": i, "category_id": 1, "bbox": [x, y, SIDE, SIDE], "score": s}
                        for x, y, s in GIVEN[i]]
    (images / "_annotations.coco.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i}.png", "width": SIZE, "height": SIZE} for i in CORNERS],
        "categories": [{"id": 1, "name": "crack"}, {"id": 2, "name": "unused"}],
        "annotations": [a | {"id": n} for n, a in enumerate(annotations, 1)],
    }))
    (folder / "predictions" / "coco_predictions_bbox.json").write_text(json.dumps(predictions))
    stats = [{f"{METERS}coco/box_AP": 0.25, f"{METERS}coco/box_AP/crack": 0.25, f"{METERS}coco/box_AP_large": -1.0,
              f"{METERS}absent/fires_on_absent": 0.5, "Trainer/epoch": 0},
             {f"{METERS}coco/box_AP": 0.125, f"{METERS}coco/box_AP/crack": 0.125, f"{METERS}coco/box_AP_large": -1.0,
              f"{METERS}absent/fires_on_absent": 0.75, "Trainer/epoch": 1}]
    (folder / "logs" / "val_stats.json").write_text("".join(json.dumps(s) + "\n" for s in stats))
    (folder / "command.txt").write_text("python sam3/train/train.py -c lora_tiny.yaml\n")
    (folder / "config.yaml").write_text("lora:\n  rank: 3\n")
    with SummaryWriter(folder / "tensorboard") as writer:
        for step, loss in enumerate((4.0, 2.0, 1.0)):
            writer.add_scalar("Step_Losses/Losses/train_all_loss", loss, step, new_style=True)
            writer.add_scalar("Optim/0_/lr", 0.1 * loss, step, new_style=True)
        writer.add_scalar(f"{METERS}coco/box_AP", 0.25, 0, new_style=True)
    return folder


def validation(run: Path) -> Validation:
    images = run.parent / "valid"
    dumped = run / "predictions" / "coco_predictions_bbox.json"
    return Validation(images / "_annotations.coco.json", images, dumped, "bbox")


# ------------------------------------------------------------ pictures


def test_images_are_ranked_by_f1_and_an_empty_one_that_stays_empty_is_left_out(run) -> None:
    assert validation(run).ranking() == [
        (1, pytest.approx(2 / 3)),  # 1 of 1 given and of 2 objects
        (2, pytest.approx(2 / 3)),  # 1 of 2 given and of 1 object
    ]


def test_picture_shows_truth_on_the_left_and_what_counts_as_given_on_the_right(run) -> None:
    sheet = np.asarray(validation(run).sheet([1]).permute(1, 2, 0))
    assert sheet.dtype == np.uint8
    left, right = sheet[4:4 + TILE, 4:4 + TILE], sheet[4:4 + TILE, 8 + TILE:8 + 2 * TILE]

    def drawn(tile: np.ndarray, corner: tuple) -> bool:
        """Whether the lower edge of the square is drawn."""
        scale = TILE / SIZE
        x, y = (corner[0] + SIDE / 2) * scale, (corner[1] + SIDE) * scale
        return bool(tile[round(y) - 2:round(y) + 3, round(x)].max() > 60)

    assert [drawn(left, c) for c in CORNERS[1]] == [True, True]
    assert [drawn(right, c) for c in CORNERS[1]] == [True, False]


def test_pictures_of_a_validation_go_to_tensorboard(run) -> None:
    images = run.parent / "valid"
    dataset = SimpleNamespace(ann_file=images / "_annotations.coco.json", img_folder=images)
    dumper = SimpleNamespace(dump_dir=run / "predictions", iou_type="bbox")
    with SummaryWriter(run / "tensorboard") as writer:
        after_validation(SimpleNamespace(
            data_conf={"val": {"dataset": dataset}}, meters={"val": {"detection": {"coco": dumper}}},
            logger=SimpleNamespace(tb_logger=SimpleNamespace(writer=writer)), epoch=1,
        ))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    (picture,) = events.Images("Validation/truth and prediction")
    assert picture.step == 1 and (picture.width, picture.height) == (2 * TILE + 12, 3 * TILE + 16)


# ------------------------------------------------------------ summary.md


def test_summary_has_command_metrics_classes_pictures_and_configuration(run) -> None:
    write_summary(run, validation(run))
    text = (run / "summary.md").read_text()
    assert "python sam3/train/train.py -c lora_tiny.yaml" in text
    assert "| box_AP | 0.250 | 0.250 | 1 | 0.125 |" in text
    assert "| fires_on_absent | 0.500 | 0.500 | 1 | 0.750 |" in text  # the lower the better
    assert "| box_AP_large | - | - | 1 | - |" in text
    assert "| crack | 3 | 0.125 |" in text and "unused" not in text
    assert "`1.png` (F1 0.67), `2.png` (F1 0.67)" in text
    assert "rank: 3" in text
    for name in ("curves", "best"):
        assert f"](summary/{name}.png)" in text
        assert np.asarray(Image.open(run / "summary" / f"{name}.png").convert("L")).std() > 5


def test_summary_of_a_run_without_validation(run) -> None:
    (run / "logs" / "val_stats.json").unlink()
    write_summary(run, None)
    text = (run / "summary.md").read_text()
    assert "curves.png" in text and "rank: 3" in text and "| metric" not in text


def test_scalars_are_read_back_whole_and_the_last_of_an_epoch_counts(run) -> None:
    scalars = read_scalars(run / "tensorboard")
    assert scalars["Step_Losses/Losses/train_all_loss"] == [(0, 4.0), (1, 2.0), (2, 1.0)]
    with open(run / "logs" / "val_stats.json", "a") as file:
        file.write(json.dumps({"Trainer/epoch": 1, "again": 1.0}) + "\n")
    assert read_stats(run / "logs" / "val_stats.json")[2] == {"Trainer/epoch": 1, "again": 1.0}


# ------------------------------------------------------------ progress bars


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def loop(stream, monkeypatch) -> str:
    """Go through 6 images in batches of 2 under a bar, as the trainer does; what `stream` got."""
    monkeypatch.setattr(sys, "stderr", stream)
    device = torch.device("cpu")
    loss = AverageMeter("Losses/train_all_loss", device)
    meters = ProgressMeter(3, [MemMeter("Mem (GB)", device), loss], {}, prefix="Train Epoch: [0]")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.25)
    for i, _ in enumerate(under_bar(DataLoader(range(6), batch_size=2), meters, optimizer)):
        loss.update(4.0 * i)
        logging.info("a line of the log")
    return stream.getvalue()


def test_bar_shows_images_loss_rate_memory_and_time_left(monkeypatch) -> None:
    shown = loop(Terminal(), monkeypatch)
    assert "train: 100%" in shown and "6/6" in shown and "image/s" in shown
    assert "loss=4, lr=2.50e-01, memory=" in shown.split("\r")[-1]
    assert "GB" in shown and "00:00<" in shown


def test_bar_is_quiet_where_the_output_is_not_a_terminal(monkeypatch) -> None:
    assert loop(io.StringIO(), monkeypatch) == ""


# ------------------------------------------------------------ Weights & Biases

OFFLINE = """
from sam3.train.utils.logger import Logger
from types import SimpleNamespace
Logger(SimpleNamespace(
    wandb_writer={"_target_": "sam3_lora_wrapper.evaluation.tracker.start_wandb", "project": "p", "dir": "."},
    tensorboard_writer={"_target_": "sam3.train.utils.logger.make_tensorboard_logger", "log_dir": "events"},
)).log("Losses/probe", 1.5, 0)
"""


def test_upstreams_writer_copies_tensorboard_to_weights_and_biases(tmp_path: Path, monkeypatch) -> None:
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "RANK": "0", "LOCAL_RANK": "0"}
    for name, value in (settings | {"PYTHONPATH": str(REPOSITORY)}).items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", OFFLINE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"Losses/probe" in record.read_bytes()


def test_missing_weights_and_biases_is_one_message(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="tracker=wandb: Weights & Biases is not installed. Run: pip install wandb"):
        start_wandb(project="p")
