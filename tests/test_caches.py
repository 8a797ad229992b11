"""Text features computed once and ViT features on disk, against the official encoders."""

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import config, copied, randomise, same
from torch import Tensor, nn

from sam3.model.necks import Sam3DualViTDetNeck
from sam3_lora_wrapper.adapters import Lora
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.feature_cache import FeatureFiles, cache_features, pixel_key
from sam3_lora_wrapper.text_cache import CachedTextEncoder, cache_text

TEXTS = ["circle", "a red star", "hot air balloon"]
PARKED = ("token_embedding.", "transformer.")
MODES = pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
EVERY_SCALE = {"scale_factors": (4.0, 2.0, 1.0, 0.5), "d_model": 64}


def amp(dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)


def counted(module: nn.Module) -> list[int]:
    """A list that gets the batch size of every forward of a module."""
    sizes = []
    module.register_forward_hook(lambda _, inputs, output: sizes.append(len(inputs[0])))
    return sizes


# ------------------------------------------------------------ texts


@pytest.fixture
def encoders(tiny) -> tuple[CachedTextEncoder, nn.Module]:
    """A cached text encoder and the official one with the same weights."""
    cached = copied(tiny).backbone.language_backbone
    cache_text(cached)
    return cached, tiny.backbone.language_backbone


def alone(encoder: nn.Module, texts: list[str], device: str = "cpu") -> tuple[Tensor, ...]:
    """What the official encoder gives for each text by itself, side by side."""
    outputs = [encoder([t], device=device) for t in texts]
    return tuple(torch.cat(parts, dim) for parts, dim in zip(zip(*outputs), (0, 1, 1)))


@MODES
def test_text_features_are_those_of_the_official_encoder(encoders, autocast) -> None:
    cached, official = encoders
    a, b, c = TEXTS
    for texts in ([a], [b, a], [a, b], [c, a, c, c], [b], TEXTS):
        for train in (True, False):
            cached.train(train)
            official.train(train)
            with amp(autocast):
                got, wanted, batch = cached(texts, device="cpu"), alone(official, texts), official(texts, device="cpu")
            for x, y, z in zip(got, wanted, batch):
                assert x.shape == z.shape and x.dtype == z.dtype and torch.equal(x, y) and not x.requires_grad
                # In a batch the official encoder itself rounds in another way.
                torch.testing.assert_close(x, z, rtol=0, atol=1e-5 if autocast is None else 0.05)
            assert got[1].abs().max() > 0.01
            got[1].zero_()  # what a caller does to its features does not reach the kept ones


def test_each_text_is_encoded_once(encoders) -> None:
    cached, _ = encoders
    cached.known = ("zebra", "circle")
    sizes = counted(cached.encoder.transformer)
    cached(["circle", "star", "circle"], device="cpu")
    assert sizes == [1, 1, 1]
    for texts in (["star"], ["zebra", "star"], ["circle"]):
        cached.eval()(texts, device=torch.device("cpu"))
    assert len(sizes) == 3
    cached(["zebra", "ring"], device="cpu")
    assert len(sizes) == 4
    with amp(torch.bfloat16):
        assert cached(["ring"], device="cpu")[1].dtype == torch.bfloat16
    assert len(sizes) == 7


def test_text_parameters_keep_names_and_values(encoders) -> None:
    cached, official = encoders
    cached(TEXTS, device="cpu")
    assert same(cached.state_dict(), official.state_dict())
    assert [n for n, _ in cached.named_parameters()] == [n for n, _ in official.named_parameters()]


def test_text_encoder_waits_elsewhere_and_travels_for_new_texts_alone(encoders, monkeypatch) -> None:
    # The meta device holds no data: what is parked there can neither be used nor come back.
    cached, official = encoders
    monkeypatch.setattr(CachedTextEncoder, "parked", torch.device("meta"))
    cached(TEXTS, device="cpu")
    devices = {n: p.device.type for n, p in cached.encoder.named_parameters()}
    assert devices == {n: "meta" if n.startswith(PARKED) else "cpu" for n in devices}
    assert all(b.device.type == "cpu" for b in cached.buffers())  # which DistributedDataParallel broadcasts
    assert torch.equal(cached(TEXTS[::-1], device="cpu")[1], alone(official, TEXTS[::-1])[1])
    with pytest.raises(NotImplementedError, match="copy out of meta"):
        cached(["a text that is new"], device="cpu")


