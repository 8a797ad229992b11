"""YOLO labels as annotations: boxes (detect) and polygons (segment)."""

from collections.abc import Iterator
from pathlib import Path

from sam3_lora_wrapper.dataset.segmentations import mask_area
from sam3_lora_wrapper.dataset.sources import Source, class_names, read_lines, require_images
from sam3_lora_wrapper.errors import UserError

SLACK = 0.01  # share of the image by which coordinates may leave it: the rounding of tools


class Yolo:
    """Reads YOLO labels.

    Args:
        root: of the dataset.
    """

    labels = "labels"

    def __init__(self, root: Path):
        self.names = class_names(root)

    def check(self, source: Source) -> None:
        """Raise UserError where a label file has no image."""
        stems = {p.relative_to(source.images).with_suffix("") for p in source.pictures()}
        labels = [p.relative_to(source.labels).with_suffix("") for p in source.labels.rglob("*.txt")
                  if p.name != "classes.txt"]
        require_images(source, labels, stems)

    def objects(self, source: Source, picture: Path, width: int, height: int) -> Iterator[dict]:
        """Annotations of an image: `category_id`, `bbox`, `area` and perhaps `segmentation`."""
        path = (source.labels / picture.relative_to(source.images)).with_suffix(".txt")
        for number, line in enumerate(read_lines(path) if path.is_file() else [], 1):
            if line.strip():
                try:
                    yield self._object(line.split(), width, height)
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: {error}") from None

    def _object(self, words: list[str], width: int, height: int) -> dict:
        kind, values = float(words[0]), [float(w) for w in words[1:]]
        if kind not in range(len(self.names)):
            raise ValueError(f"class {words[0]} is not one of 0 to {len(self.names) - 1}")
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            raise ValueError(f"{len(values)} numbers: a box has 4, a polygon an even number from 6 on")
        if not all(-SLACK <= v <= 1 + SLACK for v in values):
            raise ValueError("coordinates are not shares of the image's size, in [0, 1]")
        category = {"category_id": int(kind) + 1}
        if len(values) == 4:
            x, y, w, h = (v * s for v, s in zip(values, (width, height, width, height)))
            return category | {"bbox": [x - w / 2, y - h / 2, w, h], "area": w * h}
        points = [min(max(v, 0), 1) * (height if i % 2 else width) for i, v in enumerate(values)]
        xs, ys = points[0::2], points[1::2]
        box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        return category | {"bbox": box, "area": mask_area([points], height, width), "segmentation": [points]}
