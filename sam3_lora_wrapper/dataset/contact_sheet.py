"""Pictures of a dataset: sampled images with their boxes and masks, and how many objects there are."""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from pycocotools import mask as mask_util
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from sam3_lora_wrapper.dataset.image_files import open_image
from sam3_lora_wrapper.dataset.segmentations import to_rle
from sam3_lora_wrapper.predictor import COLOURS

TILE = 320  # pixels
SHOWN = 40  # categories in the plot


def draw_sheet(coco: dict, folder: Path, path: Path, count: int = 16, seed: int = 0) -> None:
    """Write a sheet of sampled images with their annotations drawn.

    Args:
        coco: mended view of a split.
        folder: of its images.
        path: of the picture.
        count: number of images.
        seed: of the sample.
    """
    images = random.Random(seed).sample(coco["images"], min(count, len(coco["images"])))
    if not images:
        return
    by_image = {image["id"]: [] for image in images}
    for annotation in coco["annotations"]:
        if annotation["image_id"] in by_image:
            by_image[annotation["image_id"]].append(annotation)
    names = {c["id"]: c["name"] for c in coco["categories"]}
    tiles = [draw_tile(open_image(folder / i["file_name"]), i, by_image[i["id"]], names) for i in images]
    to_pil_image(make_grid(torch.stack(tiles), nrow=4, padding=4, pad_value=255)).save(path)


def draw_tile(picture: Image.Image, image: dict, annotations: list, names: dict) -> torch.Tensor:
    """One image with its annotations or predictions, uint8 of shape (3, TILE, TILE).

    Args:
        picture: the image.
        image: its entry of the COCO JSON.
        annotations: what to draw, with a `score` where they are predictions.
        names: of the categories by id, in the order of their colours.
    """
    small = ImageOps.contain(picture, (TILE, TILE))
    pixels = pil_to_tensor(small)
    if annotations:
        by_x, by_y = small.width / image["width"], small.height / image["height"]
        order = list(names)
        colours = [COLOURS[order.index(a["category_id"]) % len(COLOURS)] for a in annotations]
        masks = torch.stack([_mask(a, image, small.size) for a in annotations])
        pixels = draw_segmentation_masks(pixels, masks, alpha=0.4, colors=colours)
        boxes = [[x * by_x, y * by_y, (x + w) * by_x, (y + h) * by_y]
                 for x, y, w, h in (a["bbox"] for a in annotations)]
        labels = [names[a["category_id"]] + (f" {a['score']:.2f}" if "score" in a else "") for a in annotations]
        pixels = draw_bounding_boxes(pixels, torch.tensor(boxes), labels, colours, width=2, label_colors="black",
                                    label_background_colors=colours, fill_labels=True)
    return pil_to_tensor(ImageOps.pad(to_pil_image(pixels), (TILE, TILE), color="white"))


def _mask(annotation: dict, image: dict, size: tuple[int, int]) -> torch.Tensor:
    """The mask of an annotation at another size (width, height); empty where it has none."""
    if "segmentation" not in annotation:
        return torch.zeros(size[::-1], dtype=torch.bool)
    mask = mask_util.decode(to_rle(annotation["segmentation"], image["height"], image["width"]))
    return torch.from_numpy(np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))).bool()


def draw_counts(splits: dict[str, dict], path: Path) -> None:
    """Write a plot of the number of objects of each category.

    Args:
        splits: mended view of each split by its name.
        path: of the picture.
    """
    counts = {}
    for split, coco in splits.items():
        names = {c["id"]: c["name"] for c in coco["categories"]}
        counts[split] = Counter(names[a["category_id"]] for a in coco["annotations"])
    total = sum(counts.values(), Counter())
    shown = [name for name, _ in total.most_common(SHOWN)][::-1]
    figure = Figure(figsize=(7, 1.5 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(counts)
    for i, (split, count) in enumerate(counts.items()):
        colour = [c / 255 for c in COLOURS[i % len(COLOURS)]]
        axes.barh([row - i * height for row in range(len(shown))], [count[n] for n in shown], height,
                  label=split, color=colour)
    axes.set_yticks(range(len(shown)), shown)
    few = len(total) <= SHOWN
    axes.set_xlabel("objects" if few else f"objects; the {SHOWN} most frequent of {len(total)} categories")
    axes.legend()
    figure.savefig(path, dpi=120)
