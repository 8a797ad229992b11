"""The dataset check: every defect is found, mended by choice, and nothing is lost in silence."""

import copy
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from coco_files import HEIGHT, SQUARE, WIDTH, annotation, compressed, example, uncompressed, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from sam3_lora_wrapper.dataset.coco import load_coco, read_json
from sam3_lora_wrapper.dataset.mend import Images, mend
from sam3_lora_wrapper.dataset.repair import write_mended
from sam3_lora_wrapper.dataset.report import Report
from sam3_lora_wrapper.dataset.segmentations import run_lengths
from sam3_lora_wrapper.dataset.splits import Split, find_splits
from sam3_lora_wrapper.dataset_check import check_before_training, check_dataset, main
from sam3_lora_wrapper.errors import UserError

OTHER = np.zeros((HEIGHT * 2, WIDTH * 2), np.uint8)
OTHER[20:60, 40:100] = 1


def view_of(coco, folder: Path, look: str = "header") -> tuple[dict, Report]:
    report = Report(keep=None)
    return mend(coco, Images(folder, report, look), report), report


def kinds(report: Report, level: str) -> set[str]:
    return {name for name, k in report.kinds.items() if k.level == level}


def with_annotation(**fields) -> dict:
    """The example with one more annotation."""
    coco = example()
    coco["annotations"].append(annotation(9, **fields))
    return coco


def edited(edit) -> dict:
    coco = example()
    edit(coco)
    return coco


@pytest.mark.parametrize("empty", [{}, {"segmentation": []}, {"segmentation": None}])
def test_sound_file_is_left_as_it_is(tmp_path: Path, empty: dict) -> None:
    coco = example()
    coco["annotations"][3] |= empty
    write(tmp_path, coco)
    mended, report = view_of(coco, tmp_path)
    assert mended == example() and report.kinds == {}