def test_text_encoder_stays_in_place_on_the_cpu(encoders) -> None:
    cached, _ = encoders
    before = [p.data_ptr() for p in cached.parameters()]
    cached(TEXTS, device="cpu")
    assert CachedTextEncoder.parked == torch.device("cpu") and before == [p.data_ptr() for p in cached.parameters()]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_text_encoder_leaves_the_gpu_and_returns(encoders) -> None:
    cached, official = (e.to("cuda") for e in encoders)
    for texts in (TEXTS, ["zebra", TEXTS[1]], TEXTS):
        got, wanted = cached(texts, device="cuda"), alone(official, texts, "cuda")
        assert all(torch.equal(x, y) and x.is_cuda for x, y in zip(got, wanted))
        away = {n for n, p in cached.encoder.named_parameters() if not p.is_cuda}
        assert away == {n for n, _ in cached.encoder.named_parameters() if n.startswith(PARKED)}


def test_encoded_texts_are_used_as_they_are(encoders) -> None:
    cached, official = encoders
    mask, memory, embeds = official(TEXTS, device="cpu")
    encoded = (mask, memory + 1, {"inputs_embeds": embeds.transpose(0, 1)})
    assert all(torch.equal(x, y) for x, y in zip(cached(encoded), (mask, memory + 1, embeds)))
    assert cached.features == {}


def test_a_trained_text_encoder_is_refused(tiny) -> None:
    encoder = tiny.backbone.language_backbone
    encoder.resizer.bias.requires_grad_(True)
    with pytest.raises(UserError, match="resizer.bias is: see lora.components.text_encoder"):
        cache_text(encoder)
    assert not isinstance(encoder, CachedTextEncoder)
    cache_text(encoder.requires_grad_(False))
    encoder(TEXTS, device="cpu")
    Lora(tiny).add(config(components={"text_encoder": ["q"]}))
    with pytest.raises(UserError, match="lora_A"):
        encoder(TEXTS, device="cpu")


# ------------------------------------------------------------ images


def images(seed: int = 0, count: int = 2, side: int = 96) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


