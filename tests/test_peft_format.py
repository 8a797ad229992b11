"""Adapter folders: PEFT reads them onto the official model, ours come back bit for bit, the hub takes them."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from small_models import close, config, copied, difference, randomise, same, snapshot
from torch import nn

from sam3_lora_wrapper.adapters import Lora
from sam3_lora_wrapper.base import identity
from sam3_lora_wrapper.checkpoint import load_model
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.formats.peft_format import from_pretrained, save_pretrained

REPOSITORY = Path(__file__).resolve().parent.parent
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LINEAR = {"vision_encoder": ["q", "v", "out", "fc1"], "detr_decoder": ["feed_forward"]}
OPTIONS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "PiSSA": {"init": "pissa"},
    "DoRA on linear layers": {"use_dora": True, "components": LINEAR},
    "some kinds": {"components": {"vision_encoder": ["v"], "detr_decoder": ["q", "v"], "detr_encoder": ["out"]}},
    "patterns": {"rank_pattern": {"*.q": 3, "*.linear1.*": 5}, "alpha_pattern": {"*.v": 1.5, "*.qkv.k": 7}},
    "blocks": {"components": {"vision_encoder": ["attention"]}, "layers": {"vision_encoder": "last 1"}},
    "full modules": {"modules_to_save": ["dot_prod_scoring", "transformer.decoder.norm"]},
    "biases of adapted modules": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
}


def trained(model: nn.Module, **options) -> Lora:
    lora = Lora(model)
    lora.add(config(**options))
    randomise(lora)
    return lora


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_peft_loads_the_folder_onto_the_official_model(tiny, forward, tmp_path: Path, options: dict) -> None:
    base, reference = copied(tiny).eval(), forward(tiny.eval())
    lora = trained(tiny, **options)
    save_pretrained(lora, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    outputs = forward(tiny)
    assert difference(outputs, reference) > 5e-3
    close(forward(theirs.base_model.model), outputs)


@pytest.mark.parametrize("options", [*OPTIONS.values(), {"use_dora": True}],
                         ids=[*OPTIONS, "DoRA everywhere"])
@torch.no_grad()
def test_round_trip_is_exact(tiny, forward, tmp_path: Path, options: dict) -> None:
    base = copied(tiny)
    lora = trained(tiny, **options)
    save_pretrained(lora, tmp_path)
    loaded = from_pretrained(base, tmp_path)
    assert loaded is base and base.lora.named["default"].config == lora.named["default"].config
    if options.get("alpha_pattern"):  # a scaling of its own is folded into B and taken out again
        for key, value in lora.state_dict().items():
            torch.testing.assert_close(base.lora.state_dict()[key], value, rtol=2e-7, atol=0)
    else:
        assert same(base.lora.state_dict(), lora.state_dict())
        assert same(forward(base.eval()), forward(tiny.eval()))


def test_peft_refuses_dora_in_attention_and_the_card_says_so(tiny, tmp_path: Path) -> None:
    base = copied(tiny)
    save_pretrained(trained(tiny, use_dora=True), tmp_path / "dora")
    with pytest.raises(ValueError, match="DoRA"):
        peft.PeftModel.from_pretrained(base, tmp_path / "dora")
    assert "PEFT cannot load this adapter" in (tmp_path / "dora" / "README.md").read_text()


def test_peft_still_adds_the_update_of_out_proj_twice() -> None:
    """Why our B of out_proj is halved in the folder: once PEFT adds it once, this fails, and that must go."""
    attention = nn.MultiheadAttention(8, 2)
    weight = attention.out_proj.weight.detach().clone()
    layer = peft.get_peft_model(nn.Sequential(attention), peft.LoraConfig(r=2, target_modules=["0"]))
    layer = layer.base_model.model[0]
    out = layer.base_layer.out_proj
    nn.init.normal_(out.lora_B["default"].weight)
    layer.merge()
    torch.testing.assert_close(out.base_layer.weight - weight, 2 * out.get_delta_weight("default"))


def test_folder_describes_itself(tiny, tmp_path: Path) -> None:
    base = identity(tiny)
    lora = trained(tiny)
    save_pretrained(lora, tmp_path, epoch=3, run={"training": {"lr": 2e-4}, "metrics": {"mask_AP": 0.5}})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    fields = json.loads((tmp_path / CONFIG).read_text())
    known = {f for f in peft.LoraConfig.__dataclass_fields__}
    assert set(fields) <= known and fields["peft_type"] == "LORA"
    layer = "transformer.encoder.layers.0.self_attn"
    assert (fields["r"], fields["rank_pattern"][layer], fields["alpha_pattern"][layer]) == (2, 6, 12)
    with safetensors.safe_open(tmp_path / WEIGHTS, "pt") as file:
        description = json.loads(file.metadata()["sam3-lora"])
        assert file.get_tensor(f"base_model.model.{layer}.lora_B.weight").shape == (192, 6)
    assert description["base"] == base and description["epoch"] == 3
    assert description["packages"].keys() == {"sam3", "torch"} and description["metrics"] == {"mask_AP": 0.5}
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert base["fingerprint"] in card and '"mask_AP": 0.5' in card and "detr_decoder" in card


def test_a_second_adapter_and_one_that_is_not_active(tiny, forward, tmp_path: Path) -> None:
    lora = trained(tiny, modules_to_save=["dot_prod_scoring"])
    outputs = forward(tiny.eval())
    lora.add(config(modules_to_save=["dot_prod_scoring"]), "other")
    save_pretrained(lora, tmp_path, name="default")
    from_pretrained(tiny, tmp_path, "again")
    assert lora.active == ("again",) and list(lora.named) == ["default", "other", "again"]
    assert same(forward(tiny), outputs)


def edit_tensors(folder: Path, change) -> None:
    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata)


def edit_json(**values):
    return lambda folder: (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | values))


def tensors(change):
    """A damage to the tensors of a folder."""
    return lambda folder: edit_tensors(folder, lambda tensors, metadata: change(tensors))


def description(**values):
    """A damage to the description in the metadata of a folder."""
    def change(tensors, metadata):
        metadata["sam3-lora"] = json.dumps(json.loads(metadata["sam3-lora"]) | values)
    return lambda folder: edit_tensors(folder, change)


QKV = "base_model.model.backbone.vision_backbone.trunk.blocks.0.attn.qkv"
A, B = f"{QKV}.lora_A.weight", f"{QKV}.lora_B.weight"
MISTAKES = {
    "a missing tensor": (tensors(lambda t: t.pop(A)), f"missing: {A}"),
    "an extra tensor": (tensors(lambda t: t.update(extra=torch.ones(1))), "unexpected: extra"),
    "a shape": (tensors(lambda t: t.update({A: torch.ones(2, 96)})), "(2, 96) in the file, (6, 96)"),
    "NaN": (tensors(lambda t: t[A].fill_(float("nan"))), "NaN or infinity in"),
    "values of no slice": (tensors(lambda t: t[B].fill_(1)), "values outside of the adapted rows"),
    "a newer version": (description(version=99), "newer SAM3-LoRA (format 99"),
    "another rank": (description(lora=config(rank=4).to_dict()), "(6, 96) in the file, (12, 96)"),
    "a key of the future": (description(lora={"rank": 2, "magic": 1}), "lora.magic: no such key"),
    "another architecture": (description(base={"parameters": 840509750, "fingerprint": ""}), "of 840509750 parameters"),
    "no base": (description(base=None), "no `base`"),
    "no description": (lambda f: edit_tensors(f, lambda t, m: m.pop("sam3-lora")), "not an adapter of SAM3-LoRA"),
    "a configuration that disagrees": (edit_json(r=4), "r=4, but"),
    "other target modules": (edit_json(target_modules=["qkv"]), "target_modules=['qkv'], but"),
    "no configuration": (lambda f: (f / CONFIG).unlink(), f"it has no {CONFIG}"),
    "broken JSON": (lambda f: (f / CONFIG).write_text("{"), "cannot be read"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "is no mapping"),
    "a file cut short": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:1000]), "cannot be read"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"it has no {WEIGHTS}"),
}


@pytest.mark.parametrize("damage, said", MISTAKES.values(), ids=MISTAKES)
def test_what_does_not_fit_is_refused_and_the_model_left_alone(tiny, tmp_path: Path, damage, said: str) -> None:
    base = copied(tiny).requires_grad_(True)
    save_pretrained(trained(tiny), tmp_path)
    damage(tmp_path)
    before, modules = snapshot(base), [type(m) for m in base.modules()]
    with pytest.raises(UserError) as error:
        from_pretrained(base, tmp_path)
    assert said in str(error.value)
    assert not hasattr(base, "lora") and [type(m) for m in base.modules()] == modules
    assert same(snapshot(base), before) and all(p.requires_grad for p in base.parameters())


def test_other_weights_of_the_same_shapes_are_refused_though_peft_does_not_notice(tiny, tmp_path: Path) -> None:
    base = copied(tiny)
    save_pretrained(trained(tiny), tmp_path)
    with torch.no_grad():
        base.transformer.decoder.norm.bias.add_(1e-3)
    with pytest.raises(UserError, match="base with other weights"):
        from_pretrained(base, tmp_path)
    assert not hasattr(base, "lora")
    peft.PeftModel.from_pretrained(base, tmp_path)


def test_folder_that_does_not_name_its_base_says_what_to_do(tiny, tmp_path: Path) -> None:
    save_pretrained(trained(tiny), tmp_path)
    with pytest.raises(UserError, match="use from_pretrained"):
        load_model(tmp_path)


def test_no_such_folder(tiny) -> None:
    with pytest.raises(UserError, match="no such folder, and not the name"):
        from_pretrained(tiny, "/nowhere/adapter")


def test_bad_name_leaves_the_model_alone(tiny, tmp_path: Path) -> None:
    base = copied(tiny)
    save_pretrained(trained(tiny), tmp_path)
    with pytest.raises(UserError, match="not a plain word"):
        from_pretrained(base, tmp_path, "my adapter")
    assert not hasattr(base, "lora")


def test_folder_of_a_run_rebuilds_base_and_adapter(tiny_config, forward, tmp_path: Path) -> None:
    """What the trainer's hook writes beside each checkpoint, and what it records of the run."""
    from sam3_lora_wrapper.wrapper import lora_model

    model = lora_model(tiny_config, "random", 96, config().to_dict())
    randomise(model.lora)
    (tmp_path / "logs").mkdir()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("training: {lr: 0.001}\npaths: {dataset_root: /home/me}\n")
    (tmp_path / "logs" / "val_stats.json").write_text('{"box_AP": 0.1}\n{"box_AP": 0.25}\n')
    model.lora.save_run(str(tmp_path / "checkpoints"), ["checkpoint", "checkpoint_best"], 2)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["adapter", "adapter_best", "checkpoint_best.pt", "checkpoint_last.pt"]
    folder = tmp_path / "checkpoints" / "adapter"
    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
        description = json.loads(file.metadata()["sam3-lora"])
    assert description["training"] == {"training": {"lr": 0.001}} and description["metrics"] == {"box_AP": 0.25}
    rebuilt = load_model(folder)
    assert not rebuilt.training and rebuilt.lora.record["resolution"] == 96
    assert same(forward(rebuilt), forward(model.eval()))