# What an added annotation becomes: the error, and the fields after mending (None: left out).
POLYGON = [[20, 10, 50, 10, 50, 30, 20, 30]]
ANNOTATIONS = {
    "unknown image": ({"image": 7}, "annotation of an unknown image", None),
    "unknown category": ({"category": 7}, "annotation of an unknown category", None),
    "category that is a list": ({"category": [1]}, "annotation of an unknown category", None),
    "negative x": ({"bbox": [-10, 10, 30, 20]}, "box leaves the image by more than 2 px",
                   {"bbox": [0, 10, 20, 20]}),
    "beyond the right": ({"bbox": [50, 10, 30, 20]}, "box leaves the image by more than 2 px",
                         {"bbox": [50, 10, 14, 20]}),
    "outside": ({"bbox": [70, 10, 5, 5]}, "box outside the image", None),
    "outside, with a mask": ({"bbox": [70, 10, 5, 5], "segmentation": POLYGON}, "box outside the image",
                             {"bbox": [20, 10, 30, 20]}),
    "zero width": ({"bbox": [5, 5, 0, 10]}, "box without area", None),
    "negative height": ({"bbox": [5, 15, 10, -10]}, "box without area", None),
    "three numbers": ({"bbox": [5, 5, 5]}, "box is not four numbers", None),
    "text in a box": ({"bbox": [5, 5, "5", 5]}, "box is not four numbers", None),
    "NaN in a box": ({"bbox": [5, 5, float("nan"), 5]}, "box is not four numbers", None),
    "infinite box": ({"bbox": [5, 5, float("inf"), 5]}, "box is not four numbers", None),
    "no box, no mask": ({"bbox": None}, "object without a box or a mask", None),
    "2 points": ({"segmentation": [[1, 1, 9, 9]]}, "polygon with fewer than 3 points", {"segmentation": None}),
    "2 points and a good part": ({"segmentation": [[1, 1, 9, 9], *POLYGON]}, "polygon with fewer than 3 points",
                                 {"segmentation": POLYGON}),
    "odd": ({"segmentation": [[1, 1, 9, 9, 1, 9, 5]]}, "polygon with an odd number of coordinates",
            {"segmentation": None}),
    "flat list": ({"segmentation": POLYGON[0]}, "polygon is a flat list, not a list of lists",
                  {"segmentation": POLYGON}),
    "empty part": ({"segmentation": [[]]}, "polygon with fewer than 3 points", {"segmentation": None}),
    "line": ({"segmentation": [[5, 5, 30, 30, 20, 20]]}, "mask without a pixel", {"segmentation": None}),
    "polygon outside": ({"segmentation": [[70, 1, 90, 1, 90, 9]]}, "polygon outside the image",
                        {"segmentation": None}),
    "polygon far outside": ({"segmentation": [[0, 0, 5e6, 0, 5e6, 9]]}, "polygon far outside the image",
                            {"segmentation": None}),
    "text": ({"segmentation": "polygon"}, "segmentation is neither polygons nor RLE", {"segmentation": None}),
    "RLE of another shape": ({"segmentation": compressed(OTHER[:60])}, "RLE of another size than its image",
                             {"segmentation": None}),
    "RLE of twice the size": ({"segmentation": compressed(OTHER)}, "RLE of another size than its image",
                              {"segmentation": compressed(SQUARE)}),
    "RLE too short": ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [5, 9]}}, "RLE does not fill its size",
                      {"segmentation": None}),
    "RLE with negative runs": ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [-5, HEIGHT * WIDTH + 5]}},
                               "RLE does not fill its size", {"segmentation": None}),
    "RLE that is no RLE": ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "\x00~~é"}},
                           "RLE does not fill its size", {"segmentation": None}),
    "RLE of endless size": ({"segmentation": {"size": [10**9, 10**9], "counts": [10**18]}},
                            "RLE does not fill its size", {"segmentation": None}),
    "empty RLE": ({"segmentation": uncompressed(SQUARE * 0)}, "mask without a pixel", {"segmentation": None}),
    "crowd of 2": ({"iscrowd": 2}, "iscrowd is neither 0 nor 1", {"iscrowd": 0}),
    "id of another": ({"id": 5}, "two annotations share an id", {"id": 6}),
    "id that is text": ({"id": "a"}, "annotation id is not a whole number", {"id": 6}),
}


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_defect_of_an_annotation_is_an_error_and_is_mended(tmp_path: Path, name: str) -> None:
    fields, kind, mended = ANNOTATIONS[name]
    coco = with_annotation(**{k: v for k, v in fields.items() if k != "id"})
    coco["annotations"][-1] |= {k: v for k, v in fields.items() if k == "id"}
    path = write(tmp_path, coco)
    view, report = view_of(coco, tmp_path)
    assert kinds(report, "error") == {kind} and report.kinds[kind].count == 1
    assert "annotations[5]" in report.kinds[kind].examples[0]
    assert view["annotations"][:5] == example()["annotations"]
    assert len(view["annotations"]) == (5 if mended is None else 6)
    for field, value in (mended or {}).items():
        assert view["annotations"][5].get(field) == value
    with pytest.raises(UserError, match="1 error\nerror: .*: 1\n    annotations.5.") as error:
        load_coco(path, tmp_path)
    assert kind in str(error.value) and "--repair OUT" in str(error.value)


def test_what_follows_is_filled_in_and_counted(tmp_path: Path) -> None:
    coco = example()
    for field in ("iscrowd", "area"):
        del coco["annotations"][0][field], coco["annotations"][3][field]
    del coco["annotations"][1]["bbox"], coco["images"][0]["width"], coco["images"][1]["height"]
    coco["annotations"][2]["bbox"] = [20, 10, 45, 20]
    coco["annotations"][4]["id"] = 0
    path = write(tmp_path, coco)
    view, report = view_of(coco, tmp_path)
    assert report.count("error") == 0
    counted = {name: k.count for name, k in report.kinds.items()}
    assert counted == {
        "iscrowd is missing": 2, "area is missing": 2, "box is missing": 1, "width or height is missing": 2,
        "box leaves the image by at most 2 px": 1, "annotation id is missing or 0": 1,
    }
    expected = example()
    expected["annotations"][2]["bbox"] = [20, 10, 44, 20]
    # pycocotools takes a ground truth of id 0 for unmatched.
    expected["annotations"][4]["id"] = 5
    assert view == expected
    assert load_coco(path, tmp_path) == expected


