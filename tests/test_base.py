"""Loading base weights: every layout, every key, and no code from a file."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from sam3.model_builder import _load_checkpoint, build_sam3_video_model
from sam3_lora_wrapper.base import (
    SHIPPED,
    VOCABULARY,
    build_base,
    fingerprint,
    image_weights,
    load_weights,
    official_image_model,
    set_resolution,
)
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.launch import compose_config

REPOSITORY = Path(__file__).resolve().parent.parent
BASE = OmegaConf.to_container(compose_config("lora_tiny", ["paths.dataset_root=/data"]).model.base)


@pytest.fixture(scope="module")
def weights() -> dict:
    """State dict of a tiny official model whose every parameter is another ramp of values."""
    state = build_base(BASE, "random").state_dict()
    for number, (key, value) in enumerate(state.items()):
        if value.dtype == torch.float32:
            state[key] = torch.linspace(-1, 1, value.numel()).view(value.shape) * (1 + number / 100)
    return state


def save(path: Path, content: dict) -> Path:
    torch.save(content, path)
    return path


LAYOUTS = {
    "release": lambda s: {f"detector.{k}": v for k, v in s.items()} | {"tracker.mask.weight": torch.ones(2)},
    "release in a model entry": lambda s: {"model": {f"detector.{k}": v for k, v in s.items()}},
    "trainer": lambda s: {"model": s, "epoch": 3},
    "DistributedDataParallel": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    "release with the video neck": lambda s: {f"detector.{k}": v for k, v in s.items()}
    | {"detector.backbone.vision_backbone.sam2_convs.0.weight": torch.ones(2)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_every_tensor(layout: str, weights: dict, tmp_path: Path) -> None:
    path = save(tmp_path / "base.pt", LAYOUTS[layout](weights))
    loaded = build_base(BASE, str(path)).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[k], weights[k]) for k in weights)


def test_every_key_of_the_release_has_a_place_or_is_of_the_video_model() -> None:
    """sam3.pt holds the official video model, which upstream loads strictly: its keys are the release's."""
    with torch.device("meta"):
        video = build_sam3_video_model(load_from_HF=False, bpe_path=str(VOCABULARY), device="meta").state_dict()
        own = official_image_model().state_dict()
    kept, left_out = image_weights(video)
    assert kept.keys() == own.keys()
    assert all(kept[k].shape == own[k].shape for k in own)
    assert (len(kept), left_out) == (1134, 331)


def test_missing_unexpected_and_misshapen_keys_are_listed_and_nothing_is_loaded(weights: dict, tmp_path: Path) -> None:
    state = dict(weights)
    shape = state.pop("dot_prod_scoring.hs_proj.bias").shape
    state["dot_prod_scoring.extra"] = torch.ones(1)
    state["transformer.decoder.norm.weight"] = torch.ones(3)
    path = save(tmp_path / "base.pt", {"model": state})
    model = build_base(BASE, "random")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(model, path)
    for line in ("3 tensors", "missing: dot_prod_scoring.hs_proj.bias", "unexpected: dot_prod_scoring.extra",
                 "transformer.decoder.norm.weight: (3,) in the file, (64,) expected"):
        assert line in str(error.value)
    assert shape == (64,)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_upstream_would_have_loaded_nothing_of_the_trainer_layout(weights: dict, tmp_path: Path, capsys) -> None:
    """The trap that this loader closes, shown on upstream's own loader."""
    model = build_base(BASE, "random")
    before = fingerprint(model)
    _load_checkpoint(model, str(save(tmp_path / "base.pt", {"model": weights})))
    assert fingerprint(model) == before and "missing_keys" in capsys.readouterr().out


def test_shipped_weights_are_in_the_release_layout_and_small(capsys) -> None:
    assert SHIPPED["sam3_tiny"].stat().st_size < 12e6
    ours, theirs = build_base(BASE, "sam3_tiny"), build_base(BASE, "random")
    _load_checkpoint(theirs, str(SHIPPED["sam3_tiny"]))
    assert "missing" not in capsys.readouterr().out
    assert fingerprint(theirs) == fingerprint(ours)