class Hub(BaseHTTPRequestHandler):
    """A stand-in of the hub's HTTP API: repositories are made, receive commits, and are downloaded."""

    files: dict[str, bytes] = {}
    protocol_version = "HTTP/1.1"

    def answer(self, content, status: int = 200, **headers) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = f"http://{self.headers['Host']}/me/adapter"
        if "Bearer hf_test" not in self.headers.get("Authorization", ""):
            self.answer({"error": "Unauthorized"}, 401)
        elif self.path == "/api/repos/create":
            self.answer({"url": address})
        elif "/preupload/" in self.path:
            names = [f["path"] for f in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{address}/commit/{'a' * 40}", "commitOid": "a" * 40})
        else:
            self.answer({"valid": True})

    def do_GET(self) -> None:
        name = self.path.split("/")[-1].split("?")[0]
        if not self.path.split("?")[0].startswith(("/api/models/me/adapter", "/me/adapter/")):
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif "/resolve/" in self.path and name in self.files:
            tag = hashlib.sha256(self.files[name]).hexdigest()
            self.answer(self.files[name], ETag=f'"{tag}"', X_Repo_Commit="a" * 40)
        elif "/tree/" in self.path:
            self.answer([{"type": "file", "path": n, "size": len(b), "oid": "b" * 40} for n, b in self.files.items()])
        else:
            about = {"id": "me/adapter", "sha": "a" * 40, "private": False, "tags": [], "downloads": 0}
            self.answer(about | {"siblings": [{"rfilename": n} for n in self.files]})

    do_HEAD = do_GET

    def log_message(self, *args) -> None:
        pass


HUB_PROGRAM = """
import sys, torch, json
sys.path.insert(0, "tests")
from small_models import run_forward
from sam3_lora_wrapper import from_pretrained, load_model, push_to_hub
from sam3_lora_wrapper.base import build_base
from sam3_lora_wrapper.launch import readable_errors
folder, what = sys.argv[1:]
with readable_errors():
    model = load_model(folder)
    if what == "push":
        print(push_to_hub(model.lora, "me/adapter"))
    base = build_base(model.lora.record["config"], "random")
    pulled = from_pretrained(base, "me/adapter" if what == "push" else "me/other").eval()
    ours, theirs = run_forward(model), run_forward(pulled)
    print("same" if all(torch.equal(ours[k], theirs[k]) for k in ours) else "different")
"""


@pytest.fixture
def hub(tmp_path: Path, tiny_config):
    """Runs the program above against the stand-in, on a folder with an adapter."""
    from sam3_lora_wrapper.wrapper import lora_model

    model = lora_model(tiny_config, "random", 96, config().to_dict())
    randomise(model.lora)
    save_pretrained(model.lora, tmp_path / "adapter")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(what: str, token: str | None) -> subprocess.CompletedProcess:
        environment = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"} | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        } | ({"HF_TOKEN": token} if token else {})
        return subprocess.run(
            [sys.executable, "-c", HUB_PROGRAM, str(tmp_path / "adapter"), what],
            cwd=REPOSITORY, env=environment, capture_output=True, text=True,
        )
    yield run
    server.shutdown()


def test_push_to_the_hub_and_pull_from_it(hub) -> None:
    Hub.files.clear()
    done = hub("push", "hf_test")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].endswith("/me/adapter") and done.stdout.splitlines()[-1] == "same"
    assert sorted(Hub.files) == ["README.md", CONFIG, WEIGHTS]


def test_refusals_of_the_hub_are_one_message(hub) -> None:
    for what, said in (("push", "me/adapter: the upload failed"), ("pull", "me/other: no such folder, and not to be")):
        done = hub(what, None)
        message = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and message.startswith("error: ") and "Traceback" not in done.stderr, done.stderr
        assert said in message and "hf auth login" in message