IMAGES = {
    "no id": (lambda c: c["images"][1].pop("id"), "image without an id", 1),
    "missing": (lambda c: c["images"][1].update(file_name="gone.png"), "image is missing", 1),
    "way out": (lambda c: c["images"][1].update(file_name="../train/2.png"),
                "file name is missing or leads out of the folder", 1),
    "absolute": (lambda c: c["images"][1].update(file_name="/etc/passwd"),
                 "file name is missing or leads out of the folder", 1),
    "drive": (lambda c: c["images"][1].update(file_name="C:\\2.png"),
              "file name is missing or leads out of the folder", 1),
    "NUL": (lambda c: c["images"][1].update(file_name="2\0.png"),
            "file name is missing or leads out of the folder", 1),
    "another shape": (lambda c: c["images"][1].update(width=30),
                      "image of another size and shape than declared", 1),
    "same entry twice": (lambda c: c["images"].append(c["images"][1]), "image listed twice", 2),
    "two ids": (lambda c: c["images"].append(c["images"][1] | {"id": 3}), "two ids for one image", 2),
    "text id": (lambda c: (c["images"][1].update(id="2"), c["annotations"][4].update(image_id="2")),
                "image id is not a whole number", 2),
    "no object": (lambda c: c["images"].append("3.png"), "entry of images is not an object", 2),
}


@pytest.mark.parametrize("name", IMAGES)
def test_defect_of_an_image_is_an_error_and_is_mended(tmp_path: Path, name: str) -> None:
    edit, kind, left = IMAGES[name]
    coco = edited(edit)
    write(tmp_path / "train", coco)
    view, report = view_of(coco, tmp_path / "train")
    lost = {"annotation of an unknown image"} if left == 1 else set()
    assert kinds(report, "error") == {kind} | lost
    assert len(view["images"]) == left and len(view["annotations"]) == (5 if left == 2 else 4)
    assert report.unmendable == 0
    assert {a["image_id"] for a in view["annotations"]} == {i["id"] for i in view["images"]}


def test_unreadable_images_are_found(tmp_path: Path) -> None:
    write(tmp_path, example())
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:2000])
    assert kinds(view_of(example(), tmp_path)[1], "error") == set()
    assert "image cannot be read" in kinds(view_of(example(), tmp_path, "decode")[1], "error")
    (tmp_path / "2.png").write_bytes(b"not an image")
    assert "image cannot be read" in kinds(view_of(example(), tmp_path)[1], "error")


def test_annotations_are_scaled_with_an_image_of_another_size(tmp_path: Path) -> None:
    write(tmp_path, example())
    Image.new("RGB", (WIDTH * 2, HEIGHT * 2)).save(tmp_path / "1.png")
    view, report = view_of(example(), tmp_path)
    assert report.kinds["image of another size than declared"].count == 1
    for a in view["annotations"][:4]:
        assert a["bbox"] == [40, 20, 60, 40]
    truth = COCO()
    truth.dataset = view
    truth.createIndex()
    for a in view["annotations"][:3]:
        np.testing.assert_array_equal(truth.annToMask(a), OTHER)


CATEGORIES = {
    "same name": (lambda c: c["categories"].append({"id": 3, "name": " Crack"}),
                  "two categories share a name", True),
    "twice": (lambda c: c["categories"].append({"id": 2, "name": "dent"}), "category listed twice", True),
    "unused, no name": (lambda c: c["categories"].append({"id": 3, "name": " "}),
                        "category without a name", True),
    "no name": (lambda c: c["categories"][1].update(name=""), "category without a name", False),
    "same id": (lambda c: c["categories"].append({"id": 2, "name": "hole"}), "two categories share an id", False),
    "text id": (lambda c: c["categories"][1].update(id="2"), "category id is not a whole number", False),
}