def test_file_cut_short_is_one_message(weights: dict, tmp_path: Path) -> None:
    path = save(tmp_path / "base.pt", weights)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="cut short"):
        build_base(BASE, str(path))


def test_missing_file_is_one_message() -> None:
    with pytest.raises(UserError, match="no such file"):
        build_base(BASE, "/nowhere/sam3.pt")


@pytest.mark.parametrize("target", ["os.system", "sam3.model.decoder.torch.load", "subprocess.run",
                                    "sam3.train.train.main", "builtins.eval"])
def test_a_recorded_base_cannot_name_other_code(target: str) -> None:
    with pytest.raises(UserError, match="refusing"):
        build_base(BASE | {"matcher": {"_target_": target, "command": "true"}}, "random")


def test_random_weights_are_finite_and_the_same_each_time() -> None:
    first, second = build_base(BASE, "random"), build_base(BASE, "random")
    assert all(p.isfinite().all() for p in first.parameters())
    assert fingerprint(first) == fingerprint(second)


def test_fingerprint_sees_one_changed_tensor_and_no_change_of_layout(weights: dict, tmp_path: Path) -> None:
    one = build_base(BASE, str(save(tmp_path / "a.pt", LAYOUTS["release"](weights))))
    other = build_base(BASE, str(save(tmp_path / "b.pt", LAYOUTS["trainer"](weights))))
    assert fingerprint(one) == fingerprint(other)
    with torch.no_grad():
        other.dot_prod_scoring.hs_proj.bias.add_(1e-3)
    assert fingerprint(one) != fingerprint(other)


@pytest.fixture
def hub():
    """A local stand-in of the hub's HTTP API that refuses every file in a chosen way."""
    class Refuse(BaseHTTPRequestHandler):
        status, code = 401, None

        def do_HEAD(self):
            self.send_response(self.status)
            if self.code:
                self.send_header("X-Error-Code", self.code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.parametrize("status, code, said", [
    (403, "GatedRepo", "gated"), (401, "GatedRepo", "hf auth login"), (401, None, "hf auth login"),
    (404, "EntryNotFound", "cannot be downloaded"),
])
def test_hub_refusal_says_what_to_do(hub, tmp_path: Path, status: int, code: str | None, said: str) -> None:
    hub.RequestHandlerClass.status, hub.RequestHandlerClass.code = status, code
    program = ("from sam3_lora_wrapper.launch import readable_errors\n"
               "from sam3_lora_wrapper.base import find_weights\n"
               "with readable_errors(): find_weights('hub')")
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path),
                                "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: "), done.stderr
    assert said in done.stderr and "model.weights=/path/to/sam3.pt" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_resolution_is_that_of_a_vit_built_for_it(tiny_config) -> None:
    """The rotary embeddings of global blocks are interpolated; those of windows and all weights stay."""
    arguments = tiny_config["backbone"]["visual"]["trunk"] | {"global_att_blocks": [1, 3], "window_size": 6}
    small, large = (instantiate(arguments | {"img_size": side}).eval() for side in (96, 192))
    weights = {k: v for k, v in small.state_dict().items() if "freqs_cis" not in k}
    assert large.load_state_dict(weights, strict=False).missing_keys == [f"blocks.{i}.attn.freqs_cis" for i in range(4)]
    x = torch.randn(1, 3, 192, 192)
    with pytest.raises(AssertionError), torch.no_grad():
        small(x)
    model = SimpleNamespace(backbone=SimpleNamespace(vision_backbone=SimpleNamespace(trunk=small)))
    set_resolution(model, 192)
    with torch.no_grad():
        assert torch.equal(small(x)[-1], large(x)[-1])
    with pytest.raises(UserError, match="model.resolution=100: must be a multiple of 8"):
        set_resolution(model, 100)
