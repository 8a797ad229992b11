"""Metrics of a validation, against pycocotools run directly, against hand counts and the processor."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam3.model.sam3_image_processor import Sam3Processor
from sam3_lora_wrapper.adapters import Lora
from sam3_lora_wrapper.base import build_base
from sam3_lora_wrapper.config import LoraConfig
from sam3_lora_wrapper.dataset.coco import load_coco
from sam3_lora_wrapper.dataset.image_files import open_image
from sam3_lora_wrapper.dataset.loader import CocoPrompts
from sam3_lora_wrapper.dataset.segmentations import to_rle
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.evaluation.metrics import CocoEvaluator, average_precision, check_metric, concept_f1, match
from sam3_lora_wrapper.evaluation.retention import AbsentPrompts
from sam3_lora_wrapper.launch import compose_config
from sam3_lora_wrapper.synthetic import BASE, write_dataset

SIZE = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), BASE, train=1, valid=6, seed=3) / "valid"


@pytest.fixture(scope="module")
def dumped(folder, tmp_path_factory) -> Path:
    """Predictions as the dumper writes them: objects moved by up to 3 pixels, and false ones."""
    rng = np.random.default_rng(0)
    predictions = []
    for a in json.loads((folder / "_annotations.coco.json").read_text())["annotations"]:
        for category, shift in ((a["category_id"], rng.integers(-3, 4, 2)), (1 + a["category_id"] % 4, (0, 0))):
            x, y, w, h = a["bbox"]
            box = [float(x + shift[0]), float(y + shift[1]), float(w), float(h)]
            corners = [[box[0], box[1], box[0] + w, box[1], box[0] + w, box[1] + h, box[0], box[1] + h]]
            rle = to_rle(corners, SIZE, SIZE)
            predictions.append({
                "image_id": a["image_id"], "category_id": category, "score": round(float(rng.uniform()), 5),
                "bbox": box, "segmentation": {"size": [SIZE, SIZE], "counts": rle["counts"].decode()},
            })
    path = tmp_path_factory.mktemp("dump") / "coco_predictions_segm.json"
    path.write_text(json.dumps(predictions))
    return path


def evaluate(folder: Path, dumped: Path) -> dict[str, float]:
    return CocoEvaluator(str(folder / "_annotations.coco.json"), str(folder), masks=True).evaluate(dumped)


def pycocotools(folder: Path, dumped: Path, kind: str, categories: list[int] | None = None) -> np.ndarray:
    """The twelve numbers of pycocotools, as its own demonstration gets them."""
    truth = COCO(str(folder / "_annotations.coco.json"))
    evaluation = COCOeval(truth, truth.loadRes(str(dumped)), kind)
    evaluation.params.catIds = categories or evaluation.params.catIds
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("name, kind", [("box", "bbox"), ("mask", "segm")])
def test_average_precision_is_that_of_pycocotools_on_the_dumped_file(folder, dumped, name, kind) -> None:
    ours, stats = evaluate(folder, dumped), pycocotools(folder, dumped, kind)
    assert 0.1 < stats[0] < 0.9
    for metric, value in zip(("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"), stats):
        assert ours[f"{name}_{metric}"] == pytest.approx(value, abs=1e-6)
    for number, concept in enumerate(BASE.concepts, 1):
        alone = pycocotools(folder, dumped, kind, [number])[0]
        if alone > -1:
            assert ours[f"{name}_AP/{concept}"] == pytest.approx(alone, abs=1e-6)
    assert "box_AP/shapes" not in ours


def test_evaluating_twice_gives_plain_floats_and_the_same(folder, dumped) -> None:
    first = evaluate(folder, dumped)
    assert first == evaluate(folder, dumped)
    assert all(type(value) is float for value in first.values())


def box_truth(boxes: list[tuple[int, int, list]], images: int) -> dict:
    """A COCO file's content of two categories: boxes are (image, category, box)."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 50} for i in range(1, images + 1)],
        "categories": [{"id": 1, "name": "crack"}, {"id": 2, "name": "dent"}],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for n, (i, c, box) in enumerate(boxes, 1)
        ],
    }


