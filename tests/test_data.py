"""What the official dataset gets: objects of every format, prompts, and negatives."""

import json
import pickle
import random
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from coco_files import HEIGHT, SQUARE, WIDTH, annotation, compressed, example, write
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from torch.utils.data import DataLoader

from sam3.train.data.coco_json_loaders import COCO_FROM_JSON
from sam3.train.transforms.filter_query_transforms import FilterEmptyTargets, FlexibleFilterFindGetQueries
from sam3.train.transforms.segmentation import DecodeRle
from sam3_lora_wrapper.dataset.image_files import open_image
from sam3_lora_wrapper.dataset.loader import CocoDataset, CocoPrompts
from sam3_lora_wrapper.dataset.mask_resize import resize_mask
from sam3_lora_wrapper.dataset.prompts import check_prompts, foreign_to, texts_of
from sam3_lora_wrapper.dataset.splits import split_folder
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.launch import compose_config, drop_missing_validation


def prompts_of(folder: Path, **options) -> CocoPrompts:
    return CocoPrompts(str(folder / "_annotations.coco.json"), str(folder), **options)


def dataset(folder: Path, transforms: list, **options) -> CocoDataset:
    return CocoDataset(
        img_folder=str(folder), ann_file=str(folder / "_annotations.coco.json"), transforms=transforms,
        max_ann_per_img=10**6, multiplier=1, training=True, load_segmentation=True, max_train_queries=10**6,
        coco_json_loader=partial(CocoPrompts, img_folder=str(folder), **options),
    )


def many_classes(folder: Path, classes: int) -> Path:
    """A split whose first image shows the first three of many classes, the second the rest."""
    coco = example()
    coco["categories"] = [{"id": c, "name": f"class {c:04d}"} for c in range(1, classes + 1)]
    coco["annotations"] = [annotation(c, image=1 if c < 4 else 2, category=c) for c in range(1, classes + 1)]
    write(folder, coco)
    return folder


def test_every_format_gives_the_mask_and_box_of_pycocotools(tmp_path: Path) -> None:
    path = write(tmp_path, example())
    truth = COCO(str(path))
    datapoints = dataset(tmp_path, [DecodeRle()])
    objects = datapoints[0].images[0].objects
    assert len(objects) == 4
    for made, raw in zip(objects, truth.loadAnns([1, 2, 3, 4])):
        x, y, w, h = raw["bbox"]
        torch.testing.assert_close(made.bbox, torch.tensor([x, y, x + w, y + h]).float(), atol=1e-4, rtol=0)
        assert made.area == pytest.approx(600)
        if "segmentation" in raw:
            np.testing.assert_array_equal(made.segment.numpy(), truth.annToMask(raw))
            np.testing.assert_array_equal(made.segment.numpy(), SQUARE)
    assert objects[3].segment is None


def test_same_prompts_and_objects_as_the_official_loader(tmp_path: Path) -> None:
    path = write(tmp_path, example())
    official, own = COCO_FROM_JSON(str(path)), prompts_of(tmp_path)
    assert own.getDatapointIds() == official.getDatapointIds()
    for i in own.getDatapointIds():
        assert own.loadImagesFromDatapoint(i) == official.loadImagesFromDatapoint(i)
        for made, expected in zip(own.loadQueriesAndAnnotationsFromDatapoint(i),
                                  official.loadQueriesAndAnnotationsFromDatapoint(i), strict=True):
            assert len(made) == len(expected) > 0
            for one, other in zip(made, expected):
                assert one.keys() == other.keys()
                for key in one.keys() - {"bbox"}:
                    assert one[key] == (pytest.approx(other[key]) if key == "area" else other[key])
                if "bbox" in one:
                    torch.testing.assert_close(one["bbox"], other["bbox"], atol=1e-6, rtol=0)


def test_chunks_prompt_every_category_once_an_image(tmp_path: Path) -> None:
    loader = prompts_of(many_classes(tmp_path, 11), category_chunk_size=4, multiplier=2)
    ids = loader.getDatapointIds()
    assert len(ids) == 2 * 3 * 2
    asked = Counter()
    for i in ids:
        queries, _ = loader.loadQueriesAndAnnotationsFromDatapoint(i)
        assert len(queries) <= 4
        image = loader.loadImagesFromDatapoint(i)[0]["original_img_id"]
        asked.update((image, q["original_cat_id"]) for q in queries)
    assert asked == {(image, c): 2 for image in (1, 2) for c in range(1, 12)}


