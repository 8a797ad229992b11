"""Segmentations of COCO JSON: polygons and RLE, what is wrong with one, and what follows from it."""

import math

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

# Beyond any picture: decoding such a mask, or drawing such a polygon, would fill the memory.
MAX_PIXELS = 2**28
MAX_OUTLINE = 2e6  # pixels


def to_rle(segmentation: list | dict, height: int, width: int) -> dict:
    """Compressed RLE of polygons or of either kind of RLE."""
    if isinstance(segmentation, list):
        return mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, height, width)
    return segmentation


def as_json(rle: dict) -> dict:
    """Compressed RLE as JSON holds it."""
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def bounding_box(segmentation: list | dict, height: int, width: int) -> list[float] | None:
    """[x, y, width, height] of the mask's pixels; None where it has none."""
    box = mask_util.toBbox(to_rle(segmentation, height, width)).tolist()
    return box if box[2] > 0 and box[3] > 0 else None


def mask_area(segmentation: list | dict, height: int, width: int) -> int:
    """Number of pixels of the mask."""
    return int(mask_util.area(to_rle(segmentation, height, width)))


def same_shape(one, other) -> bool:
    """Whether two sizes are one another's enlargement, up to the rounding of a pixel."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(*one, *other)


def scale_rle(rle: dict, height: int, width: int) -> dict:
    """The mask of an RLE, resized by nearest neighbour."""
    mask = Image.fromarray(mask_util.decode(to_rle(rle, *rle["size"])))
    resized = np.asarray(mask.resize((width, height), Image.Resampling.NEAREST))
    return as_json(mask_util.encode(np.asfortranarray(resized)))


def check_segmentation(segmentation, height: int, width: int) -> tuple[list | dict | None, str | None]:
    """Look at the segmentation of an annotation.

    Args:
        segmentation: what the JSON holds.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        The segmentation without what is wrong in it (None where nothing is left), and what was
        wrong (None where nothing was).
    """
    if segmentation is None or segmentation == []:
        return None, None
    if isinstance(segmentation, list):
        return _check_polygons(segmentation, height, width)
    if isinstance(segmentation, dict):
        return _check_rle(segmentation, height, width)
    return None, "segmentation is neither polygons nor RLE"


# ------------------------------------------------------------ polygons


def _check_polygons(parts: list, height: int, width: int) -> tuple[list | None, str | None]:
    if not isinstance(parts[0], (list, dict)):
        whole = _polygon_defect(parts, height, width) is None
        return ([parts] if whole else None), "polygon is a flat list, not a list of lists"
    defects = [_polygon_defect(p, height, width) for p in parts]
    good = [p for p, defect in zip(parts, defects) if defect is None]
    if good and _may_be_empty(good, height, width) and mask_area(good, height, width) == 0:
        return None, "mask without a pixel"
    return good or None, next((d for d in defects if d), None)


def _polygon_defect(points, height: int, width: int) -> str | None:
    if not isinstance(points, list) or not set(map(type, points)) <= {int, float}:
        return "polygon is not a list of numbers"
    if len(points) < 6:
        return "polygon with fewer than 3 points"
    if len(points) % 2:
        return "polygon with an odd number of coordinates"
    xs, ys = points[0::2], points[1::2]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    # The sum is for NaN, which may hide from min and max.
    if not (-1e7 < min(x0, y0) and max(x1, y1) < 1e7 and math.isfinite(sum(points))):
        return "polygon far outside the image"
    longest = len(xs) * (x1 - x0 + y1 - y0)
    if longest > MAX_OUTLINE and sum(np.abs(np.diff(v, append=v[:1])).sum() for v in (xs, ys)) > MAX_OUTLINE:
        return "polygon far outside the image"
    if x1 <= 0 or x0 >= width or y1 <= 0 or y0 >= height:
        return "polygon outside the image"
    return None


def _may_be_empty(parts: list, height: int, width: int) -> bool:
    """Whether polygons are thin, or partly outside, so that drawing them may set no pixel."""
    if sum(map(_shoelace, parts)) < 1:
        return True
    return any(min(p) < 0 or max(p[0::2]) > width or max(p[1::2]) > height for p in parts)


def _shoelace(points: list) -> float:
    """Area of a polygon that does not cross itself, in square pixels."""
    xs, ys = points[0::2], points[1::2]
    return abs(sum(x * b - a * y for x, y, a, b in zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1]))) / 2


# ------------------------------------------------------------ RLE


def _check_rle(rle: dict, height: int, width: int) -> tuple[dict | None, str | None]:
    size = rle.get("size")
    if not (isinstance(size, list) and len(size) == 2 and all(type(s) is int and s > 0 for s in size)):
        return None, "RLE without a size"
    runs = run_lengths(rle.get("counts")) if size[0] * size[1] <= MAX_PIXELS else None
    if runs is None or runs.min() < 0 or runs.sum() != size[0] * size[1]:
        return None, "RLE does not fill its size"
    if runs[1::2].sum() == 0:
        return None, "mask without a pixel"
    if size == [height, width]:
        return rle, None
    alike = same_shape(size, (height, width))
    return (scale_rle(rle, height, width) if alike else None), "RLE of another size than its image"


def run_lengths(counts) -> np.ndarray | None:
    """Run lengths, int64 of shape (runs,), of either kind of RLE; None where there are none."""
    if isinstance(counts, list):
        usable = counts and all(type(c) is int and 0 <= c <= MAX_PIXELS for c in counts)
        return np.array(counts, np.int64) if usable else None
    if not isinstance(counts, str) or not counts.isascii() or not counts:
        return None
    # Six bits a letter, from "0" on: five of the number, lowest first, and one that says it goes on.
    letters = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    last = (letters & 32) == 0
    if letters.min() < 0 or letters.max() > 63 or not last[-1]:
        return None
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    lengths = np.diff(np.append(starts, len(letters)))
    if lengths.max() > 7:
        return None
    place = np.arange(len(letters)) - np.repeat(starts, lengths)
    values = np.add.reduceat((letters & 31) << (5 * place), starts)
    values -= np.where(letters[last] & 16, np.int64(1) << (5 * lengths), 0)
    # From the fourth on, a number is the difference to the one before the last.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values
