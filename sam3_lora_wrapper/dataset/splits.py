"""Where the splits of a dataset are."""

from dataclasses import dataclass
from pathlib import Path

from sam3_lora_wrapper.errors import UserError

NAMES = ("train", "valid", "val", "test")


@dataclass(frozen=True)
class Split:
    """A part of a dataset.

    Args:
        name: `train`, `valid` etc.
        ann_file: COCO JSON.
        img_folder: folder that its `file_name` entries are relative to.
    """

    name: str
    ann_file: Path
    img_folder: Path


def split_folder(root: str, names: str | list[str] | None) -> str | None:
    """Folder of a split: of several names the first that is there, or None.

    A single name is taken to be meant, so that a mistake in it is found.
    """
    if isinstance(names, str):
        return str(Path(root) / names)
    return next((str(Path(root) / n) for n in names or () if (Path(root) / n).is_dir()), None)


def find_splits(root: Path, annotations: str) -> list[Split]:
    """The splits in a folder, or the folder itself where it is one.

    Args:
        root: the folder.
        annotations: name of each split's JSON.

    Raises:
        UserError: there is none.
    """
    if (root / annotations).is_file():
        return [Split(root.resolve().name, root / annotations, root)]
    splits = [Split(n, root / n / annotations, root / n) for n in NAMES if (root / n).is_dir()]
    if not splits:
        raise UserError(f"{root} holds none of {', '.join(n + '/' for n in NAMES)} and no {annotations}")
    return splits