def test_unused_parent_category_is_no_prompt(tmp_path: Path) -> None:
    coco = example()
    coco["categories"].insert(0, {"id": 0, "name": "damage"})
    write(tmp_path, coco)
    queries, _ = prompts_of(tmp_path).loadQueriesAndAnnotationsFromDatapoint(0)
    assert [q["query_text"] for q in queries] == ["crack", "dent"]


def test_small_object_of_a_large_image_stays(tmp_path: Path) -> None:
    coco = example()
    coco["images"][0] |= {"width": 8000, "height": 6000}
    coco["annotations"] = [annotation(1, bbox=[4000, 3000, 1, 1])]
    write(tmp_path, coco)
    Image.new("L", (8000, 6000)).save(tmp_path / "1.png")
    empty = FlexibleFilterFindGetQueries(query_filter=FilterEmptyTargets())
    from sam3.train.transforms.basic_for_api import RandomResizeAPI

    resize = RandomResizeAPI(sizes=96, square=True, consistent_transform=False)
    datapoint = dataset(tmp_path, [resize, empty])[0]
    assert [len(q.object_ids_output) for q in datapoint.find_queries] == [1]


def test_file_without_annotations_is_refused(tmp_path: Path) -> None:
    write(tmp_path, example() | {"annotations": []})
    with pytest.raises(UserError, match="has no annotation"):
        prompts_of(tmp_path)


def test_workers_get_a_small_copy(tmp_path: Path) -> None:
    """A process gets less than 300 bytes an annotation; as objects, they take over 1,500."""
    coco = example()
    mask = compressed(SQUARE)
    coco["annotations"] = [annotation(i, image=1 + i % 2, segmentation=mask) for i in range(1, 5001)]
    write(tmp_path, coco)
    assert len(pickle.dumps(prompts_of(tmp_path))) < 300 * 5000


# ------------------------------------------------------------ prompts


def test_prompts_replace_names_and_synonyms_are_drawn_in_training(tmp_path: Path) -> None:
    write(tmp_path, example())
    prompts = OmegaConf.create({"crack": ["a crack in concrete", "fissure"], "dent": " a dent "})
    validation = prompts_of(tmp_path, prompts=prompts)
    training = prompts_of(tmp_path, prompts=prompts, synonyms=True)
    random.seed(0)
    texts = [tuple(q["query_text"] for q in loader.loadQueriesAndAnnotationsFromDatapoint(0)[0])
             for loader in [validation] * 20 + [training] * 40]
    assert set(texts[:20]) == {("a crack in concrete", "a dent")}
    drawn = Counter(texts[20:])
    assert drawn.keys() == {("a crack in concrete", "a dent"), ("fissure", "a dent")} and min(drawn.values()) >= 10


@pytest.mark.parametrize("prompts, message", [
    ({"crak": "x"}, "no category 'crak'. There are: crack, dent"),
    ({"crack": ""}, "'crack': '' is not a text"),
    ({"crack": []}, r"'crack': \[\] is not a text"),
    ({"crack": 3}, "'crack': 3 is not a text"),
    ({"crack": "Dent"}, "'dent' is a text of both 'crack' and 'dent'"),
    ({"crack": ["a", "b"], "dent": ["c", "B"]}, "'B' is a text of both"),
])
def test_prompts_that_cannot_be_meant_are_refused(prompts: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"data.prompts: {message}"):
        check_prompts(["crack", "dent"], prompts)
    check_prompts(["crack", "dent"], {"crack": ["crack", "fissure"]})


def test_prompts_are_never_run_as_code() -> None:
    assert texts_of("crack", {"crack": "__import__('os')._exit(1)"}) == ["__import__('os')._exit(1)"]


# ------------------------------------------------------------ negatives


