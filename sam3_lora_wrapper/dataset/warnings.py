"""What can be trained on but may not be meant: within a split, and between splits."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable

from sam3_lora_wrapper.dataset.mend_annotations import is_key, is_number
from sam3_lora_wrapper.dataset.report import Report


def warn_of_corners(annotations: list, images: dict, report: Report) -> None:
    """Warn where boxes look like [x0, y0, x1, y1]: each ends behind its start, many outside.

    Args:
        annotations: as the file has them.
        images: state of each image (see mend.ImageState) by its id in the file.
        report: gets the warning.
    """
    seen = outside = 0
    for annotation in annotations:
        box = annotation.get("bbox") if isinstance(annotation, dict) else None
        if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
            continue
        x, y, w, h = box
        if w <= x or h <= y:
            return
        key = annotation.get("image_id")
        image = images[key].entry if is_key(key) and key in images else None
        seen += 1
        outside += image is not None and (x + w > image["width"] + 1 or y + h > image["height"] + 1)
    if outside >= max(3, 0.1 * seen):
        report.warning("boxes look like [x0, y0, x1, y1]; COCO has [x, y, width, height]",
                       f"{outside:,} of {seen:,} boxes leave their image")


def warn_of_use(coco: dict, report: Report, max_objects: int) -> None:
    """Warn of images and categories without annotations, of objects without a mask, of crowds."""
    names = {i["id"]: i["file_name"] for i in coco["images"]}
    categories = {c["id"]: c["name"] for c in coco["categories"]}
    pairs = Counter((a["image_id"], a["category_id"]) for a in coco["annotations"])
    for image in sorted(names.keys() - {i for i, _ in pairs}):
        report.warning("image without annotations: all its prompts are negative", names[image])
    for category in sorted(categories.keys() - {c for _, c in pairs}):
        report.warning("category that no annotation uses: it is no prompt", categories[category])
    for (image, category), count in pairs.items():
        if count > max_objects:
            report.warning(f"more than {max_objects} objects of a category: not prompted for in that image",
                           f"{names[image]}: {count} of {categories[category]!r}")
    bare = [a for a in coco["annotations"] if "segmentation" not in a]
    if bare and len(bare) == len(coco["annotations"]):
        report.warning("no object has a mask: train with loss=boxes", f"{len(bare):,} objects")
    else:
        for annotation in bare:
            report.warning("object without a mask, where others have one",
                           f"id {annotation['id']}, {names[annotation['image_id']]}")


def compare_splits(checked: list) -> Report:
    """What is wrong between splits: categories that differ, images that are in several.

    Args:
        checked: splits as dataset_check.check_split returns them; the first is compared with.
    """
    report = Report()
    first = checked[0]
    names = {c["name"]: c["id"] for c in first.coco["categories"]}
    for other in checked[1:]:
        theirs = {c["name"]: c["id"] for c in other.coco["categories"]}
        for name in sorted(names.keys() ^ theirs.keys()):
            has, lacks = (first, other) if name in names else (other, first)
            said = f"{name!r}: in {has.split.name}, not in {lacks.split.name}"
            report.warning("category in one split only", said)
        for name in sorted(n for n in names.keys() & theirs.keys() if names[n] != theirs[n]):
            report.warning("category with another id in another split", repr(name))
    for here, there in leaks(checked):
        report.warning("identical image in two splits: validation is not on unseen images",
                       f"{here} and {there}")
    return report


def leaks(checked: list) -> Iterable[tuple[str, str]]:
    """Pairs of files of different splits with identical content; only equal sizes are read."""
    by_size = defaultdict(list)
    for c in checked:
        for name in c.images.by_file:
            path = c.split.img_folder / name
            by_size[os.path.getsize(path)].append((c.split.name, path))
    for files in by_size.values():
        if len({split for split, _ in files}) < 2:
            continue
        seen = {}
        for split, path in files:
            digest = hashlib.sha256(path.read_bytes()).digest()
            other = seen.setdefault(digest, (split, path))
            if other[0] != split:
                yield f"{other[0]}/{other[1].name}", f"{split}/{path.name}"
