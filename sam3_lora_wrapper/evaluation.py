"""COCO average precision of predictions that the official dumper wrote."""

import contextlib
import io
import json
import logging

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


class CocoEvaluator:
    """Box AP, and mask AP where masks are trained, by pycocotools.

    Args:
        gt_path: COCO JSON of the ground truth.
        masks: whether to evaluate masks too.
    """

    def __init__(self, gt_path: str, masks: bool):
        self.gt_path = gt_path
        self.kinds = {"box": "bbox", "mask": "segm"} if masks else {"box": "bbox"}

    def evaluate(self, dumped_file) -> dict[str, float]:
        """Evaluate a file of predictions; returns e.g. `box_AP`, `mask_AP50` in [0, 1]."""
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(self.gt_path)
            for annotation in truth.dataset["annotations"]:
                annotation.setdefault("iscrowd", 0)
            predictions = json.loads(open(dumped_file).read())
            results = {}
            for name, kind in self.kinds.items():
                # loadRes takes the area from the box where there is one: give it what is evaluated.
                fields = {"image_id", "category_id", "score", "bbox" if kind == "bbox" else "segmentation"}
                own = [{k: v for k, v in p.items() if k in fields} for p in predictions]
                evaluation = COCOeval(truth, truth.loadRes(own), kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
                results |= {f"{name}_{m}": float(s) for m, s in zip(METRICS, evaluation.stats)}
        logging.info(", ".join(f"{k} {v:.3f}" for k, v in results.items() if k.endswith("_AP")))
        return results