@pytest.mark.parametrize("name", CATEGORIES)
def test_defect_of_a_category_is_an_error(tmp_path: Path, name: str) -> None:
    edit, kind, mendable = CATEGORIES[name]
    coco = edited(edit)
    write(tmp_path / "train", coco)
    view, report = view_of(coco, tmp_path / "train")
    assert kind in kinds(report, "error") and (report.unmendable == 0) == mendable
    if mendable:
        assert view == example()
    else:
        checked, _ = check_dataset(find_splits(tmp_path, "_annotations.coco.json"), keep=None)
        with pytest.raises(UserError, match=f"what only you can put right:\n  {kind}"):
            write_mended(checked, tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == ["train"]


def test_joined_category_takes_its_annotations_along(tmp_path: Path) -> None:
    coco = edited(lambda c: c["categories"].append({"id": 3, "name": "CRACK"}))
    coco["annotations"][3]["category_id"] = 3
    write(tmp_path, coco)
    assert view_of(coco, tmp_path)[0] == example()


# ------------------------------------------------------------ EXIF


def turned(path: Path, orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", size, "red").save(path, exif=exif)


def test_turned_image_of_its_upright_size_is_a_warning(tmp_path: Path) -> None:
    write(tmp_path, example())
    turned(tmp_path / "1.png", 6, (HEIGHT, WIDTH))
    view, report = view_of(example(), tmp_path)
    assert view == example() and report.count("error") == 0
    assert kinds(report, "warning") == {"EXIF orientation, applied when the image is loaded"}


def test_turned_image_of_its_stored_size_is_set_upright(tmp_path: Path) -> None:
    write(tmp_path / "train", example())
    turned(tmp_path / "train" / "1.png", 6, (WIDTH, HEIGHT))
    checked, _ = check_dataset(find_splits(tmp_path, "_annotations.coco.json"), keep=None)
    assert kinds(checked[0].report, "error") == {"declared size ignores the EXIF orientation"}
    write_mended(checked, tmp_path / "out")
    with Image.open(tmp_path / "out" / "train" / "1.png") as image:
        assert image.size == (WIDTH, HEIGHT) and image.getexif().get(ExifTags.Base.Orientation) is None
    again, _ = check_dataset(find_splits(tmp_path / "out", "_annotations.coco.json"))
    assert kinds(again[0].report, "error") == set() and again[0].coco == example()


# ------------------------------------------------------------ warnings


def test_corners_given_for_sizes_are_suspected(tmp_path: Path) -> None:
    coco = example()
    coco["annotations"] = [annotation(i, bbox=[5 + i, 3 + i, 50 + i, 40]) for i in range(1, 12)]
    write(tmp_path / "train", coco)
    checked, _ = check_dataset(find_splits(tmp_path, "_annotations.coco.json"))
    assert "boxes look like [x0, y0, x1, y1]; COCO has [x, y, width, height]" in kinds(checked[0].report, "warning")
    write(tmp_path / "train", example())
    checked, _ = check_dataset(find_splits(tmp_path, "_annotations.coco.json"))
    assert not any("x0" in kind for kind in checked[0].report.kinds)


def test_use_of_images_categories_and_masks_is_warned_of(tmp_path: Path) -> None:
    coco = example()
    coco["categories"].insert(0, {"id": 0, "name": "damage", "supercategory": "none"})
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] == 1]
    coco["annotations"][0]["iscrowd"] = 1
    write(tmp_path / "train", coco)
    checked, _ = check_dataset(find_splits(tmp_path, "_annotations.coco.json"), max_objects=3)
    assert {name: k.count for name, k in checked[0].report.kinds.items()} == {
        "crowd region: its category is no prompt for its image": 1,
        "image without annotations: all its prompts are negative": 1,
        "category that no annotation uses: it is no prompt": 2,
        "more than 3 objects of a category: not prompted for in that image": 1,
        "object without a mask, where others have one": 1,
    }


def test_splits_are_compared(tmp_path: Path) -> None:
    other = example()
    other["categories"] = [{"id": 2, "name": "crack"}, {"id": 1, "name": "hole"}]
    write(tmp_path / "train", example())
    write(tmp_path / "val", other, seed=1)
    (tmp_path / "val" / "2.png").write_bytes((tmp_path / "train" / "1.png").read_bytes())
    splits = find_splits(tmp_path, "_annotations.coco.json")
    _, between = check_dataset(splits)
    assert [s.name for s in splits] == ["train", "val"]
    assert {name: (k.count, k.examples[0]) for name, k in between.kinds.items()} == {
        "category in one split only": (2, "'dent': in train, not in val"),
        "category with another id in another split": (1, "'crack'"),
        "identical image in two splits: validation is not on unseen images": (1, "train/1.png and val/2.png"),
    }


