"""Converters: what goes in as YOLO labels or masks comes out as the same objects in COCO JSON."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from pycocotools.coco import COCO

from sam3_lora_wrapper.convert import convert
from sam3_lora_wrapper.dataset.mask_folders import Masks
from sam3_lora_wrapper.dataset.splits import find_splits
from sam3_lora_wrapper.dataset.yolo import Yolo
from sam3_lora_wrapper.dataset_check import check_dataset
from sam3_lora_wrapper.errors import UserError

WIDTH, HEIGHT = 64, 48


def picture(path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(path, **options)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def mask(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def truth(folder: Path) -> COCO:
    return COCO(str(folder / "_annotations.coco.json"))


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """A box and a triangle in train, an image without labels in val."""
    root = tmp_path / "yolo"
    text(root / "data.yaml", "train: /elsewhere\nnames: {0: crack, 1: dent}\n")
    picture(root / "images" / "train" / "sub" / "a.jpg")
    text(root / "labels" / "train" / "sub" / "a.txt", "1 0.5 0.5 0.25 0.5\n\n0 0.25 0.25 0.75 0.25 0.75 0.75\n")
    picture(root / "images" / "val" / "b.png")
    (root / "labels" / "val").mkdir(parents=True)
    return root


def test_yolo_boxes_and_polygons(yolo: Path, tmp_path: Path) -> None:
    said = convert(yolo, tmp_path / "out", Yolo(yolo))
    assert said.endswith("train: 1 images, 2 objects; val: 1 images, 0 objects")
    assert files(tmp_path / "out") == [
        "train/_annotations.coco.json", "train/sub/a.jpg", "val/_annotations.coco.json", "val/b.png"]
    coco = truth(tmp_path / "out" / "train")
    assert coco.dataset["categories"] == [{"id": 1, "name": "crack"}, {"id": 2, "name": "dent"}]
    assert coco.dataset["images"] == [{"id": 1, "file_name": "sub/a.jpg", "width": WIDTH, "height": HEIGHT}]
    box, polygon = coco.dataset["annotations"]
    assert box == {"id": 1, "image_id": 1, "iscrowd": 0, "category_id": 2, "bbox": [24, 12, 16, 24], "area": 384}
    assert polygon["category_id"] == 1 and polygon["bbox"] == [16, 12, 32, 24]
    assert polygon["segmentation"] == [[16, 12, 48, 12, 48, 36]]
    assert polygon["area"] == coco.annToMask(polygon).sum() == pytest.approx(384, abs=20)
    checked, _ = check_dataset(find_splits(tmp_path / "out", "_annotations.coco.json"))
    assert sum(c.report.count("error") + c.report.count("filled in") for c in checked) == 0


def test_yolo_in_the_layout_of_roboflow_with_class_list(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "train" / "images" / "a.jpg")
    text(tmp_path / "in" / "train" / "labels" / "a.txt", "0 0.5 0.5 1 1")
    text(tmp_path / "in" / "classes.txt", "crack\n")
    convert(tmp_path / "in", tmp_path / "out", Yolo(tmp_path / "in"))
    assert truth(tmp_path / "out" / "train").dataset["annotations"][0]["bbox"] == [0, 0, WIDTH, HEIGHT]


def test_yolo_labels_refer_to_the_upright_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture(tmp_path / "in" / "images" / "a.jpg", exif=exif)
    text(tmp_path / "in" / "labels" / "a.txt", "0 0.5 0.5 1 0.5")
    text(tmp_path / "in" / "classes.txt", "crack\n")
    convert(tmp_path / "in", tmp_path / "out", Yolo(tmp_path / "in"))
    coco = truth(tmp_path / "out" / "train").dataset
    assert (coco["images"][0]["width"], coco["images"][0]["height"]) == (HEIGHT, WIDTH)
    assert coco["annotations"][0]["bbox"] == [0, 16, HEIGHT, 32]


@pytest.mark.parametrize("label, message", [
    ("2 0.5 0.5 1 1", "line 1: class 2 is not one of 0 to 1"),
    ("0.5 0.5 0.5 1 1", "line 1: class 0.5 is not one of 0 to 1"),
    ("0 0.5 0.5 1 1\n0 0.5 0.5", "line 2: 2 numbers: a box has 4, a polygon an even number from 6 on"),
    ("0 .1 .1 .2 .1 .2 .2 .1", "line 1: 7 numbers"),
    ("0 30 20 10 10", "line 1: coordinates are not shares"),
    ("0 nan 0.5 1 1", "line 1: coordinates are not shares"),
    ("0 a b c d", "line 1: could not convert string to float: 'a'"),
    ("\x00", "line 1: could not convert"),
])
def test_yolo_label_that_is_wrong_is_named_and_nothing_is_written(
    yolo: Path, tmp_path: Path, label: str, message: str
) -> None:
    text(yolo / "labels" / "train" / "sub" / "a.txt", label)
    with pytest.raises(UserError, match=f"labels/train/sub/a.txt, {message}"):
        convert(yolo, tmp_path / "out", Yolo(yolo))
    assert [p.name for p in tmp_path.iterdir()] == ["yolo"]


def test_yolo_dataset_that_is_wrong_is_one_message(yolo: Path, tmp_path: Path) -> None:
    text(yolo / "labels" / "train" / "sub" / "a.txt", "")
    with pytest.raises(UserError, match="labels/train and its like hold no object: nothing is written"):
        convert(yolo, tmp_path / "out", Yolo(yolo))
    text(yolo / "labels" / "val" / "lost.txt", "0 0.5 0.5 1 1")
    with pytest.raises(UserError, match="1 files have no image in .*val, first: lost"):
        convert(yolo, tmp_path / "out", Yolo(yolo))
    for content, message in (("names: 3", "`names` is not a list"), ("names: {1: a}", "`names` is not a list"),
                             ("- a", "cannot be read"), ("a: [", "cannot be read")):
        text(yolo / "data.yaml", content)
        with pytest.raises(UserError, match=message):
            Yolo(yolo)
    (yolo / "data.yaml").unlink()
    with pytest.raises(UserError, match="neither data.yaml nor classes.txt"):
        Yolo(yolo)


# ------------------------------------------------------------ masks


def two_squares() -> np.ndarray:
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[5:15, 5:25], pixels[20:40, 30:60] = 1, 2
    return pixels


def drawn(coco: COCO, category: str) -> list[np.ndarray]:
    """Masks of a category's objects, by pycocotools."""
    ids = coco.getCatIds(catNms=[category])
    return [coco.annToMask(a) for a in coco.loadAnns(coco.getAnnIds(catIds=ids))]


