"""Metrics of predictions that the official dumper wrote: COCO average precision, and SAM3's cgF1."""

import contextlib
import io
import json
import logging
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam3.eval.cgf1_eval import CGF1Evaluator
from sam3_lora_wrapper.dataset.coco import load_coco
from sam3_lora_wrapper.errors import UserError

STATS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
CONCEPT = ("cgF1", "positive_micro_F1", "IL_MCC")
FIRES = 0.5  # the score from which a prediction counts as given, here as in cgF1


def kinds_of(masks: bool) -> dict[str, str]:
    """What is evaluated: pycocotools' name of it by ours."""
    return {"box": "bbox", "mask": "segm"} if masks else {"box": "bbox"}


def check_metric(name: str, masks: bool) -> None:
    """Raise UserError unless `name` is a metric that a validation gives, to be maximised."""
    known = [f"{kind}_{metric}" for kind in kinds_of(masks) for metric in (*STATS, *CONCEPT)]
    if name.partition("/")[0] not in known:
        raise UserError(
            f"training.best_metric={name}: no such metric. Known: {', '.join(known)}, "
            "and box_AP/NAME or mask_AP/NAME for a category"
        )


def index(content: dict) -> COCO:
    """The pycocotools object of a file's content."""
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def truth_for(kind: str, content: dict) -> dict:
    """The ground truth of a kind of evaluation, its annotations copied: pycocotools changes them.

    For masks, an object that has none is a region that counts neither for nor against.
    """
    annotations = []
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        ignored = {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]], "iscrowd": 1}
        annotations.append(a | (ignored if kind == "segm" and "segmentation" not in a else {}))
    return content | {"annotations": annotations}


def match(content: dict, dumped_file: str | Path, kind: str) -> COCOeval:
    """Match predictions with the ground truth by pycocotools.

    Args:
        content: of the COCO file.
        dumped_file: JSON of predictions.
        kind: `bbox` or `segm`.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = index(truth_for(kind, content))
        # pycocotools cannot load an empty list.
        empty = not json.loads(Path(dumped_file).read_bytes())
        evaluation = COCOeval(truth, COCO() if empty else truth.loadRes(str(dumped_file)), kind)
        evaluation.evaluate()
    return evaluation


def average_precision(evaluation: COCOeval) -> dict[str, float]:
    """AP etc. of matched predictions, and `AP/NAME` of each category that has objects.

    As pycocotools, -1 stands for what has no objects to be found.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
        evaluation.summarize()
    results = dict(zip(STATS, map(float, evaluation.stats)))
    # Axes: IoU threshold, recall, category, area (first: all), detections per image (last: most).
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    for k, category in enumerate(evaluation.params.catIds):
        if (precision[:, :, k] > -1).any():
            name = evaluation.cocoGt.cats[category]["name"]
            results[f"AP/{name}"] = float(precision[:, :, k].mean())
    return results


def concept_f1(content: dict, predictions: list[dict], kind: str) -> dict[str, float]:
    """cgF1 and its two factors by the official evaluator.

    To it, a pair of an image and a prompt is an "image": it is given one for each, and so for each
    foreign word (data.CocoPrompts), without which one category that every image shows has a cgF1 of 0.
    """
    categories = {a["category_id"] for a in content["annotations"]}
    categories |= {p["category_id"] for p in predictions if p["category_id"] < 0}
    pairs = {(i["id"], c): n for n, (i, c) in enumerate(product(content["images"], categories))}
    images = product(content["images"], categories)
    truth = {
        "images": [i | {"id": n, "is_instance_exhaustive": True} for n, (i, _) in enumerate(images)],
        "categories": [{"id": 1, "name": "object"}],
        "annotations": [_of_pair(a, pairs) for a in truth_for(kind, content)["annotations"]],
    }
    # The evaluator leaves out what scores below too, but only after taking its IoU.
    given = [_of_pair(p, pairs) for p in predictions
             if p["score"] >= FIRES and (p["image_id"], p["category_id"]) in pairs]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        files = [Path(folder) / name for name in ("truth.json", "predictions.json")]
        for file, values in zip(files, (truth, given)):
            file.write_text(json.dumps(values))
        with np.errstate(invalid="ignore"):  # 0 / 0 in a metric that is not used here
            results = CGF1Evaluator(str(files[0]), kind).evaluate(str(files[1]))
    return {name: results[f"cgF1_eval_{kind}_{name}"] for name in CONCEPT}


def _of_pair(entry: dict, pairs: dict) -> dict:
    return entry | {"image_id": pairs[entry["image_id"], entry["category_id"]], "category_id": 1}


class CocoEvaluator:
    """Box metrics, and mask metrics where masks are trained.

    Args:
        ann_file: COCO JSON of the ground truth.
        img_folder: folder of its images.
        masks: whether to evaluate masks too.
    """

    def __init__(self, ann_file: str, img_folder: str, masks: bool):
        self.ann_file, self.img_folder = ann_file, img_folder
        self.kinds = kinds_of(masks)

    def evaluate(self, dumped_file: str | Path) -> dict[str, float]:
        """Evaluate a file of predictions; returns e.g. `box_AP`, `mask_AP/NAME`, `mask_cgF1`."""
        content = load_coco(self.ann_file, self.img_folder)
        predictions = json.loads(Path(dumped_file).read_bytes())
        results = {}
        for name, kind in self.kinds.items():
            metrics = average_precision(match(content, dumped_file, kind))
            metrics |= concept_f1(content, predictions, kind)
            results |= {f"{name}_{metric}": value for metric, value in metrics.items()}
        logging.info(", ".join(f"{k} {v:.3f}" for k, v in results.items() if k.endswith(("_AP", "_cgF1"))))
        return results