# ------------------------------------------------------------ the command and the run


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "sam3_lora_wrapper.dataset_check", *map(str, arguments)],
                          capture_output=True, text=True, cwd=Path(__file__).parent.parent)


def test_command_checks_repairs_and_finds_nothing_then(tmp_path: Path, monkeypatch, capsys) -> None:
    write(tmp_path / "d" / "train", with_annotation(image=7))
    write(tmp_path / "d" / "valid", example(), seed=1)
    done = run(tmp_path / "d", "--pictures", tmp_path / "p")
    assert done.returncode == 1 and done.stderr == "error: 1 error. Write a mended copy with --repair OUT\n"
    assert "error: annotation of an unknown image: 1\n    annotations[5], id 9: image 7: left out\n" in done.stdout
    assert {p.name for p in (tmp_path / "p").iterdir()} == {
        "samples_train.png", "samples_valid.png", "class_counts.png"}
    for out in ("out", "out2"):
        monkeypatch.setattr(sys, "argv", ["check", str(tmp_path / ("d" if out == "out" else "out")),
                                          "--repair", str(tmp_path / out)])
        main()
    assert (tmp_path / "out" / "changes.txt").read_text() == (
        "train: error: annotation of an unknown image: 1\n"
        "train:     annotations[5], id 9: image 7: left out\n"
    )
    assert (tmp_path / "out2" / "changes.txt").read_text() == "nothing was changed\n"
    assert json.loads((tmp_path / "out" / "train" / "_annotations.coco.json").read_text()) == example()
    with pytest.raises(UserError, match="is there already"):
        main()


def test_run_is_stopped_by_errors_and_else_leaves_its_findings(tmp_path: Path, capsys) -> None:
    path = write(tmp_path / "train", with_annotation(image=7))
    split = Split("train", path, path.parent)
    with pytest.raises(UserError, match="annotation of an unknown image: 1"):
        check_before_training([split], {}, 200, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    write(tmp_path / "train", example())
    check_before_training([split], {"crack": "a crack"}, 200, tmp_path / "run")
    assert "train: 2 images, 5 annotations, 2 categories" in (tmp_path / "run" / "dataset_check.txt").read_text()
    with Image.open(tmp_path / "run" / "samples_train.png") as sheet:
        assert len(set(sheet.convert("RGB").resize((50, 25)).get_flattened_data())) > 50
    with pytest.raises(UserError, match="data.prompts: no category 'crak'. There are: crack, dent"):
        check_before_training([split], {"crak": "a crack"}, 200, tmp_path / "run")


@pytest.mark.parametrize("text, message", [
    ("", "is not JSON"),
    ("{", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ("[]", "is not COCO JSON: it has no list `categories`"),
    ('{"images": [], "categories": [], "annotations": {}}', "it has no list `annotations`"),
    ('{"images": [], "categories": [], "annotations": [], "images": []}', "has the key 'images' twice"),
])
def test_file_that_is_not_coco_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=message):
        read_json(path)


# ------------------------------------------------------------ RLE


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([0.02, 0.5, 0.98]))
def test_run_lengths_are_those_of_pycocotools(height: int, width: int, seed: int, share: float) -> None:
    mask = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    runs = run_lengths(compressed(mask)["counts"])
    drawn = np.repeat(np.arange(len(runs)) % 2, runs).reshape((height, width), order="F")
    np.testing.assert_array_equal(drawn, mask)


# ------------------------------------------------------------ fuzzing

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.sampled_from([2**31, 2**63, -2**63, 10**400, 1e308, 0.5]),
    st.floats(), st.text(max_size=4), st.just("\ud800"), st.sampled_from(["1.png", "../1.png", "crack", "", "é"]),
    st.lists(st.one_of(st.integers(-9, 99), st.floats(-9, 99)), max_size=9),
    st.lists(st.lists(st.floats(-1e9, 1e9), max_size=9), max_size=3),
    st.dictionaries(
        st.sampled_from(["size", "counts", "id"]),
        st.text(st.characters(max_codepoint=120), max_size=9) | st.lists(st.integers(-9, 4000), max_size=5),
        max_size=2,
    ),
)


def places(node, path=()):
    """Paths of the values below a node, of lists up to the sixth."""
    for key in range(min(6, len(node))) if isinstance(node, list) else node if isinstance(node, dict) else ():
        yield (*path, key)
        yield from places(node[key], (*path, key))


