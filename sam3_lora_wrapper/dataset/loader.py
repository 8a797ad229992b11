"""What the official dataset reads: the images of a COCO file, their prompts and their objects."""

import json
import random
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch

from sam3.train.data.collator import collate_fn_api, collate_fn_api_with_chunking
from sam3.train.data.sam3_image_dataset import Sam3ImageDataset
from sam3_lora_wrapper.dataset.coco import load_coco
from sam3_lora_wrapper.dataset.image_files import open_image
from sam3_lora_wrapper.dataset.prompts import draw, foreign_to, texts_of
from sam3_lora_wrapper.dataset.segmentations import to_rle
from sam3_lora_wrapper.errors import UserError


def collate_fn(batch, num_chunks: int, prompts_per_pass: int | None = None, **kwargs):
    """Collate a batch for the official trainer.

    Args:
        batch: datapoints.
        num_chunks: into how many forwards they are divided; with more than one the result is a list.
        prompts_per_pass: prompts of an image that form a stage, which is what the DETR sees at once; None for all.
        kwargs: arguments of upstream's collate_fn_api.
    """
    for datapoint in batch:
        for number, query in enumerate(datapoint.find_queries):
            query.query_processing_order = number // (prompts_per_pass or len(datapoint.find_queries))
        for item in (o for image in datapoint.images for o in image.objects if o.segment is not None):
            item.segment = item.segment.view(torch.bool)  # upstream would copy all masks to convert them
    if num_chunks == 1:
        return collate_fn_api(batch, **kwargs)
    return collate_fn_api_with_chunking(batch, num_chunks, **kwargs)


def group_by_image(coco: dict) -> list[bytes]:
    """For each image the JSON of [image, its annotations].

    Bytes, for loader workers receive a copy: they take a fraction of the memory of the objects.
    """
    annotations = defaultdict(list)
    for annotation in coco["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    images = sorted(coco["images"], key=lambda image: image["id"])
    return [json.dumps([image, annotations[image["id"]]]).encode() for image in images]


class CocoDataset(Sam3ImageDataset):
    """The official dataset, its images upright.

    The EXIF orientation is applied, as labelling tools and inference do, and a file that cannot
    be read stops the run: upstream would train another image in its place.
    """

    def _load_images(self, datapoint_id: int, img_ids_to_load: set[int] | None = None):
        images = [
            image for image in self.coco.loadImagesFromDatapoint(datapoint_id)
            if img_ids_to_load is None or image["id"] in img_ids_to_load
        ]
        return [(i["id"], open_image(Path(self.root) / i["file_name"])) for i in images], images


class CocoPrompts:
    """`coco_json_loader` of the official dataset: categories become text prompts.

    Categories that no annotation uses (the parent category of Roboflow exports) are no prompts.

    Args:
        annotation_file: path of the JSON.
        img_folder: folder of its images.
        prompts: texts of categories (see prompts.texts_of).
        multiplier: how often an epoch goes through the images.
        category_chunk_size: prompts per datapoint, so that an image is as many datapoints as it
            takes for all categories; None for all in one.
        synonyms: whether the text is drawn anew each time among a category's texts; else it is
            the first.
        max_negatives: how many categories that an image does not show are prompts for it, drawn
            anew each time; None for all. Categories that it shows always are.
        max_foreign: how many of `foreign_negatives` are prompts for it as well.
        foreign_negatives: words for what no image of the dataset shows. Those that contain or
            are contained in the text of a category are not used.

    Raises:
        UserError: the file cannot be used (see coco.load_coco) or has no annotation.
    """

    def __init__(
        self,
        annotation_file: str,
        img_folder: str,
        prompts: Mapping | None = None,
        multiplier: int = 1,
        category_chunk_size: int | None = None,
        synonyms: bool = False,
        max_negatives: int | None = None,
        max_foreign: int = 0,
        foreign_negatives: tuple[str, ...] = (),
    ):
        coco = load_coco(annotation_file, img_folder)
        names = {c["id"]: c["name"] for c in coco["categories"]}
        used = sorted({a["category_id"] for a in coco["annotations"]})
        if not used:
            raise UserError(f"{annotation_file} has no annotation: there is nothing to prompt for")
        self.texts = {c: texts_of(names[c], prompts or {}) for c in used}
        size = category_chunk_size or len(used)
        self.chunks = [used[i : i + size] for i in range(0, len(used), size)]
        self.rows = group_by_image(coco)
        self.multiplier, self.synonyms = multiplier, synonyms
        self.max_negatives, self.max_foreign = max_negatives, max_foreign
        self.foreign = foreign_to(foreign_negatives, [t for texts in self.texts.values() for t in texts])

    def _datapoint(self, idx: int) -> tuple[dict, list[dict], list[int]]:
        """Image, annotations and categories of a datapoint."""
        row, chunk = divmod(idx % (len(self.rows) * len(self.chunks)), len(self.chunks))
        return *json.loads(self.rows[row]), self.chunks[chunk]

    # ------------------------------------------------------------ the official dataset's interface

    def getDatapointIds(self) -> list[int]:
        """Indices of the datapoints of an epoch."""
        return list(range(len(self.rows) * len(self.chunks) * self.multiplier))

    def loadImagesFromDatapoint(self, idx: int) -> list[dict]:
        """The image of a datapoint."""
        image = self._datapoint(idx)[0]
        ids = {"original_img_id": image["id"], "coco_img_id": image["id"]}
        return [{"id": 0, "file_name": image["file_name"], **ids}]

    def loadQueriesAndAnnotationsFromDatapoint(self, idx: int) -> tuple[list[dict], list[dict]]:
        """The prompts of a datapoint, and the objects that they ask for."""
        image, annotations, categories = self._datapoint(idx)
        members = defaultdict(list)
        for annotation in annotations:
            members[annotation["category_id"]].append(annotation)
        absent = set(draw([c for c in categories if c not in members], self.max_negatives))
        queries, objects = [], []
        for category in [c for c in categories if c in members or c in absent]:
            first = len(objects)
            objects += [as_object(a, image, first + i) for i, a in enumerate(members[category])]
            texts = self.texts[category]
            text = random.choice(texts) if self.synonyms else texts[0]
            queries.append(as_query(len(queries), text, category, list(range(first, len(objects)))))
        foreign = self.foreign if categories is self.chunks[0] else []  # once for each image
        for word in draw(foreign, self.max_foreign):
            # Below 0, where no category is.
            queries.append(as_query(len(queries), word, -1 - self.foreign.index(word), []))
        return queries, objects


def as_query(number: int, text: str, category: int, objects: list[int]) -> dict:
    """A prompt as the official dataset reads it."""
    unused = ("ptr_x_query_id", "ptr_y_query_id", "input_box", "input_box_label", "input_points")
    return dict.fromkeys(unused) | {
        "id": number,
        "original_cat_id": category,
        "object_ids_output": objects,
        "query_text": text,
        "query_processing_order": 0,
        "image_id": 0,
        "is_exhaustive": True,
    }


def as_object(annotation: dict, image: dict, number: int) -> dict:
    """An annotation as the official dataset reads it: box as shares of the image, area in pixels."""
    width, height = image["width"], image["height"]
    box = torch.tensor(annotation["bbox"], dtype=torch.float32)
    mask = annotation.get("segmentation")
    return {
        "id": number,
        "object_id": number,
        "image_id": 0,
        "bbox": box / torch.tensor([width, height, width, height]),
        "area": (box[2] * box[3]).item(),
        "is_crowd": annotation["iscrowd"],
        "segmentation": None if mask is None else to_rle(mask, height, width),
    }
