"""COCO JSON for the official dataset: reading it, and turning categories into prompts."""

import json
import random
from functools import lru_cache
from pathlib import Path

from sam3.train.data.coco_json_loaders import COCO_FROM_JSON
from sam3.train.data.collator import collate_fn_api, collate_fn_api_with_chunking

from .errors import UserError


def collate_fn(batch, num_chunks: int, **kwargs):
    """Collate a batch for the official trainer: one batch, or a list of `num_chunks` of them."""
    if num_chunks == 1:
        return collate_fn_api(batch, **kwargs)
    return collate_fn_api_with_chunking(batch, num_chunks, **kwargs)


def _require_fields(coco: dict, path: Path) -> None:
    """Raise UserError where an entry lacks a field that COCO prescribes."""
    fields = {
        "categories": ("id", "name"),
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("id", "image_id", "category_id", "bbox"),
    }
    for section, names in fields.items():
        if not isinstance(coco.get(section), list):
            raise UserError(f"{path} is not COCO JSON: it has no list `{section}`")
        for number, entry in enumerate(coco[section]):
            for name in names:
                if not isinstance(entry, dict) or name not in entry:
                    raise UserError(f"{path}: {section}[{number}] has no `{name}`")


@lru_cache(maxsize=8)
def load_coco(ann_file: str, img_folder: str) -> dict:
    """Read a COCO file and look whether its images are there.

    Args:
        ann_file: path of the JSON.
        img_folder: folder that the `file_name` entries are relative to.

    Raises:
        UserError: folder, file or images are missing, or the file is not COCO JSON.
    """
    path, folder = Path(ann_file), Path(img_folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Is paths.dataset_root right?")
    if not path.is_file():
        raise UserError(f"{path}: no such file. A split is a folder with its images and this file")
    try:
        coco = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(coco, dict):
        raise UserError(f"{path} is not COCO JSON: it holds no object at the top")
    _require_fields(coco, path)
    absent = [i["file_name"] for i in coco["images"] if not (folder / i["file_name"]).is_file()]
    if absent:
        raise UserError(
            f"{path} lists {len(absent)} images that are not in {folder}, first: {absent[0]}"
        )
    return coco


class CocoPrompts(COCO_FROM_JSON):
    """The official COCO loader: a prompt for every category of an image's split.

    Categories that no annotation uses (the parent category of Roboflow exports) are no prompts.

    Args:
        annotation_file: path of the JSON.
        multiplier: how often an epoch goes through the images.
        category_chunk_size: prompts per datapoint; None for all.
        max_negatives: how many categories that an image does not show are prompts for it, drawn
            anew each time; None for all. Categories that it shows always are.
    """

    def __init__(
        self,
        annotation_file: str,
        multiplier: int = 1,
        category_chunk_size: int | None = None,
        max_negatives: int | None = None,
    ):
        super().__init__(annotation_file, category_chunk_size=category_chunk_size)
        used = {a["category_id"] for d in self._raw_data for a in d["annotations"]}
        self._sorted_cat_ids = [c for c in self._sorted_cat_ids if c in used]
        size = category_chunk_size or len(self._sorted_cat_ids)
        self.category_chunks = [
            self._sorted_cat_ids[i : i + size] for i in range(0, len(self._sorted_cat_ids), size)
        ]
        self.multiplier = multiplier
        self.max_negatives = max_negatives
        for datapoint in self._raw_data:
            for annotation in datapoint["annotations"]:
                annotation.setdefault("iscrowd", 0)

    def getDatapointIds(self):
        return list(range(len(self._raw_data) * len(self.category_chunks) * self.multiplier))

    def _first_pass(self, idx: int) -> int:
        return idx % (len(self._raw_data) * len(self.category_chunks))

    def loadQueriesAndAnnotationsFromDatapoint(self, idx):
        queries, annotations = super().loadQueriesAndAnnotationsFromDatapoint(self._first_pass(idx))
        if self.max_negatives is not None:
            absent = [q["id"] for q in queries if not q["object_ids_output"]]
            kept = set(random.sample(absent, min(self.max_negatives, len(absent))))
            queries = [q for q in queries if q["object_ids_output"] or q["id"] in kept]
        return queries, annotations

    def loadImagesFromDatapoint(self, idx):
        return super().loadImagesFromDatapoint(self._first_pass(idx))
