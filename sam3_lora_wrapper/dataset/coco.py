"""COCO JSON: reading a file, and the one view of it that training and evaluation share."""

import json
from pathlib import Path

from sam3_lora_wrapper.dataset.mend import Images, mend, no_collection
from sam3_lora_wrapper.dataset.report import Report
from sam3_lora_wrapper.errors import UserError

SECTIONS = ("categories", "images", "annotations")


def _object(pairs: list) -> dict:
    """A JSON object; of a key that is there twice, json would silently drop one."""
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [k for k, _ in pairs]
        raise ValueError(f"an object has the key {next(k for k in names if names.count(k) > 1)!r} twice")
    return made


@no_collection()
def read_json(path: str | Path) -> dict:
    """Read a COCO file as it is.

    Raises:
        UserError: the file is missing, is not JSON, or has not the lists of COCO.
    """
    try:
        coco = json.loads(Path(path).read_bytes(), object_pairs_hook=_object)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. A split is a folder with its images and this file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    for section in SECTIONS:
        if not isinstance(coco, dict) or not isinstance(coco.get(section), list):
            raise UserError(f"{path} is not COCO JSON: it has no list `{section}`")
    return coco


def require_folder(folder: str | Path) -> Path:
    """The folder, or a UserError where there is none."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder. Is paths.dataset_root right?")
    return Path(folder)


def require_sound(report: Report, what: str | Path) -> None:
    """Raise UserError where a report holds errors."""
    count = report.count("error")
    if count:
        raise UserError(
            f"{what}: {count:,} error{'s' * (count > 1)}\n{report.text()}\n"
            "Write a mended copy with: python -m sam3_lora_wrapper.dataset_check FOLDER --repair OUT"
        )


def load_coco(ann_file: str | Path, img_folder: str | Path) -> dict:
    """The view of a COCO file that training, validation and evaluation share.

    Args:
        ann_file: path of the JSON.
        img_folder: folder that the `file_name` entries are relative to.

    Returns:
        The file with what was missing filled in: annotations' ids, `bbox`, `area`, `iscrowd`,
        images' `width` and `height`; boxes that leave their image by a rounding error are cut.

    Raises:
        UserError: the file cannot be used as it is; the message says why and what to do.
    """
    report = Report()
    images = Images(require_folder(img_folder), report)
    coco = mend(read_json(ann_file), images, report)
    require_sound(report, ann_file)
    return coco