@st.composite
def mutants(draw):
    """The example with up to three values replaced, removed or repeated."""
    coco = example()
    for _ in range(draw(st.integers(1, 3))):
        *above, key = draw(st.sampled_from([p for p in places(coco)]))
        node = coco
        for step in above:
            node = node[step]
        action = draw(st.sampled_from(["replace", "replace", "remove", "repeat"]))
        if action == "remove":
            del node[key]
        elif action == "repeat" and isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        else:
            node[key] = draw(ODD)
        if not list(places(coco)):
            break
    return coco


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    write(folder, example())
    return folder


@settings(max_examples=2500, deadline=10_000, derandomize=True, suppress_health_check=list(HealthCheck))
@given(mutants())
def test_mutated_file_ends_in_findings_and_no_object_is_lost(images: Path, coco: dict) -> None:
    from sam3_lora_wrapper.dataset.loader import CocoPrompts

    path = images / "mutant.json"
    path.write_text(json.dumps(coco))
    try:
        coco = read_json(path)
    except UserError:
        return
    mended, report = view_of(coco, images)
    for section in ("categories", "images", "annotations"):
        unmended = report.unmendable if section != "annotations" else 0
        assert 0 <= len(coco[section]) - len(mended[section]) - report.left_out[section] <= unmended
    if report.unmendable == 0:
        again = view_of(json.loads(json.dumps(mended)), images)
        assert again[0] == mended and again[1].count("error") == again[1].count("filled in") == 0
    if view_of(coco, images, "exists")[1].count("error"):
        with pytest.raises(UserError, match="Write a mended copy"):
            load_coco(path, images)
    if report.count("error"):
        path.write_text(json.dumps(mended))
    if report.unmendable or not mended["annotations"]:
        return
    loader = CocoPrompts(str(path), str(images), category_chunk_size=1)
    objects = [o for i in loader.getDatapointIds() for o in loader.loadQueriesAndAnnotationsFromDatapoint(i)[1]]
    assert len(objects) == len(mended["annotations"])
    for made in objects:
        assert made["segmentation"] is None or mask_util.decode(made["segmentation"]).shape == (HEIGHT, WIDTH)
        x, y, w, h = made["bbox"].tolist()
        assert made["area"] > 0 and min(x, y) >= 0 and min(w, h) > 0 and max(x + w, y + h) <= 1.001


@settings(max_examples=300, deadline=10_000, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=3))
def test_broken_bytes_end_in_a_message_or_findings(images: Path, flips: list) -> None:
    data = bytearray(json.dumps(example()).encode())
    for where, value in flips:
        data[int(where * (len(data) - 1))] = value
    path = images / "broken.json"
    path.write_bytes(data)
    try:
        coco = read_json(path)
    except UserError:
        return
    mended, report = view_of(coco, images)
    assert len(coco["annotations"]) == len(mended["annotations"]) + report.left_out["annotations"]


# ------------------------------------------------------------ speed


def test_check_takes_a_tenth_of_its_limit_for_a_tenth_of_the_annotations(tmp_path: Path) -> None:
    """20,000 images and 200,000 annotations may take 20 s; here are 2,000 and 20,000."""
    folder = tmp_path / "train"
    write(folder, example())
    data, numbers = (folder / "1.png").read_bytes(), range(1, 2001)
    for i in numbers:
        (folder / f"{i}.png").write_bytes(data)
    ring = np.stack([35 + 15 * np.cos(np.linspace(0, 6, 20)), 20 + 10 * np.sin(np.linspace(0, 6, 20))], 1)
    formats = [{"segmentation": [ring.flatten().tolist()]}, {"segmentation": compressed(SQUARE)}]
    coco = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in numbers],
        "categories": example()["categories"],
        "annotations": [annotation(10 * i + j, image=i, category=1 + j % 2, **formats[j % 2])
                        for i in numbers for j in range(10)],
    }
    write(folder, coco)
    start = time.process_time()
    checked, _ = check_dataset(find_splits(tmp_path, "_annotations.coco.json"))
    assert time.process_time() - start < 2.0
    assert len(checked[0].coco["annotations"]) == 20_000 and checked[0].report.kinds == {}