def test_cgf1_is_the_product_of_its_hand_counted_factors() -> None:
    truth = box_truth([(1, 1, [0, 0, 100, 10]), (2, 2, [0, 0, 100, 10]), (3, 1, [0, 0, 100, 10])], images=3)
    given = [
        (1, 1, [0, 0, 82, 10], 0.9),    # IoU 0.82: right at 7 of the 10 thresholds
        (1, 2, [0, 0, 50, 10], 0.6),    # fires on an absent category
        (2, 2, [0, 0, 100, 10], 0.49),  # too low to count: a miss
        (3, 1, [0, 0, 100, 10], 0.5),
        (3, -1, [0, 0, 100, 10], 0.9),  # fires on a foreign word
        (1, -1, [0, 0, 100, 10], 0.1),
    ]
    predictions = [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in given]
    results = concept_f1(truth, predictions, "bbox")

    def f1(right: int) -> float:  # of 2 predictions in positive pairs, and of 3 objects
        return 2 * right / (2 + 3)

    # Three images, two categories, one foreign word: 2 true positives, 2 false positives (the absent
    # category, the word), 1 false negative, 4 true negatives.
    mcc = (2 * 4 - 2 * 1) / math.sqrt(4 * 3 * 6 * 5)
    micro = 0.7 * f1(2) + 0.3 * f1(1)
    assert results["IL_MCC"] == pytest.approx(mcc, abs=1e-6)
    assert results["positive_micro_F1"] == pytest.approx(micro, abs=2e-4)  # the evaluator adds 1e-4 to divisors
    assert results["cgF1"] == pytest.approx(micro * mcc, abs=2e-4)


def test_foreign_words_give_a_single_category_a_cgf1() -> None:
    truth = box_truth([(1, 1, [0, 0, 100, 10])], images=1)
    right = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 100, 10], "score": 0.9}
    assert concept_f1(truth, [right], "bbox")["cgF1"] == 0  # there is nothing to be negative about
    word = right | {"category_id": -1, "score": 0.1}
    assert concept_f1(truth, [right, word], "bbox")["cgF1"] == pytest.approx(1, abs=2e-4)
    assert concept_f1(truth, [right, word | {"score": 0.9}], "bbox")["cgF1"] == 0


def test_an_object_without_a_mask_counts_neither_for_nor_against(folder, dumped, tmp_path) -> None:
    content = load_coco(folder / "_annotations.coco.json", folder)
    bare = content["annotations"][0]
    without = content | {"annotations": content["annotations"][1:]}
    predictions = [p for p in json.loads(dumped.read_text()) if p["image_id"] != bare["image_id"]]
    (tmp_path / "others.json").write_text(json.dumps(predictions))
    del bare["segmentation"]
    with_bare = average_precision(match(content, tmp_path / "others.json", "segm"))
    assert with_bare == average_precision(match(without, tmp_path / "others.json", "segm"))
    boxes = average_precision(match(content, tmp_path / "others.json", "bbox"))
    assert boxes["AP"] < average_precision(match(without, tmp_path / "others.json", "bbox"))["AP"]


def test_no_prediction_at_all_is_zero_and_no_traceback(folder, tmp_path) -> None:
    (tmp_path / "none.json").write_text("[]")
    results = evaluate(folder, tmp_path / "none.json")
    assert results["box_AP"] == results["mask_AP"] == results["mask_cgF1"] == 0.0


@pytest.mark.parametrize("name, masks, good", [
    ("mask_AP", True, True), ("box_cgF1", True, True), ("mask_AP/a name", True, True), ("box_AP50", False, True),
    ("mask_AP", False, False), ("AP", True, False), ("fires_on_absent", True, False),
])
def test_best_metric_must_be_one_that_a_validation_gives(name: str, masks: bool, good: bool) -> None:
    if good:
        check_metric(name, masks)
    else:
        with pytest.raises(UserError, match=f"training.best_metric={name}: no such metric. Known: box_AP"):
            check_metric(name, masks)


# ------------------------------------------------------------ retention


