"""What a run leaves to be looked at: pictures in TensorBoard, and `summary.md` in its folder.

The patched official trainer calls `after_validation` and `after_run` in its first process.
"""

import json
import re
from collections import Counter
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torchvision.transforms.functional import to_pil_image

from sam3_lora_wrapper.evaluation.visuals import Validation

PICTURES = 4  # images in each picture
POINTS = 1000  # of each curve at most
METERS = "Meters_train/val_detection/"
COCO = f"{METERS}coco/"
PANELS = {  # of the plot: which curves, and the number of the first point
    "training, by step": (r"Step_Losses/Losses/train_all_(loss)", 0),
    "learning rate of each group, by step": (r"Optim/(\d*)_?/lr", 0),
    "validation, by epoch": (METERS + r"\w+/(.+_AP|.+_cgF1|fires_on_\w+)", 1),
}


def validation_of(trainer) -> Validation | None:
    """The last validation of a trainer that is configured as ours are; None where there is none."""
    data = (trainer.data_conf.get("val") or {}).get("dataset")
    dumper = trainer.meters.get("val", {}).get("detection", {}).get("coco")
    if data is None or dumper is None:
        return None
    dumped = Path(dumper.dump_dir) / f"coco_predictions_{dumper.iou_type}.json"
    if not dumped.is_file():
        return None
    return Validation(data.ann_file, data.img_folder, dumped, dumper.iou_type)


def after_validation(trainer) -> None:
    """Write pictures of sampled images, truth beside prediction, to TensorBoard."""
    validation, logger = validation_of(trainer), trainer.logger.tb_logger
    if validation is not None and logger is not None:
        sheet = validation.sheet(validation.sample(PICTURES))
        logger.writer.add_image("Validation/truth and prediction", sheet, trainer.epoch)


def after_run(trainer) -> None:
    """Write `summary.md` and its pictures into the folder of the run."""
    if trainer.logger.tb_logger is not None:
        trainer.logger.tb_logger.flush()
    write_summary(Path(trainer.logging_conf.log_dir).parent, validation_of(trainer))


# ------------------------------------------------------------ what a run has written


def read_stats(path: Path) -> dict[int, dict]:
    """The trainer's numbers by epoch; of an epoch that was run twice, the last."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {stats["Trainer/epoch"] + 1: stats for stats in map(json.loads, lines)}


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) pairs of every scalar in TensorBoard's files, by name; POINTS of each, evenly drawn."""
    if not folder.is_dir():  # TensorBoard is switched off
        return {}
    events = EventAccumulator(str(folder), size_guidance={"tensors": POINTS})
    events.Reload()
    return {
        tag: [(e.step, make_ndarray(e.tensor_proto).item()) for e in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
        if events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars"
    }


# ------------------------------------------------------------ summary.md


def write_summary(folder: Path, validation: Validation | None) -> None:
    """Write `summary.md` and `summary/` into the folder of a run.

    Args:
        folder: of the run.
        validation: its last one; None where there was none.
    """
    pictures = folder / "summary"
    pictures.mkdir(exist_ok=True)
    stats = read_stats(folder / "logs" / "val_stats.json")
    parts = [f"# {folder.name}", *command_section(folder)]
    if stats:
        parts += metric_section(stats)
    draw_curves(read_scalars(folder / "tensorboard"), pictures / "curves.png")
    parts += ["## Curves", "![loss, learning rate and metrics](summary/curves.png)"]
    if validation is not None and stats:
        parts += class_section(stats[max(stats)], validation)
        parts += picture_section(validation, pictures)
    parts += ["## Configuration", f"```yaml\n{read_text(folder / 'config.yaml')}\n```"]
    (folder / "summary.md").write_text("\n\n".join(parts) + "\n")


def read_text(path: Path) -> str:
    """Content of a file, or a dash where there is none."""
    return path.read_text().strip() if path.is_file() else "-"


def command_section(folder: Path) -> list[str]:
    """The commands that started and resumed the run."""
    return ["## Command", f"```sh\n{read_text(folder / 'command.txt')}\n```"]


def table(heads: list[str], rows: list[list]) -> str:
    """A Markdown table; numbers with three decimals, a dash for pycocotools' -1."""
    def cell(value) -> str:
        number = f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "\\|")
        return "-" if value == -1 else number

    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def metric_section(stats: dict[int, dict]) -> list[str]:
    """Metrics of the first and last validation, and each at its best."""
    first, last = stats[min(stats)], stats[max(stats)]
    rows = []
    for name in last:
        key = name.removeprefix(METERS)
        if key == name or key.count("/") > 1:  # a category's
            continue
        better = min if key.startswith("absent/") else max
        best = better(stats, key=lambda epoch: stats[epoch].get(name, last[name]))
        rows.append([key.split("/")[1], first.get(name, "-"), stats[best].get(name, "-"), best, last[name]])
    heads = ["metric", f"epoch {min(stats)}", "best", "at epoch", f"epoch {max(stats)}"]
    return ["## Validation", table(heads, rows)]


def class_section(stats: dict, validation: Validation) -> list[str]:
    """AP of each category, with the number of its objects."""
    kinds = [kind for kind in ("box", "mask") if f"{COCO}{kind}_AP" in stats]
    objects = Counter(validation.names[a["category_id"]] for a in validation.content["annotations"])
    rows = [[name, count, *(stats.get(f"{COCO}{kind}_AP/{name}", "-") for kind in kinds)]
            for name, count in objects.most_common()]
    return ["## Categories", table(["category", "objects", *(f"{kind} AP" for kind in kinds)], rows)]


def picture_section(validation: Validation, folder: Path) -> list[str]:
    """The best and the worst images of the validation, truth on the left, prediction on the right."""
    ranking = validation.ranking()
    best, worst = ranking[:PICTURES], ranking[PICTURES:][::-1][:PICTURES]
    parts = []
    for name, chosen in (("Best", best), ("Worst", worst)):
        if chosen:
            path = folder / f"{name.lower()}.png"
            to_pil_image(validation.sheet([i for i, _ in chosen])).save(path)
            files = ", ".join(f"`{validation.images[i]['file_name']}` (F1 {f1:.2f})" for i, f1 in chosen)
            parts += [f"## {name} images", f"Truth on the left, prediction on the right: {files}",
                      f"![{name.lower()} images](summary/{path.name})"]
    return parts


def draw_curves(scalars: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Plot the loss and the learning rates by step, and the main metrics by epoch."""
    axes = Figure(figsize=(15, 4), layout="constrained").subplots(1, len(PANELS))
    for panel, (title, (tags, first)) in zip(axes, PANELS.items()):
        panel.set_title(title)
        for tag, points in scalars.items():
            curve = re.fullmatch(tags, tag)
            if curve:
                panel.plot([step + first for step, _ in points], [v for _, v in points], ".-", label=curve[1])
        if panel.lines:
            panel.legend(fontsize="x-small")
    axes[0].figure.savefig(path, dpi=100)
