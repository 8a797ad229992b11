"""Pictures of a validation, truth beside prediction, and the images that it did best and worst on."""

import json
import random
from collections import defaultdict
from pathlib import Path

import torch
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.utils import make_grid

from sam3_lora_wrapper.dataset.coco import load_coco
from sam3_lora_wrapper.dataset.contact_sheet import draw_tile
from sam3_lora_wrapper.dataset.image_files import open_image
from sam3_lora_wrapper.evaluation.metrics import FIRES, match


class Validation:
    """What a validation saw and what the model said.

    Args:
        ann_file: COCO JSON of the ground truth.
        img_folder: folder of its images.
        dumped_file: JSON of predictions by the official dumper.
        kind: `bbox` or `segm`.
    """

    def __init__(self, ann_file: str, img_folder: str, dumped_file: str | Path, kind: str):
        self.folder, self.dumped_file, self.kind = Path(img_folder), dumped_file, kind
        self.content = load_coco(ann_file, img_folder)
        self.images = {i["id"]: i for i in self.content["images"]}
        self.names = {c["id"]: c["name"] for c in self.content["categories"]}

    def sheet(self, image_ids: list[int]) -> Tensor:
        """Pictures below one another, truth on the left, uint8 of shape (3, height, width)."""
        truth, given = defaultdict(list), defaultdict(list)
        for annotation in self.content["annotations"]:
            truth[annotation["image_id"]].append(annotation)
        for prediction in json.loads(Path(self.dumped_file).read_bytes()):
            if prediction["score"] >= FIRES and prediction["category_id"] in self.names:
                given[prediction["image_id"]].append(prediction)
        tiles = []
        for i in image_ids:
            picture = open_image(self.folder / self.images[i]["file_name"])
            tiles += [draw_tile(picture, self.images[i], drawn[i], self.names) for drawn in (truth, given)]
        return make_grid(torch.stack(tiles), nrow=2, padding=4, pad_value=255)

    def sample(self, count: int, seed: int = 0) -> list[int]:
        """Ids of images drawn at random, the same for the same seed."""
        return random.Random(seed).sample(sorted(self.images), min(count, len(self.images)))

    def ranking(self) -> list[tuple[int, float]]:
        """Ids of the images that show or were said to show objects, with their F1, best first."""
        scores = image_f1(match(self.content, self.dumped_file, self.kind))
        return sorted(scores.items(), key=lambda item: -item[1])


def image_f1(evaluation: COCOeval) -> dict[int, float]:
    """F1 of each image at IoU 0.5, of the predictions that count as given.

    An image without objects on which nothing was given has none.
    """
    counts = defaultdict(lambda: torch.zeros(3))
    for entry in evaluation.evalImgs:
        if entry is not None and entry["aRng"] == evaluation.params.areaRng[0]:
            ignored = torch.from_numpy(entry["dtIgnore"][0]).bool()
            given = (torch.tensor(entry["dtScores"]) >= FIRES) & ~ignored
            found = given & torch.from_numpy(entry["dtMatches"][0] > 0)
            objects = torch.as_tensor(entry["gtIgnore"]) == 0
            counts[int(entry["image_id"])] += torch.stack([found.sum(), given.sum(), objects.sum()])
    return {i: (2 * found / (given + objects)).item()
            for i, (found, given, objects) in counts.items() if given + objects > 0}
