"""Synthetic COCO datasets of shapes, for the tiny base model, the demo and the tests.

Two domains: `BASE` (bright shapes on dark, smooth ground) trains the tiny base model;
`SHIFTED` (striped shapes on brighter, striped ground, and one concept that the base has
never seen) is what the demo adapts it to. Folders are laid out as Roboflow exports are:
`train/` and `valid/`, each with its images and `_annotations.coco.json`.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as mask_util

SCALE = 4  # shapes are drawn larger and reduced, for smooth edges


@dataclass(frozen=True)
class Domain:
    """What the images of a dataset look like.

    Args:
        concepts: names of the shapes, which are also the text prompts.
        ground: range of grey levels of the background, in [0, 255].
        shape: range of the brightest and darkest colour channel of a shape, in [0, 255].
        striped: whether stripes cross the background and the shapes.
    """

    concepts: tuple[str, ...]
    ground: tuple[int, int]
    shape: tuple[int, int]
    striped: bool


BASE = Domain(("circle", "square", "triangle", "cross", "ring"), (10, 90), (110, 255), False)
SHIFTED = Domain(("circle", "triangle", "star", "ring"), (60, 140), (150, 255), True)


def outline(concept: str, radius: float, angle: float) -> np.ndarray:
    """Corner points of a shape around the origin, float64 of shape (n, 2), in pixels."""
    def spokes(radii):
        turns = angle + np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
        return np.stack([np.cos(turns), np.sin(turns)], 1) * np.asarray(radii)[:, None] * radius

    if concept == "cross":
        t = 0.36
        corners = [(t, 1), (t, t), (1, t), (1, -t), (t, -t), (t, -1),
                   (-t, -1), (-t, -t), (-1, -t), (-1, t), (-t, t), (-t, 1)]
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        return np.array(corners) @ turn * radius
    radii = {"square": [1.0] * 4, "triangle": [1.1] * 3, "star": [1.1, 0.55] * 5}
    return spokes(radii.get(concept, [1.0] * 40))


def texture(rng: np.random.Generator, size: int, low: int, high: int, striped: bool) -> np.ndarray:
    """A smooth, noisy and perhaps striped colour field, float64 of shape (size, size, 3)."""
    y, x = np.mgrid[:size, :size] / size
    angle, shift = rng.uniform(0, 2 * np.pi, 2)
    along = np.cos(angle) * x + np.sin(angle) * y
    field = rng.uniform(low, high, 3) + 0.25 * (high - low) * along[..., None]
    if striped:
        field += 0.3 * (high - low) * np.sign(np.sin(along * rng.uniform(25, 45) + shift))[..., None]
    return field + rng.normal(0, 6, field.shape)


def place(rng: np.random.Generator, taken: list, size: int) -> tuple[float, float, float] | None:
    """A centre and radius, in pixels, that overlap none of `taken`, or None after 30 tries."""
    for _ in range(30):
        radius = rng.uniform(0.08, 0.2) * size
        x, y = rng.uniform(radius, size - radius, 2)
        if all((x - a) ** 2 + (y - b) ** 2 > (radius + c) ** 2 for a, b, c in taken):
            return x, y, radius
    return None


def draw_mask(concept: str, points: np.ndarray, size: int) -> np.ndarray:
    """Binary mask of a shape, bool of shape (size, size)."""
    image = Image.new("L", (size * SCALE, size * SCALE))
    draw = ImageDraw.Draw(image)
    draw.polygon([tuple(p) for p in points * SCALE], fill=255)
    if concept == "ring":
        hole = points.mean(0) + 0.5 * (points - points.mean(0))
        draw.polygon([tuple(p) for p in hole * SCALE], fill=0)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX)) > 127


def segmentation_of(concept: str, points: np.ndarray, mask: np.ndarray) -> list | dict:
    """COCO segmentation: a polygon, or for the ring, which has a hole, a compressed RLE."""
    if concept != "ring":
        return [[round(float(v), 2) for v in points.flatten()]]
    rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def draw_scene(rng: np.random.Generator, domain: Domain, size: int) -> tuple[Image.Image, list]:
    """One image and its annotations (without ids), each `category_id` an index of concepts + 1."""
    pixels = texture(rng, size, *domain.ground, domain.striped)
    taken, annotations = [], []
    shown = rng.permutation(len(domain.concepts))[: rng.integers(1, 4)]
    for _ in range(rng.integers(1, 6)):
        spot = place(rng, taken, size)
        if spot is None:
            break
        taken.append(spot)
        category = int(rng.choice(shown))
        concept = domain.concepts[category]
        points = outline(concept, spot[2], rng.uniform(0, 2 * np.pi)) + spot[:2]
        points = points.clip(0, size)
        mask = draw_mask(concept, points, size)
        pixels[mask] = texture(rng, size, *domain.shape, domain.striped)[mask]
        rows, columns = np.where(mask)
        x, y = int(columns.min()), int(rows.min())
        annotations.append({
            "category_id": category + 1,
            "bbox": [x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y],
            "area": int(mask.sum()),
            "iscrowd": 0,
            "segmentation": segmentation_of(concept, points, mask),
        })
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(0.4)), annotations


def write_split(folder: Path, domain: Domain, images: int, seed: int, size: int) -> None:
    """Write `images` pictures and `_annotations.coco.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    # Roboflow puts an unused parent category first.
    names = ["shapes", *domain.concepts]
    coco = {
        "info": {"description": "synthetic shapes"},
        "categories": [{"id": i, "name": n, "supercategory": "none" if i == 0 else "shapes"}
                       for i, n in enumerate(names)],
        "images": [],
        "annotations": [],
    }
    for image_id in range(1, images + 1):
        image, annotations = draw_scene(rng, domain, size)
        name = f"{image_id:05d}.jpg"
        image.save(folder / name, quality=95)
        coco["images"].append({"id": image_id, "file_name": name, "width": size, "height": size})
        for annotation in annotations:
            annotation |= {"id": len(coco["annotations"]) + 1, "image_id": image_id}
            coco["annotations"].append(annotation)
    (folder / "_annotations.coco.json").write_text(json.dumps(coco))


def write_dataset(
    root: str | Path, domain: Domain, train: int, valid: int, seed: int = 0, size: int = 96
) -> Path:
    """Write a dataset in Roboflow's layout, the same for the same arguments.

    Args:
        root: folder that will hold `train/` and `valid/`.
        domain: what the images look like.
        train: number of training images.
        valid: number of validation images.
        seed: seed of the random generator.
        size: side of the square images, in pixels.
    """
    root = Path(root)
    write_split(root / "train", domain, train, seed, size)
    write_split(root / "valid", domain, valid, seed + 1_000_003, size)
    return root


def demo_dataset() -> str:
    """Folder of the demo's dataset (320 training and 40 validation images), written where it is absent."""
    root = Path(__file__).resolve().parent.parent / "outputs" / "demo" / "data"
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent) as folder:
            write_dataset(Path(folder) / "data", SHIFTED, train=320, valid=40)
            (Path(folder) / "data").rename(root)
    return str(root)
