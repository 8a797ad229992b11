"""Check a dataset before anything is trained on it, or write a mended copy of it.

    python -m sam3_lora_wrapper.dataset_check FOLDER                 check; the status is 1 on errors
    python -m sam3_lora_wrapper.dataset_check FOLDER --repair OUT    write a mended copy

FOLDER holds `train/`, `valid/` or `val/`, and perhaps `test/`, each with its images and
`_annotations.coco.json`; or it is one such split itself.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sam3_lora_wrapper.dataset.coco import read_json, require_folder, require_sound
from sam3_lora_wrapper.dataset.mend import Images, mend
from sam3_lora_wrapper.dataset.prompts import check_prompts
from sam3_lora_wrapper.dataset.repair import write_mended
from sam3_lora_wrapper.dataset.report import Report
from sam3_lora_wrapper.dataset.splits import Split, find_splits
from sam3_lora_wrapper.dataset.warnings import compare_splits, warn_of_corners, warn_of_use
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.launch import readable_errors


@dataclass
class Checked:
    """A split after the check.

    Args:
        split: where it is.
        coco: its mended view.
        images: the rules for images, with what they know of each file.
        report: what was found.
    """

    split: Split
    coco: dict
    images: Images
    report: Report


def check_split(split: Split, look: str, keep: int | None, max_objects: int) -> Checked:
    """Check one split: the file by itself, and its images.

    Args:
        split: where it is.
        look: how closely images are looked at (see mend.Images).
        keep: examples to keep of each kind of finding; None for all.
        max_objects: more objects of one category in an image are a warning.
    """
    report = Report(keep)
    images = Images(require_folder(split.img_folder), report, look)
    raw = read_json(split.ann_file)
    coco = mend(raw, images, report, f"{split.name}: images")
    warn_of_corners(raw["annotations"], images.by_key, report)
    warn_of_use(coco, report, max_objects)
    return Checked(split, coco, images, report)


def check_dataset(
    splits: list[Split], look: str = "header", keep: int | None = 3, max_objects: int = 200,
    prompts: Mapping | None = None,
) -> tuple[list[Checked], Report]:
    """Check splits, each by itself and against each other.

    Args:
        splits: the splits; the first is what the others are compared with.
        look, keep, max_objects: see check_split.
        prompts: `data.prompts`, checked against the categories of all splits.

    Raises:
        UserError: a file cannot be read at all, or the prompts do not fit the categories.
    """
    checked = [check_split(s, look, keep, max_objects) for s in splits]
    check_prompts({c["name"] for done in checked for c in done.coco["categories"]}, prompts or {})
    return checked, compare_splits(checked)


def describe(checked: list[Checked], between: Report) -> str:
    """The findings of all splits as text."""
    parts = []
    for c in checked:
        sizes = ", ".join(f"{len(c.coco[s]):,} {s}" for s in ("images", "annotations", "categories"))
        parts += [f"{c.split.name}: {sizes} ({c.split.ann_file})", c.report.text()]
    return "\n".join(p for p in [*parts, between.text()] if p)


def check_before_training(splits: list[Split], prompts: Mapping, max_objects: int, folder: Path) -> None:
    """Check the splits of a run; write the findings and pictures of samples into the run's folder.

    Raises:
        UserError: there are errors.
    """
    checked, between = check_dataset(splits, max_objects=max_objects, prompts=prompts)
    for c in checked:
        require_sound(c.report, c.split.ann_file)
    text = describe(checked, between)
    print(text, flush=True)
    draw_all(checked, folder)
    (folder / "dataset_check.txt").write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def draw_all(checked: list[Checked], folder: Path) -> None:
    """Write a contact sheet per split and a plot of the class counts."""
    from sam3_lora_wrapper.dataset.contact_sheet import draw_counts, draw_sheet

    folder.mkdir(parents=True, exist_ok=True)
    for c in checked:
        draw_sheet(c.coco, c.split.img_folder, folder / f"samples_{c.split.name}.png")
    draw_counts({c.split.name: c.coco for c in checked}, folder / "class_counts.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a dataset, or one split of it")
    parser.add_argument("--annotations", default="_annotations.coco.json", help="name of each split's JSON")
    parser.add_argument("--decode", action="store_true", help="decode every image, not its header alone")
    parser.add_argument("--repair", type=Path, metavar="OUT", help="write a mended copy to this new folder")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="draw samples into this folder")
    args = parser.parse_args()
    splits = find_splits(args.folder, args.annotations)
    keep = None if args.repair else 3
    checked, between = check_dataset(splits, "decode" if args.decode else "header", keep)
    if args.repair:
        write_mended(checked, args.repair)
        print(f"{args.repair}: mended copy; every change is in {args.repair / 'changes.txt'}")
        return
    print(describe(checked, between))
    if args.pictures:
        draw_all(checked, args.pictures)
    errors = sum(c.report.count("error") for c in checked)
    if errors:
        raise UserError(f"{errors:,} error{'s' * (errors > 1)}. Write a mended copy with --repair OUT")


if __name__ == "__main__":
    with readable_errors():
        main()
