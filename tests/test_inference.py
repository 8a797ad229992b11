"""inference.py and the predictor: from an adapter file to masks on a picture."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from pycocotools import mask as mask_util

from sam3.model.sam3_image_processor import Sam3Processor
from sam3_lora_wrapper.checkpoint import load_model, read_adapter, save_adapter
from sam3_lora_wrapper.dataset.image_files import open_image
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.launch import compose_config
from sam3_lora_wrapper.predictor import Predictor
from sam3_lora_wrapper.synthetic import BASE, write_dataset
from sam3_lora_wrapper.wrapper import lora_model

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    folder = write_dataset(tmp_path_factory.mktemp("data"), BASE, train=1, valid=1, seed=5)
    return folder / "valid" / "00001.jpg"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter of the shipped base whose every factor is small and not zero."""
    cfg = compose_config("lora_tiny", ["paths.dataset_root=/data"])
    model = lora_model(OmegaConf.to_container(cfg.model.base), "sam3_tiny", 96, OmegaConf.to_container(cfg.lora))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.lora.tensors().values():
            parameter.add_(0.003 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("adapter") / "checkpoint_last.pt"
    save_adapter(model.lora, path, epoch=1)
    return path


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, REPOSITORY / "inference.py", *map(str, arguments)],
                          capture_output=True, text=True)


def test_command_writes_overlay_and_json_and_prints_a_table(adapter: Path, image: Path, tmp_path: Path) -> None:
    done = run("--model_path", adapter, "--image_path", image, "--prompt", "cross", "ring", "square",
               "--threshold", "0.3", "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads((tmp_path / "00001.json").read_text())
    assert report["size"] == [96, 96]
    # Two crosses, two rings and no square are in the picture.
    assert sorted(d["prompt"] for d in report["detections"]) == ["cross", "cross", "ring", "ring"]
    scores = [d["score"] for d in report["detections"]]
    assert scores == sorted(scores, reverse=True) and min(scores) > 0.3
    for d in report["detections"]:
        assert mask_util.decode(d["segmentation"]).sum() == d["area"] == mask_util.area(d["segmentation"])
    assert all(f"{d['prompt']}" in done.stdout and f"{d['score']:.3f}" in done.stdout for d in report["detections"])
    overlay = np.asarray(Image.open(tmp_path / "00001_overlay.png").convert("RGB")).astype(int)
    assert overlay.shape[1] == 512 and overlay.shape[0] > 512
    assert str(tmp_path / "00001_overlay.png") in done.stdout


def test_predictor_equals_the_official_processor_on_the_unmerged_model(adapter: Path, image: Path) -> None:
    model = load_model(adapter)
    processor = Sam3Processor(model, 96, "cpu", 0.01)
    picture = open_image(image)
    state = processor.set_text_prompt("cross", processor.set_image(picture))
    found = Predictor(adapter, device="cpu", threshold=0.01).predict(picture, ["cross"])
    order = torch.argsort(state["scores"], descending=True)
    assert len(found) == len(order) > 3
    for d, i in zip(found, order):
        assert d.score == pytest.approx(state["scores"][i].item(), abs=1e-5)
        np.testing.assert_allclose(d.box, state["boxes"][i], atol=1e-2)
        assert (d.mask != state["masks"][i, 0].numpy()).mean() < 1e-3


def test_adapter_changes_what_the_base_says(adapter: Path, image: Path) -> None:
    model = load_model(adapter)
    processor = Sam3Processor(model, 96, "cpu", 0.0)
    with_adapter = processor.set_text_prompt("cross", processor.set_image(open_image(image)))["scores"]
    with model.lora.disable_adapter():
        without = processor.set_text_prompt("cross", processor.set_image(open_image(image)))["scores"]
    assert (with_adapter - without).abs().max() > 1e-4


def test_a_category_is_asked_for_by_the_text_it_was_trained_with(adapter: Path, image: Path, tmp_path: Path) -> None:
    content = torch.load(adapter, weights_only=True)
    content["base"]["prompts"] = {"thing with a hole": ["ring", "hoop"]}
    torch.save(content, tmp_path / "prompts.pt")
    predictor, picture = Predictor(tmp_path / "prompts.pt", device="cpu"), open_image(image)
    named, asked = predictor.predict(picture, ["thing with a hole"]), predictor.predict(picture, ["ring"])
    assert len(named) == 2 and {d.prompt for d in named} == {"thing with a hole"}
    assert [d.score for d in named] == [d.score for d in asked]


def test_exif_orientation_is_applied(image: Path, tmp_path: Path) -> None:
    picture = Image.open(image).crop((0, 0, 96, 48))
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by a quarter for display
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    assert open_image(tmp_path / "turned.jpg").size == (48, 96)


def test_file_loads_with_weights_only_and_describes_itself(adapter: Path) -> None:
    content = torch.load(adapter, weights_only=True)
    assert content["format"] == "sam3-lora" and content["lora"]["rank"] == 16
    assert content["base"]["weights"] == "sam3_tiny" and content["base"]["resolution"] == 96
    assert len(content["base"]["fingerprint"]) == 64


@pytest.mark.parametrize("change, said", [
    (lambda c: c.update(format="other"), "not an adapter"),
    (lambda c: c.update(version=99), "newer"),
    (lambda c: c.update(optimizer={}, format=None), "checkpoint_last.pt beside it"),
    (lambda c: c["base"].update(fingerprint="0" * 64), "other weights"),
    (lambda c: c["adapter"].popitem(), "missing: "),
    (lambda c: c["adapter"].update(extra=torch.ones(1)), "unexpected: extra"),
    (lambda c: next(iter(c["adapter"].values())).fill_(float("nan")), "NaN"),
    (lambda c: c["base"].update(config={"_target_": "os.system", "command": "true"}), "refusing"),
])
def test_altered_file_is_refused(adapter: Path, tmp_path: Path, change, said: str) -> None:
    content = torch.load(adapter, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "altered.pt")
    with pytest.raises(UserError, match=said):
        load_model(tmp_path / "altered.pt")


@pytest.mark.parametrize("arguments, said", [
    (["--model_path", "{adapter}", "--image_path", "{folder}/none.jpg"], "none.jpg: no such file"),
    (["--model_path", "{adapter}", "--image_path", "{folder}/text.jpg"], "cannot be read as an image"),
    (["--model_path", "{folder}/text.jpg", "--image_path", "{image}"], "cut short, or not a PyTorch checkpoint"),
    (["--model_path", "{folder}/none.pt", "--image_path", "{image}"], "none.pt: no such file"),
    (["--model_path", "{adapter}", "--image_path", "{image}", "--base", "{folder}/none.pt"], "none.pt"),
    (["--model_path", "{adapter}", "--image_path", "{image}", "--device", "gpu"], "no such device"),
])
def test_mistakes_end_in_one_message_and_write_nothing(
    adapter: Path, image: Path, tmp_path: Path, arguments: list, said: str
) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    names = {"adapter": adapter, "image": image, "folder": tmp_path}
    done = run(*[a.format(**names) for a in arguments], "--prompt", "cross", "--output_dir", tmp_path / "out")
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("error: ") and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_reading_the_trainers_own_checkpoint_names_the_right_file(tmp_path: Path) -> None:
    torch.save({"model": {}, "optimizer": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="checkpoint_last.pt beside it"):
        read_adapter(tmp_path / "checkpoint.pt")
