"""PNG masks as annotations."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as mask_util

from sam3_lora_wrapper.dataset.image_files import read_pixels
from sam3_lora_wrapper.dataset.segmentations import as_json, bounding_box, mask_area
from sam3_lora_wrapper.dataset.sources import Source, class_names, find_sources, require_images
from sam3_lora_wrapper.errors import UserError


class Masks:
    """Reads PNG masks.

    Args:
        root: of the dataset.
        values: whether different values, not connected regions, are the objects.
    """

    labels = "masks"

    def __init__(self, root: Path, values: bool):
        self.values, sources = values, find_sources(root, self.labels)
        folders = {p.name for s in sources for p in s.labels.iterdir() if p.is_dir()}
        flat = [p for s in sources for p in s.labels.glob("*.png")]
        if folders and flat:
            raise UserError(f"{flat[0]} lies beside folders of classes: give either kind of masks")
        if values and not folders:
            raise UserError(f"{root}: --objects values is for masks in folders, masks/CLASS/NAME.png")
        self.by_folder = bool(folders)
        self.names = sorted(folders) if folders else class_names(root)

    def check(self, source: Source) -> None:
        """Raise UserError where a mask has no image."""
        stems = {p.relative_to(source.images).with_suffix("") for p in source.pictures()}
        within = [p.relative_to(source.labels).with_suffix("") for p in source.labels.rglob("*.png")]
        require_images(source, [Path(*p.parts[1:]) if self.by_folder else p for p in within], stems)

    def objects(self, source: Source, picture: Path, width: int, height: int) -> Iterator[dict]:
        """Annotations of an image: `category_id`, `bbox`, `area` and `segmentation`."""
        name = picture.relative_to(source.images).with_suffix(".png")
        for number, kind in enumerate(self.names, 1):
            path = source.labels / kind / name if self.by_folder else source.labels / name
            if not path.is_file():
                continue
            mask = self._read(path, width, height)
            if not self.by_folder:
                if mask.max() > len(self.names):
                    raise UserError(f"{path} has the value {mask.max()}, of {len(self.names)} classes")
                mask = mask == number
            for region in self._regions(mask):
                rle = as_json(mask_util.encode(np.asfortranarray(region)))
                box, area = bounding_box(rle, height, width), mask_area(rle, height, width)
                yield {"category_id": number, "bbox": box, "area": area, "segmentation": rle}

    def _read(self, path: Path, width: int, height: int) -> np.ndarray:
        mask = read_pixels(path)
        rows, columns = mask.shape[:2]
        if (rows, columns) != (height, width):
            raise UserError(f"{path} is {columns} x {rows} pixels, its image {width} x {height}")
        if mask.ndim == 3 and not self.by_folder:
            raise UserError(f"{path} is a colour image: the values of a mask count the classes")
        return mask[..., :3].max(-1) if mask.ndim == 3 else mask

    def _regions(self, mask: np.ndarray) -> Iterator[np.ndarray]:
        """Masks of the objects, uint8 of the mask's shape."""
        if self.values:
            numbered, labels = mask, np.unique(mask[mask > 0])
        else:
            count, numbered = cv2.connectedComponents((mask > 0).astype(np.uint8))
            labels = range(1, count)
        for label in labels:
            yield (numbered == label).astype(np.uint8)
