"""The rules of COCO annotations: what is wrong with one, and how it is mended."""

import math

from sam3_lora_wrapper.dataset.report import Report
from sam3_lora_wrapper.dataset.segmentations import bounding_box, check_segmentation, mask_area

EDGE = 2.0      # pixels by which a box may leave its image: the rounding of labelling tools
SLIPPED = f"box leaves the image by at most {EDGE:g} px"
BEYOND = f"box leaves the image by more than {EDGE:g} px"
MIN_SIDE = 0.1  # pixels below which a box is taken for empty
MAX_ID = 2**53  # not every tool holds a larger whole number


def is_key(value) -> bool:
    """Whether entries can refer to another by this value."""
    return type(value) in (int, str) or type(value) is float and math.isfinite(value)


def is_id(value) -> bool:
    """Whether a value is an id as COCO, pycocotools and the official dataset need it."""
    return type(value) is int and 0 <= value < MAX_ID


def free_id(entries: list) -> int:
    """An id from which on there are ids that no entry has."""
    ids = [e["id"] for e in entries if isinstance(e, dict) and is_id(e.get("id"))]
    return 1 + max((i for i in ids if i < MAX_ID // 2), default=0)


def is_number(value) -> bool:
    """Whether a value is a finite number of a size that pixels have."""
    return type(value) in (int, float) and -1e7 < value < 1e7


def check_box(box, height: int, width: int) -> tuple[list | None, str | None]:
    """The part of a box within its image (None where there is none), and what was wrong.

    Args:
        box: what the JSON holds for [x, y, width, height], in pixels.
        height: of the image, in pixels.
        width: of the image, in pixels.
    """
    if box is None or box == []:
        return None, "box is missing"
    if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
        return None, "box is not four numbers"
    x, y, w, h = box
    if w < MIN_SIDE or h < MIN_SIDE:
        return None, "box without area"
    x0, y0, x1, y1 = max(0, x), max(0, y), min(width, x + w), min(height, y + h)
    if x1 - x0 < MIN_SIDE or y1 - y0 < MIN_SIDE:
        return None, "box outside the image"
    over = max(x0 - x, y0 - y, x + w - x1, y + h - y1)
    if over < 1e-3:
        return box, None
    return [x0, y0, x1 - x0, y1 - y0], SLIPPED if over <= EDGE else BEYOND


def scaled(annotation: dict, by_x: float, by_y: float) -> dict:
    """An annotation stretched with its image, as far as it can be read."""
    def stretch(values):
        if not isinstance(values, list) or not all(map(is_number, values)):
            return values
        return [v * (by_y if i % 2 else by_x) for i, v in enumerate(values)]

    made = annotation | {"bbox": stretch(annotation.get("bbox"))}
    if isinstance(annotation.get("segmentation"), list):
        made["segmentation"] = [stretch(part) for part in stretch(annotation["segmentation"])]
    made.pop("area", None)
    return made


class Annotations:
    """Rules for annotations.

    Args:
        images: state of each image (see mend.ImageState) by its id in the file.
        categories: entry of each category by its id in the file.
        report: gets every finding.
    """

    def __init__(self, images: dict, categories: dict, report: Report):
        self.images, self.categories, self.report = images, categories, report
        self._taken: set[int] = set()

    def reserve(self, entries: list) -> None:
        """Find the ids that are free for annotations that have none of their own."""
        self._next = free_id(entries)

    def read(self, where: str, entry: dict) -> dict | None:
        """The annotation mended, or None where it is left out."""
        image, category = (
            table.get(entry[key]) if is_key(entry.get(key)) else None
            for table, key in ((self.images, "image_id"), (self.categories, "category_id"))
        )
        if image is None:
            said = f"{where}: image {entry.get('image_id')!r}"
            return self.report.drop("annotations", "annotation of an unknown image", said)
        where = f"{where}, {image.entry['file_name']}"
        if category is None:
            said = f"{where}: category {entry.get('category_id')!r}"
            return self.report.drop("annotations", "annotation of an unknown category", said)
        mended = entry | {"image_id": image.entry["id"], "category_id": category["id"]}
        if image.scale != (1.0, 1.0):
            mended = scaled(mended, *image.scale)
        if not self._shape(mended, image.entry["height"], image.entry["width"], where):
            return None
        self._number(mended, where)
        self._crowd(mended, where)
        return mended

    def _shape(self, annotation: dict, height: int, width: int, where: str) -> bool:
        """See to mask, box and area; whether there is anything left of the object."""
        given = annotation.get("bbox")
        mask, defect = check_segmentation(annotation.pop("segmentation", None), height, width)
        box, box_defect = check_box(given, height, width)
        if box is None and mask is not None:
            box = bounding_box(mask, height, width)
        if box is None:
            kind = "object without a box or a mask" if box_defect == "box is missing" else box_defect
            self.report.drop("annotations", kind, f"{where}: {given!r}"[:300])
            return False
        if defect:
            self.report.error(defect, where, "what is wrong left out" if mask else "box kept, without a mask")
        if box_defect:
            add = self.report.fill if box_defect in ("box is missing", SLIPPED) else self.report.error
            add(box_defect, f"{where}: {given!r}"[:300], f"box {box}")
        annotation["bbox"] = box
        if mask is not None:
            annotation["segmentation"] = mask
        area = annotation.get("area")
        if not (type(area) in (int, float) and 0 < area < 1e14):
            annotation["area"] = mask_area(mask, height, width) if mask else box[2] * box[3]
            self.report.fill("area is missing", where, annotation["area"])
        return True

    def _number(self, annotation: dict, where: str) -> None:
        """See to an id of its own that is at least 1: pycocotools takes 0 for "not matched"."""
        key = annotation.get("id")
        if not is_id(key) or key == 0 or key in self._taken:
            annotation["id"], self._next = self._next, self._next + 1
            if key is None or key == 0 and 0 not in self._taken:
                self.report.fill("annotation id is missing or 0", where, annotation["id"])
            else:
                kind = "two annotations share an id" if is_id(key) else "annotation id is not a whole number"
                self.report.error(kind, where, f"numbered {annotation['id']}")
        if is_id(key):
            self._taken.add(key)

    def _crowd(self, annotation: dict, where: str) -> None:
        crowd = annotation.get("iscrowd")
        if crowd is None or crowd in (0, 1):
            if type(crowd) is not int:
                self.report.fill("iscrowd is missing", where, int(crowd or 0))
            annotation["iscrowd"] = int(crowd or 0)
        else:
            annotation["iscrowd"] = 0
            self.report.error("iscrowd is neither 0 nor 1", f"{where}: {crowd!r}"[:300], "0")
        if annotation["iscrowd"]:
            self.report.warning("crowd region: its category is no prompt for its image", where)