@pytest.mark.parametrize("classes", [80, 1200])
def test_negatives_are_bounded_and_positives_are_kept(tmp_path: Path, classes: int) -> None:
    loader = prompts_of(many_classes(tmp_path, classes), max_negatives=5, max_foreign=2,
                        foreign_negatives=["zebra", "harp", "igloo"])
    seen = Counter()
    for _ in range(50):
        queries, objects = loader.loadQueriesAndAnnotationsFromDatapoint(0)
        shown = [q for q in queries if q["object_ids_output"]]
        assert [q["original_cat_id"] for q in shown] == [1, 2, 3] and len(objects) == 3
        assert len(queries) == 3 + 5 + 2
        assert [q["id"] for q in queries] == list(range(10))
        seen.update(q["query_text"] for q in queries if not q["object_ids_output"])
    assert {"zebra", "harp", "igloo"} <= seen.keys()
    assert len(seen) > 60
    # All categories of an image are prompts for it, however low the bound.
    queries, _ = loader.loadQueriesAndAnnotationsFromDatapoint(1)
    assert sum(bool(q["object_ids_output"]) for q in queries) == classes - 3


def test_one_class_has_foreign_negatives(tmp_path: Path) -> None:
    coco = example()
    coco["categories"], coco["annotations"] = coco["categories"][:1], coco["annotations"][:4]
    write(tmp_path, coco)
    words = ["zebra", "crack", "harp", "rack"]
    loader = prompts_of(tmp_path, max_negatives=8, max_foreign=3, foreign_negatives=words)
    for image, shown in ((0, {"crack"}), (1, set())):
        queries, _ = loader.loadQueriesAndAnnotationsFromDatapoint(image)
        texts = {q["query_text"] for q in queries if q["object_ids_output"]}
        assert texts == shown
        assert {q["query_text"] for q in queries} - texts == {"zebra", "harp"} | ({"crack"} - shown)


def test_foreign_words_that_may_be_shown_are_not_used() -> None:
    assert foreign_to(["zebra", "Harp", "dent"], ["zebra crossing", "a harp"]) == ["dent"]
    assert foreign_to(["sea horse"], ["horse"]) == []


def queries_of_an_epoch(folder: Path, seed: int) -> list[str]:
    datapoints = dataset(folder, [], max_negatives=3, max_foreign=1, foreign_negatives=["zebra", "harp", "igloo"])
    random.seed(seed)
    torch.manual_seed(seed)
    loader = DataLoader(datapoints, batch_size=1, num_workers=1, shuffle=True, collate_fn=list)
    return [q.query_text for _ in range(3) for batch in loader for q in batch[0].find_queries]


def test_negatives_follow_the_seed_in_workers(tmp_path: Path) -> None:
    many_classes(tmp_path, 30)
    first = queries_of_an_epoch(tmp_path, 1)
    assert first == queries_of_an_epoch(tmp_path, 1)
    assert first != queries_of_an_epoch(tmp_path, 2)


# ------------------------------------------------------------ configuration


def test_configured_datasets_read_their_splits(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "train", example())
    write(tmp_path / "val", example(), seed=1)
    cfg = compose_config("lora_tiny", [
        f"paths.dataset_root={tmp_path}", "data.prompts={crack: [fissure, gap]}",
        "data.foreign_negatives=[zebra]", "data.max_foreign=1",
    ])
    trainer = cfg.trainer
    for split in ("train", "val"):
        made = instantiate(trainer.data[split].dataset)
        assert len(made) == 2
        texts = [q.query_text for q in made[0].find_queries]
        assert texts[0] in ({"fissure", "gap"} if split == "train" else {"fissure"})
        assert texts[1:] == ["dent", "zebra"] if split == "train" else ["dent"]
        pickle.dumps(made)


def test_configured_training_takes_more_categories_than_upstreams_limit(tmp_path: Path) -> None:
    """Beyond 81 prompts an image, upstream's default gives up after a hundred attempts."""
    many_classes(tmp_path / "train", 100)
    cfg = compose_config("lora_tiny", [f"paths.dataset_root={tmp_path}", "data.max_foreign=0"])
    made = instantiate(cfg.trainer.data.train.dataset)
    assert [len(made[i].find_queries) for i in (0, 1)] == [3 + 8, 97 + 3]


