"""The official augmentations: what each does to the picture, the boxes and the masks."""

import random

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image as Picture

from sam3.train.data.sam3_image_dataset import Datapoint, Image, Object
from sam3_lora_wrapper.launch import compose_config

SIDE = 96
BOXES = ((10, 20, 40, 50), (56, 30, 80, 70))
COLOURS = ((250, 0, 0), (0, 250, 0))


def example(masks: bool = True) -> Datapoint:
    """A red and a green rectangle on black, with their boxes and masks."""
    pixels, objects = np.zeros((SIDE, SIDE, 3), np.uint8), []
    for number, ((x0, y0, x1, y1), colour) in enumerate(zip(BOXES, COLOURS)):
        pixels[y0:y1, x0:x1] = colour
        mask = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
        mask[y0:y1, x0:x1] = 1
        objects.append(Object(bbox=torch.tensor([[x0, y0, x1, y1]], dtype=torch.float32),
                              area=(x1 - x0) * (y1 - y0), object_id=number, segment=mask if masks else None))
    image = Image(data=Picture.fromarray(pixels), objects=objects, size=(SIDE, SIDE))
    return Datapoint(find_queries=[], images=[image])


def augment(*overrides: str):
    """The augmentations of a configuration, without those that are switched off."""
    cfg = compose_config("lora_tiny", ["paths.dataset_root=/data", "augment=official", *overrides])
    return instantiate(cfg.augment)


def only(name: str):
    """One augmentation, always applied."""
    others = [n for n in ("flip", "colour", "grey", "blur", "affine", "crop") if n != name]
    certain = [] if name == "colour" else [f"augment.{name}.p=1.0"]
    return augment(*(f"augment.{n}=null" for n in others), *certain)


def pixels(datapoint: Datapoint) -> np.ndarray:
    return np.asarray(datapoint.images[0].data).astype(int)


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


def test_flip_mirrors_picture_boxes_and_masks() -> None:
    done = only("flip")(example())
    assert (pixels(done) == pixels(example())[:, ::-1]).all()
    for before, after in zip(example().images[0].objects, done.images[0].objects):
        x0, y0, x1, y1 = before.bbox[0].tolist()
        assert after.bbox[0].tolist() == [SIDE - x1, y0, SIDE - x0, y1]
        assert torch.equal(after.segment, before.segment.flip(-1))


@pytest.mark.parametrize("name", ["affine", "crop"])
def test_geometry_keeps_boxes_and_masks_on_their_objects(name: str) -> None:
    step, moved = only(name), 0
    for _ in range(20):
        done = step(example())
        moved += not np.array_equal(pixels(done), pixels(example()))
        for channel, found in enumerate(done.images[0].objects):
            mask = found.segment.bool().numpy()
            shown = pixels(done)[..., channel] - pixels(done)[..., 1 - channel] > 125
            assert (mask & shown).sum() / (mask | shown).sum() > 0.85
            rows, columns = np.where(mask)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert found.bbox.flatten().tolist() == box
    assert moved >= 10


@pytest.mark.parametrize("name", ["affine", "crop"])
def test_geometry_leaves_an_object_without_a_mask_as_it_is(name: str) -> None:
    step = only(name)
    for _ in range(5):
        done = step(example(masks=False))
        assert [o.bbox[0].tolist() for o in done.images[0].objects] == [list(map(float, b)) for b in BOXES]
        assert (pixels(done) == pixels(example())).all()


@pytest.mark.parametrize("name", ["colour", "grey", "blur"])
def test_colours_change_and_nothing_moves(name: str) -> None:
    done = only(name)(example())
    assert pixels(done).shape == (SIDE, SIDE, 3) and (pixels(done) != pixels(example())).any()
    for before, after in zip(example().images[0].objects, done.images[0].objects):
        assert torch.equal(after.bbox, before.bbox) and torch.equal(after.segment, before.segment)
    if name == "grey":
        assert (pixels(done) == pixels(done)[..., :1]).all()
    if name == "blur":  # spreads the colours over five pixels at most, and keeps their amount
        assert pixels(done).sum() == pytest.approx(pixels(example()).sum(), rel=0.01)
        assert not pixels(done)[:, :8].any()


def test_each_is_switched_off_by_name_and_all_by_default() -> None:
    assert list(augment().steps) == ["flip", "colour", "grey", "blur", "affine", "crop"]
    assert list(augment("augment.flip=null", "augment.crop=null").steps) == ["colour", "grey", "blur", "affine"]
    cfg = compose_config("lora_tiny", ["paths.dataset_root=/data"])
    assert instantiate(cfg.augment).steps == {}


def test_they_are_applied_in_training_and_not_in_validation() -> None:
    cfg = compose_config("lora_tiny", ["paths.dataset_root=/data", "augment=official"])
    target = "sam3_lora_wrapper.dataset.augment.Augment"
    assert [t._target_ for t in cfg.data.train_transforms].count(target) == 1
    assert target not in OmegaConf.to_yaml(cfg.data.val_transforms)


def test_geometry_without_masks_is_refused() -> None:
    with pytest.raises(Exception, match="affine, crop needs masks. Use loss=masks, or add augment.affine=null"):
        augment("loss=boxes")
    assert list(augment("loss=boxes", "augment.affine=null", "augment.crop=null").steps) == [
        "flip", "colour", "grey", "blur"]
