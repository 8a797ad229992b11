"""Datasets of other formats: where their images and labels are, and what their classes are called."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from sam3_lora_wrapper.dataset.splits import NAMES
from sam3_lora_wrapper.errors import UserError

PICTURES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Source:
    """A split to convert.

    Args:
        name: of the split.
        images: folder of its images.
        labels: folder of its labels or masks.
    """

    name: str
    images: Path
    labels: Path

    def pictures(self) -> list[Path]:
        """All images, sorted."""
        return sorted(p for p in self.images.rglob("*") if p.suffix.lower() in PICTURES)


def find_sources(root: Path, labels: str) -> list[Source]:
    """The splits of a dataset whose labels are in folders of a name.

    Raises:
        UserError: there is none, or one has no labels.
    """
    found = [
        Source(split, root / before / "images" / after, root / before / labels / after)
        for split in NAMES for before, after in ((split, ""), ("", split))
        if (root / before / "images" / after).is_dir()
    ] or [Source("train", root / "images", root / labels)]
    if len({source.name for source in found}) < len(found):
        raise UserError(f"{root} has both SPLIT/images and images/SPLIT: which is meant?")
    for source in found:
        for folder in (source.images, source.labels):
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder. See python -m sam3_lora_wrapper.convert --help")
    return found


def class_names(root: Path) -> list[str]:
    """Names of the classes, from the `names` of data.yaml or the lines of classes.txt.

    Raises:
        UserError: neither is there, or data.yaml names no classes.
    """
    listed, config = root / "classes.txt", root / "data.yaml"
    if listed.is_file():
        return [line.strip() for line in read_lines(listed) if line.strip()]
    if not config.is_file():
        raise UserError(f"{root} has neither data.yaml nor classes.txt: what are the classes called?")
    try:
        names = OmegaConf.to_container(OmegaConf.load(config)).get("names")
    except Exception as error:  # whatever YAML's parser raises
        raise UserError(f"{config} cannot be read: {error}") from None
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        names = [names[i] for i in range(len(names))]
    if not names or not isinstance(names, list):
        raise UserError(f"{config}: `names` is not a list of names, nor a mapping from 0, 1, ...")
    return [str(n) for n in names]


def read_lines(path: Path) -> list[str]:
    """Lines of a text file, or a UserError where it is none."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8") from None


def require_images(source: Source, labels: list[Path], stems: set[Path]) -> None:
    """Raise UserError where labels have no image, so that objects would be lost."""
    lost = [p for p in labels if p not in stems]
    if lost:
        said = f"{len(lost)} files have no image in {source.images}, first: {lost[0]}"
        raise UserError(f"{source.labels}: {said}")