def test_other_layout_by_configuration(tmp_path: Path) -> None:
    write(tmp_path / "pictures", example())
    (tmp_path / "pictures" / "_annotations.coco.json").rename(tmp_path / "train.json")
    cfg = compose_config("lora_tiny", [
        f"paths.dataset_root={tmp_path}", f"data.train_images={tmp_path}/pictures",
        f"data.train_annotations={tmp_path}/train.json",
    ])
    assert len(instantiate(cfg.trainer.data.train.dataset)) == 2


def test_validation_folder_is_valid_or_val_or_none(tmp_path: Path) -> None:
    assert split_folder(str(tmp_path), ["valid", "val"]) is None
    (tmp_path / "val").mkdir()
    assert split_folder(str(tmp_path), ["valid", "val"]) == str(tmp_path / "val")
    (tmp_path / "valid").mkdir()
    assert split_folder(str(tmp_path), ["valid", "val"]) == str(tmp_path / "valid")
    assert split_folder(str(tmp_path), "typo") == str(tmp_path / "typo")


@pytest.mark.parametrize("overrides, kept", [
    ([], False), (["data.val=null"], False), (["data.valid_folder=x"], True),
])
def test_run_without_validation_split_says_so(tmp_path: Path, caplog, overrides: list, kept: bool) -> None:
    write(tmp_path / "train", example())
    cfg = compose_config("lora_tiny", [f"paths.dataset_root={tmp_path}", *overrides])
    drop_missing_validation(cfg.trainer)
    assert (cfg.trainer.data.val is not None) == kept == (cfg.trainer.meters is not None)
    assert ("the run trains without validation" in caplog.text) != kept
    OmegaConf.to_container(cfg.trainer, resolve=False)


def test_images_are_opened_upright(tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(HEIGHT * WIDTH * 3, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3))
    for orientation, turn in ((3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90),
                              (8, Image.Transpose.ROTATE_270)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.transpose(turn).save(tmp_path / "x.png", exif=exif)
        np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "x.png")), np.asarray(picture))


def test_missing_image_or_folder_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder. Is paths.dataset_root right?"):
        prompts_of(tmp_path / "train")
    coco = example()
    coco["images"][1]["file_name"] = "gone.png"
    path = write(tmp_path, coco)
    with pytest.raises(UserError, match="error: image is missing: 1\n    images.1., id 2, 'gone.png': left out"):
        prompts_of(tmp_path)
    assert json.loads(path.read_text()) == coco


@pytest.mark.parametrize("orientation", range(1, 9))
def test_training_sees_images_upright(tmp_path: Path, orientation: int) -> None:
    write(tmp_path, example())
    upright = open_image(tmp_path / "1.png")
    # The stored pixels are those that the orientation turns back.
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright.transpose(Image.Transpose(back[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "1.png", exif=exif)
    datapoint = dataset(tmp_path, [DecodeRle()])[0]
    np.testing.assert_array_equal(np.asarray(datapoint.images[0].data), np.asarray(upright))
    np.testing.assert_array_equal(datapoint.images[0].objects[0].segment.numpy(), SQUARE)


def test_image_that_cannot_be_read_stops_the_run(tmp_path: Path) -> None:
    write(tmp_path, example())
    datapoints = dataset(tmp_path, [])
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:2000])
    with pytest.raises(UserError, match="1.png cannot be read as an image"):
        datapoints[0]


@pytest.mark.parametrize("size, target", [((120, 90), (96, 96)), ((64, 80), (200, 160)), ((100, 100), (100, 100)),
                                          ((333, 57), (40, 41))])
def test_masks_are_resized_as_torchvision_does(size: tuple, target: tuple) -> None:
    generator = np.random.default_rng(0)
    masks = [np.zeros(size), np.ones(size)]
    for _ in range(12):
        outline = (generator.random((5, 2)) * size[::-1] * 1.2 - 5).round(1)
        masks.append(mask_util.decode(mask_util.merge(mask_util.frPyObjects([outline.ravel().tolist()], *size))))
    for mask in map(torch.from_numpy, (m.astype(np.uint8) for m in masks)):
        expected = torchvision.transforms.functional.resize(mask[None, None], list(target)).squeeze()
        assert torch.equal(resize_mask(mask, *target), expected)
