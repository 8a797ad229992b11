"""A small COCO dataset with one object of every format, for the tests of the data."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

WIDTH, HEIGHT = 64, 48
SQUARE = np.zeros((HEIGHT, WIDTH), np.uint8)
SQUARE[10:30, 20:50] = 1


def compressed(mask: np.ndarray) -> dict:
    rle = mask_util.encode(np.asfortranarray(mask))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def uncompressed(mask: np.ndarray) -> dict:
    """Run lengths down the columns, counted here and not by pycocotools."""
    flat = np.concatenate([[0], mask.flatten(order="F"), [1 - mask.flatten(order="F")[-1]]])
    changes = np.flatnonzero(np.diff(flat))
    return {"size": list(mask.shape), "counts": np.diff(np.concatenate([[0], changes])).tolist()}


def annotation(number: int, image: int = 1, category: int = 1, **fields) -> dict:
    made = {"id": number, "image_id": image, "category_id": category, "iscrowd": 0,
            "bbox": [20, 10, 30, 20], "area": 600}
    return made | fields


def example() -> dict:
    """Two images; on the first a square in every format, on the second a polygon."""
    polygon = [[20, 10, 50, 10, 50, 30, 20, 30]]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (1, 2)],
        "categories": [{"id": i, "name": n} for i, n in ((1, "crack"), (2, "dent"))],
        "annotations": [
            annotation(1, segmentation=polygon),
            annotation(2, segmentation=compressed(SQUARE)),
            annotation(3, segmentation=uncompressed(SQUARE)),
            annotation(4),
            annotation(5, image=2, category=2, segmentation=polygon),
        ],
    }


def write(folder: Path, coco, seed: int = 0) -> Path:
    """Write a split: two images and the JSON (an object, or its text)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in (1, 2):
        Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)).save(folder / f"{i}.png")
    path = folder / "_annotations.coco.json"
    path.write_text(coco if isinstance(coco, str) else json.dumps(coco))
    return path