def test_validation_asks_each_foreign_word_once_of_each_image(folder) -> None:
    made = CocoPrompts(str(folder / "_annotations.coco.json"), str(folder), category_chunk_size=2,
                       max_foreign=None, foreign_negatives=["camel", "bagpipes", "circle"])
    asked = Counter()
    for i in made.getDatapointIds():
        image = made.loadImagesFromDatapoint(i)[0]["original_img_id"]
        asked.update((image, q["query_text"], q["original_cat_id"])
                     for q in made.loadQueriesAndAnnotationsFromDatapoint(i)[0] if q["original_cat_id"] < 0)
    words = (("camel", -1), ("bagpipes", -2))  # circle is a category
    assert asked == Counter({(image, *word): 1 for image in range(1, 7) for word in words})


@pytest.fixture(scope="module")
def adapted():
    """The shipped base with an adapter that changes what it finds."""
    cfg = compose_config("lora_tiny", ["paths.dataset_root=/data"])
    lora = Lora(build_base(OmegaConf.to_container(cfg.model.base), "sam3_tiny"))
    lora.add(LoraConfig.from_dict(OmegaConf.to_container(cfg.lora)))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lora.tensors().values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return lora.model.eval()


@pytest.fixture(scope="module")
def blank(folder, tmp_path_factory) -> Path:
    """Two images whose objects the file leaves out: there the base fires on absent prompts."""
    blank = tmp_path_factory.mktemp("blank") / "valid"
    shutil.copytree(folder, blank)
    coco = json.loads((blank / "_annotations.coco.json").read_text())
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] > 2]
    (blank / "_annotations.coco.json").write_text(json.dumps(coco))
    return blank


def batches(folder: Path):
    """The first two batches of a validation, as the official dataset gives them."""
    cfg = compose_config("lora_tiny", [f"paths.dataset_root={folder.parent}", "data.num_workers=0"])
    dataset, collate = instantiate(cfg.data.val.dataset), instantiate(cfg.data.val.collate_fn)
    return cfg, [collate([dataset[i]])["detection"] for i in range(2)]


def fired(model, folder: Path, prompts: dict[str, list[str]]) -> int:
    """On how many prompts of each image the official processor finds anything."""
    processor, count = Sam3Processor(model, SIZE, "cpu", 0.5), 0
    for name, texts in prompts.items():
        state = processor.set_image(open_image(folder / name))
        count += sum(len(processor.set_text_prompt(text, state)["scores"]) > 0 for text in texts)
    return count


def test_retention_counts_what_the_official_processor_finds(blank, adapted) -> None:
    cfg, validation = batches(blank)
    coco = json.loads((blank / "_annotations.coco.json").read_text())
    categories = {a["category_id"] for a in coco["annotations"]}
    names = [i["file_name"] for i in coco["images"][:2]]
    absent = {n: [c["name"] for c in coco["categories"] if c["id"] in categories] for n in names}
    foreign = {n: list(cfg.data.foreign_validation) for n in names}

    meter = AbsentPrompts()
    with torch.no_grad():
        for batch in validation:
            meter.update(find_stages=adapted(batch), find_metadatas=batch.find_metadatas, model=adapted, batch=batch)
        results = meter.compute_synced()
        for group, prompts in (("absent", absent), ("foreign", foreign)):
            number = sum(map(len, prompts.values()))
            assert results[f"fires_on_{group}"] == pytest.approx(fired(adapted, blank, prompts) / number)
            with adapted.lora.disable_adapter() as base:
                assert results[f"fires_on_{group}_base"] == pytest.approx(fired(base, blank, prompts) / number)
    assert 0 < results["fires_on_absent_base"] < 1
    assert results["fires_on_absent"] != results["fires_on_absent_base"]


def test_retention_asks_the_base_in_the_first_validation_alone(blank, adapted) -> None:
    _, validation = batches(blank)
    meter, calls, results = AbsentPrompts(), [], []
    count = adapted.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for _ in range(2):
            meter.reset()
            batch = validation[0]
            meter.update(find_stages=adapted(batch), find_metadatas=batch.find_metadatas, model=adapted, batch=batch)
            results.append(meter.compute_synced())
    count.remove()
    assert results[0] == results[1] and len(calls) == 3
    assert adapted.lora.active == ("default",)
    assert meter.is_better(0.1, 0.2) and not meter.is_better(0.2, 0.2)