def test_masks_in_folders_of_classes(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "train" / "images" / "a.jpg")
    picture(tmp_path / "in" / "train" / "images" / "b.jpg")
    both = two_squares()
    mask(tmp_path / "in" / "train" / "masks" / "crack" / "a.png", (both > 0).astype(np.uint8) * 255)
    mask(tmp_path / "in" / "train" / "masks" / "dent" / "a.png", (both == 1).astype(np.uint8))
    convert(tmp_path / "in", tmp_path / "out", Masks(tmp_path / "in", values=False))
    coco = truth(tmp_path / "out" / "train")
    first, second = drawn(coco, "crack")
    np.testing.assert_array_equal(first, both == 1)
    np.testing.assert_array_equal(second, both == 2)
    np.testing.assert_array_equal(drawn(coco, "dent")[0], both == 1)
    assert [(a["bbox"], a["area"]) for a in coco.dataset["annotations"]] == [
        ([5, 5, 20, 10], 200), ([30, 20, 30, 20], 600), ([5, 5, 20, 10], 200)]
    assert len(coco.dataset["images"]) == 2
    checked, _ = check_dataset(find_splits(tmp_path / "out", "_annotations.coco.json"))
    assert checked[0].report.count("error") + checked[0].report.count("filled in") == 0


def test_touching_objects_are_told_apart_by_their_values(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "images" / "a.jpg")
    pixels = np.zeros((HEIGHT, WIDTH), np.uint16)
    pixels[:, :10], pixels[:, 10:30] = 7, 300
    mask(tmp_path / "in" / "masks" / "cell" / "a.png", pixels)
    for values, count in ((True, 2), (False, 1)):
        convert(tmp_path / "in", tmp_path / f"out{count}", Masks(tmp_path / "in", values))
        found = drawn(truth(tmp_path / f"out{count}" / "train"), "cell")
        assert len(found) == count
        np.testing.assert_array_equal(sum(found), pixels > 0)


def test_values_of_a_mask_count_the_classes(tmp_path: Path) -> None:
    root = tmp_path / "in"
    picture(root / "images" / "val" / "a.jpg")
    text(root / "classes.txt", "crack\ndent\n")
    both = two_squares()
    (root / "masks" / "val").mkdir(parents=True)
    indexed = Image.new("P", (WIDTH, HEIGHT))
    indexed.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    indexed.putdata(both.flatten().tolist())
    indexed.save(root / "masks" / "val" / "a.png")
    convert(root, tmp_path / "out", Masks(root, values=False))
    coco = truth(tmp_path / "out" / "val")
    for name, value in (("crack", 1), ("dent", 2)):
        (found,) = drawn(coco, name)
        np.testing.assert_array_equal(found, both == value)
    with pytest.raises(UserError, match="--objects values is for masks in folders"):
        Masks(root, values=True)
    text(root / "classes.txt", "crack\n")
    with pytest.raises(UserError, match="has the value 2, of 1 classes"):
        convert(root, tmp_path / "out2", Masks(root, values=False))


def test_masks_that_do_not_fit_are_named(tmp_path: Path) -> None:
    root = tmp_path / "in"
    picture(root / "images" / "a.jpg")
    mask(root / "masks" / "crack" / "a.png", two_squares()[:20])
    with pytest.raises(UserError, match="crack/a.png is 64 x 20 pixels, its image 64 x 48"):
        convert(root, tmp_path / "out", Masks(root, values=False))
    (root / "masks" / "crack" / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="crack/a.png cannot be read as an image"):
        convert(root, tmp_path / "out", Masks(root, values=False))
    mask(root / "masks" / "crack" / "b.png", two_squares())
    with pytest.raises(UserError, match="1 files have no image in .*, first: b"):
        convert(root, tmp_path / "out", Masks(root, values=False))
    mask(root / "masks" / "b.png", two_squares())
    with pytest.raises(UserError, match="lies beside folders of classes"):
        Masks(root, values=False)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_command_says_what_it_wrote_and_refuses_to_overwrite(yolo: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sam3_lora_wrapper.convert", "yolo", yolo, tmp_path / "out"]
    repository = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository)
    assert done.returncode == 0 and "train: 1 images, 2 objects" in done.stdout
    assert len(json.loads((tmp_path / "out" / "train" / "_annotations.coco.json").read_text())["annotations"]) == 2
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository)
    assert done.returncode == 1 and done.stderr == (
        f"error: {tmp_path / 'out'} is there already. Give a new folder, or remove it\n")