class EachAlone(nn.Module):
    """The official ViT, which rounds in another way where it gets several images at once."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk, self.channel_list = trunk, trunk.channel_list

    def forward(self, x: Tensor) -> list[Tensor]:
        return [torch.cat(parts) for parts in zip(*map(self.trunk, x.split(1)))]


def stored(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*"))


@pytest.fixture
def cached_model(tiny, tmp_path):
    """A function that gives a copy of the tiny model with a cache in one folder, the same each time."""
    def build(limit_gib: float = 0.01, fingerprint: str = "f" * 64) -> nn.Module:
        model = copied(tiny)
        cache_features(model, tmp_path / "features", limit_gib, fingerprint)
        return model
    return build


@MODES
def test_the_neck_gives_what_it_gives_without_the_cache(tiny, cached_model, tmp_path, autocast) -> None:
    # All scales of the official neck; that of 0.5 begins with a maximum, the others with a product.
    vision, official = tiny.backbone.vision_backbone, EachAlone(tiny.backbone.vision_backbone.trunk)
    neck = Sam3DualViTDetNeck(official, vision.position_encoding, **EVERY_SCALE).requires_grad_(False)
    x, cached = images(), cached_model().backbone.vision_backbone.trunk
    blocks = counted(cached.blocks[0])
    for train in (True, False, True):
        neck.trunk = official.train(train)
        with amp(autocast):
            wanted = neck(x)[0]
            neck.trunk = cached.train(train)
            got = neck(x)[0]
        assert len(got) == 4 and not got[0].requires_grad
        for a, b in zip(got, wanted):
            assert a.dtype == b.dtype == (autocast or torch.float32) and torch.equal(a, b) and b.abs().max() > 0.01
        assert blocks == [1, 1], "computed at the first visit alone"
    assert [load_file(p)["features"].dtype for p in stored(tmp_path / "features")] == [autocast or torch.float32] * 2


def test_without_autocast_the_cache_gives_the_official_batch(tiny, cached_model) -> None:
    x, model = images(count=3), cached_model()
    (wanted,), trunk = tiny.backbone.vision_backbone.trunk(x), model.backbone.vision_backbone.trunk
    for _ in range(2):
        (got,) = trunk(x)
        assert torch.equal(got, wanted) and got.stride() == wanted.stride()


def test_only_missing_images_are_computed(cached_model, caplog) -> None:
    caplog.set_level("INFO")
    trunk = cached_model().backbone.vision_backbone.trunk
    blocks, x = counted(trunk.blocks[0]), images(count=4)
    (first,) = trunk(x[:2])
    (both,) = trunk(x[[2, 1, 3, 0]])
    assert blocks == [1, 1, 1, 1] and torch.equal(both[[3, 1]], first)
    assert (trunk.files.hits, trunk.files.misses) == (2, 4)
    trunk.eval()
    assert "2 hits, 4 misses; " in caplog.messages[-1] and "of 0.01 GiB" in caplog.messages[-1]
    (again,) = trunk(x)
    assert len(blocks) == 4 and torch.equal(again, torch.cat([first, both[[0, 2]]]))
    trunk.train()
    assert "4 hits, 0 misses; " in caplog.messages[-1]
    lines = len(caplog.messages)
    trunk.train()
    assert len(caplog.messages) == lines


def test_the_key_is_exact(cached_model) -> None:
    trunk = cached_model().backbone.vision_backbone.trunk
    x = images(count=1)
    nearly = x.clone()
    nearly[0, 2, 95, 95] = torch.nextafter(x[0, 2, 95, 95], torch.tensor(9.0))
    for different in (x, nearly, x.flip(3), x.transpose(2, 3), x.reshape(1, 3, 96, 96)[:, [1, 0, 2]]):
        trunk(different)
    assert (trunk.files.hits, trunk.files.misses) == (0, 5)
    trunk(x.transpose(2, 3).contiguous())  # the same values in another order of memory
    assert trunk.files.hits == 1
    assert len({pixel_key(same_bytes) for same_bytes in (x, x[0], x.view(1, 3, 48, 192), x.view(torch.int32))}) == 4


def test_runs_of_one_base_and_dtype_share_a_folder(cached_model) -> None:
    x, first = images(), cached_model().backbone.vision_backbone.trunk
    (wanted,) = first(x)
    second = cached_model().backbone.vision_backbone.trunk
    blocks = counted(second.blocks[0])
    assert torch.equal(second(x)[0], wanted) and blocks == [] and second.files.size == first.files.size
    for trunk, dtype in ((cached_model(fingerprint="e" * 64).backbone.vision_backbone.trunk, None),
                         (cached_model().backbone.vision_backbone.trunk, torch.bfloat16)):
        with amp(dtype):
            trunk(x)
        assert (trunk.files.hits, trunk.files.misses) == (0, 2)
    half = cached_model().backbone.vision_backbone.trunk
    half.patch_embed.proj.weight.data = half.patch_embed.proj.weight.data.bfloat16()
    with amp(torch.bfloat16):
        half(x)
    assert (half.files.hits, half.files.misses) == (0, 2)


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:-1], lambda content: bytes(len(content)),
    lambda content: content[:-500] + bytes([content[-500] ^ 1]) + content[-499:],
    lambda content: content.replace(b'"F32"', b'"I32"'), lambda content: content.replace(b"crc32", b"crc33"),
], ids=["empty", "cut", "zeros", "one bit", "dtype", "no checksum"])
def test_a_damaged_file_is_computed_again(cached_model, tmp_path, caplog, damage) -> None:
    caplog.set_level("INFO")
    trunk = cached_model().backbone.vision_backbone.trunk
    (wanted,) = trunk(images())
    victim = stored(tmp_path / "features")[0]
    content = victim.read_bytes()
    assert damage(content) != content
    victim.write_bytes(damage(content))
    trunk.train()
    assert torch.equal(trunk(images())[0], wanted)
    trunk.train()
    assert "1 hits, 0 misses, 1 damaged files; " in caplog.messages[-1]
    assert victim.read_bytes() == content and torch.equal(trunk(images())[0], wanted) and trunk.files.hits == 2


def test_a_write_that_is_cut_short_leaves_nothing_to_read(cached_model, tmp_path, monkeypatch) -> None:
    trunk = cached_model().backbone.vision_backbone.trunk
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trunk(images())
    trunk(images())
    assert (trunk.files.hits, trunk.files.misses) == (0, 3)
    assert sorted(p.suffix for p in stored(tmp_path / "features")) == [".safetensors"] * 2 + [".tmp"]


# ------------------------------------------------------------ the size limit


def put(files: FeatureFiles, number: int, age: int = 0) -> Path:
    """Write file `number`, of 1 KiB and its header, last used `age` seconds ago."""
    name = f"base/{number:064x}"
    files.put(name, torch.full((256,), float(number)))
    path = files.folder / f"{name}.safetensors"
    if age and path.exists():
        now = path.stat().st_mtime
        os.utime(path, (now - age, now - age))
    return path


def numbers(folder: Path) -> list[int]:
    return sorted(int(p.stem, 16) for p in stored(folder))


def test_beyond_the_limit_what_was_unused_for_longest_goes(tmp_path) -> None:
    size = put(FeatureFiles(tmp_path / "probe", 10**9), 1).stat().st_size
    assert 1024 < size < 1200
    folder = tmp_path / "features"
    files = FeatureFiles(folder, 10 * size)
    for number in range(1, 11):
        put(files, number, age=100 - number)
    assert numbers(folder) == list(range(1, 11)) and files.size == 10 * size
    assert files.get(f"base/{1:064x}").tolist() == [1.0] * 256  # used again
    put(files, 11)
    # Eleven files are too many; nine are 90% of the limit. 2 and 3 are the oldest, for 1 was used.
    assert numbers(folder) == [1, *range(4, 12)] and files.size == 9 * size
    assert files.get(f"base/{2:064x}") is None
    put(files, 12)
    assert numbers(folder) == [1, *range(4, 13)] and files.size == 10 * size
    assert FeatureFiles(folder, 5 * size).size == 4 * size and len(numbers(folder)) == 4


def test_processes_that_share_a_folder_keep_the_limit_together(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(FeatureFiles, "LOOK_EVERY", 4)
    size = put(FeatureFiles(tmp_path / "probe", 10**9), 1).stat().st_size
    both = [FeatureFiles(tmp_path / "features", 20 * size) for _ in range(2)]
    most = 0
    for number in range(1, 81):
        put(both[number % 2], number)
        most = max(most, len(numbers(tmp_path / "features")))
    assert 20 <= most <= 20 + 2 * 4


def test_files_of_others_are_neither_counted_nor_removed(tmp_path) -> None:
    others = [tmp_path / "model" / "model.safetensors", tmp_path / f"{0:064x}.safetensors",
              tmp_path / "base" / "notes.tmp", tmp_path / "a" / "b" / f"{0:064x}.safetensors"]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(5000))
    abandoned = tmp_path / "base" / f"{7:064x}.{'a' * 32}.tmp"
    abandoned.write_bytes(bytes(5000))
    files = FeatureFiles(tmp_path, 6000)
    assert files.size == 5000
    put(files, 1, age=10)
    assert put(files, 2).exists() and not abandoned.exists() and all(p.stat().st_size == 5000 for p in others)
    assert files.size == sum(p.stat().st_size for p in (tmp_path / "base").glob("*.safetensors"))


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize("component", ["vision_encoder", "modules_to_save"])
def test_a_trained_vision_encoder_is_refused(tiny, tmp_path, component) -> None:
    options = {"components": {"vision_encoder": ["q"]}} if component == "vision_encoder" else \
        {"components": {}, "modules_to_save": ["backbone.vision_backbone.trunk.ln_pre"]}
    later = copied(tiny)
    Lora(tiny).add(config(**options))
    with pytest.raises(UserError, match=f"vision encoder can be kept only .* lora.{component}|lora.components"):
        cache_features(tiny, tmp_path / "features", 1, "f" * 64)
    assert not (tmp_path / "features").exists()
    cache_features(later, tmp_path / "features", 0.01, "f" * 64)
    Lora(later).add(config(**options))
    with pytest.raises(UserError, match="vision encoder"):
        later.backbone.vision_backbone.trunk(images())


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), True, "50", None])
def test_an_impossible_limit_is_refused(tiny, tmp_path, limit) -> None:
    with pytest.raises(UserError, match="memory.feature_cache_gib="):
        cache_features(tiny, tmp_path, limit, "f" * 64)


def test_a_folder_that_cannot_be_used_is_refused(tiny, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="memory.feature_cache=.*File exists"):
        cache_features(tiny, tmp_path / "file", 1, "f" * 64)
    usage = namedtuple("usage", "total used free")(0, 0, 3 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="memory.feature_cache_gib=4: the disk of .* has room for 3.0 GiB"):
        cache_features(tiny, tmp_path / "features", 4, "f" * 64)
    cache_features(tiny, tmp_path / "features", 2.5, "f" * 64)
    (tmp_path / "features" / f"{'f' * 16}_float32_weights_float32").touch()
    with pytest.raises(UserError, match="memory.feature_cache=.*File exists while writing"):
        tiny.backbone.vision_backbone.trunk(images())


# ------------------------------------------------------------ both in the whole model


def test_a_training_step_is_the_same_with_both_caches(tiny, tmp_path, forward) -> None:
    results = []
    for kept in (False, True, True):
        model = copied(tiny)
        lora = Lora(model)
        torch.manual_seed(0)
        lora.add(config(components={"detr_decoder": ["attention", "feed_forward"]}))
        randomise(lora)
        if kept:
            cache_text(model.backbone.language_backbone)
            cache_features(model, tmp_path / "features", 0.01, "f" * 64)
        out = forward(model)
        sum(o.float().square().mean() for o in out.values()).backward()
        results.append(out | {n: p.grad for n, p in lora.tensors().items()})
    assert any(g.abs().max() > 1e-6 for n, g in results[0].items() if ".lora_A." in n)
    assert same(results[1], results[2])
    for name, wanted in results[0].items():
        torch.testing.assert_close(results[1][name], wanted, rtol=1e-4, atol=1e-5)
