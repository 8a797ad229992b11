"""What a configuration adapts: components, layer kinds, blocks, patterns, and its mistakes."""

import time

import pytest
import torch
from omegaconf import OmegaConf
from small_models import EVERYTHING

from sam3_lora_wrapper.adapters import Lora
from sam3_lora_wrapper.base import official_image_model
from sam3_lora_wrapper.config import LoraConfig, expand_kinds
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.launch import compose_config
from sam3_lora_wrapper.plan import plan
from sam3_lora_wrapper.targets import find_targets

VISION = "backbone.vision_backbone.trunk.blocks"
TEXT = "backbone.language_backbone.encoder.transformer.resblocks"


def layers(model, **config) -> dict[str, tuple[int, int]]:
    """Rows of each adapted layer, by its name."""
    targets = find_targets(model, LoraConfig(**config))
    return {f"{t.module}.{kind}": rows for t in targets for kind, rows in t.slices.items()}


@pytest.fixture(scope="module")
def full_size() -> torch.nn.Module:
    """The official model of 840M parameters, without their values."""
    with torch.device("meta"):
        return official_image_model()


@pytest.mark.parametrize("preset, parameters", [
    ("lora_minimal", 516_096), ("lora_base", 4_161_536), ("lora_full", 9_744_384),
])
def test_trained_parameters_of_the_full_model(full_size, preset: str, parameters: int) -> None:
    cfg = compose_config(preset, ["paths.dataset_root=/data"])
    targets = find_targets(full_size, LoraConfig.from_dict(OmegaConf.to_container(cfg.lora)))
    assert sum(t.parameters for t in targets) == parameters


# Parameters per rank of each component and group, as counted by hand from the official shapes.
@pytest.mark.parametrize("component, group, per_rank", [
    ("vision_encoder", "attention", 262_144), ("vision_encoder", "feed_forward", 368_640),
    ("text_encoder", "attention", 196_608), ("text_encoder", "feed_forward", 245_760),
    ("detr_encoder", "attention", 24_576), ("detr_encoder", "feed_forward", 27_648),
    ("detr_decoder", "attention", 36_864), ("detr_decoder", "feed_forward", 27_648),
    ("geometry_encoder", "attention", 12_288), ("geometry_encoder", "feed_forward", 13_824),
    ("segmentation_head", "attention", 2_048),
])
def test_every_component_has_all_its_layers(full_size, component: str, group: str, per_rank: int) -> None:
    targets = find_targets(full_size, LoraConfig(rank=3, components={component: [group]}))
    assert sum(t.parameters for t in targets) == 3 * per_rank


def test_injecting_into_the_full_model_takes_seconds_at_most() -> None:
    with torch.device("meta"):
        model = official_image_model()
    start = time.perf_counter()
    Lora(model, {"fingerprint": "", "parameters": 840_509_750}).add(LoraConfig(components=EVERYTHING))
    assert time.perf_counter() - start < 10
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 9_744_384 and "840,509,750 parameters, frozen" in model.lora.table()


def test_kinds_choose_rows_of_packed_weights(tiny) -> None:
    components = {"vision_encoder": ["v", "q"], "text_encoder": ["k", "out"]}
    found = layers(tiny, rank=2, components=components, layers={"vision_encoder": [0, 0]})
    assert found == {
        f"{VISION}.0.attn.qkv.q": (0, 96), f"{VISION}.0.attn.qkv.v": (192, 288),
        f"{TEXT}.0.attn.k": (32, 64), f"{TEXT}.0.attn.out_proj.out": (0, 32),
    }


@pytest.mark.parametrize("choice, blocks", [
    (None, "0123"), ([1, 2], "12"), ([3, 3], "3"), ("last 1", "3"), ("last 4", "0123"), ("first 2", "01"),
])
def test_blocks(tiny, choice, blocks: str) -> None:
    found = layers(tiny, rank=2, components={"vision_encoder": ["fc1"]}, layers={"vision_encoder": choice})
    assert list(found) == [f"{VISION}.{b}.mlp.fc1.fc1" for b in blocks]


def test_groups_name_their_kinds() -> None:
    assert expand_kinds(["feed_forward", "v", "fc1"]) == ("v", "fc1", "fc2")
    assert expand_kinds(["attention"]) == ("q", "k", "v", "out")


def test_patterns_set_rank_and_alpha_of_single_layers(tiny) -> None:
    targets = find_targets(tiny, LoraConfig(
        rank=4, alpha=8, components={"detr_decoder": ["q", "v", "fc1"]},
        rank_pattern={"*.layers.1.*": 3, "*.layers.0.self_attn.q": 2},
        alpha_pattern={"*.fc1": 1.5},
    ))
    by_name = {t.module: t for t in targets}
    decoder = "transformer.decoder.layers"
    assert by_name[f"{decoder}.0.self_attn"].rank == {"q": 2, "v": 4}
    assert by_name[f"{decoder}.1.self_attn"].rank == {"q": 3, "v": 3}
    assert by_name[f"{decoder}.2.linear1"].rank == {"fc1": 4}
    assert by_name[f"{decoder}.2.linear1"].alpha == {"fc1": 1.5}
    assert by_name[f"{decoder}.2.self_attn"].alpha == {"q": 8, "v": 8}


@pytest.mark.parametrize("config, said", [
    ({"rank": 0}, "lora.rank=0"),
    ({"rank": 2.5}, "lora.rank=2.5"),
    ({"rank": True}, "lora.rank=True"),
    ({"alpha": -1}, "lora.alpha=-1"),
    ({"alpha": float("inf")}, "lora.alpha=inf"),
    ({"alpha": float("nan")}, "lora.alpha=nan"),
    ({"dropout": 1.0}, "lora.dropout=1.0"),
    ({"bias": "some"}, "none, lora_only, all"),
    ({"init": "eva"}, "kaiming, pissa"),
    ({"rnak": 8}, "lora.rnak: no such key. Known: rank, alpha"),
    ({"use_dora": "yes"}, "lora.use_dora='yes'"),
    ({"components": ["vision_encoder"]}, "lora.components"),
    ({"components": {"vision_encoder": [["q"]]}}, "no layer kind ['q']"),
    ({"modules_to_save": [1]}, "lora.modules_to_save=[1]"),
    ({"rank_pattern": None}, "lora.rank_pattern=None"),
    ({"rank_pattern": {"*": 0}}, "rank_pattern[*]=0"),
    ({"alpha_pattern": {"*": "2"}}, "alpha_pattern[*]='2'"),
    ({"components": {"vision_encoder": "q"}}, "must be a list of layer kinds"),
    ({"components": {"vision_encoder": ["qkv"]}}, "no layer kind 'qkv'. Known: attention, feed_forward, q"),
    ({"components": {"vision_encoder": []}, "layers": {"vision_encoder": "last 2"}}, "would not be adapted"),
    ({"rank": 33}, "rank 33 is above the dimension of backbone.language_backbone"),
    ({"components": {"vision": ["q"]}}, "lora.components.vision: no such component. Known: vision_encoder"),
    ({"components": {"segmentation_head": ["fc1"]}}, "it has no layer of kind fc1. It has: k, out, q, v"),
    ({"components": {}}, "nothing is adapted"),
    ({"layers": {"vision_encoder": [2, 4]}}, "within its 4 blocks (0 to 3)"),
    ({"layers": {"vision_encoder": [2, 1]}}, "lora.layers.vision_encoder=[2, 1]"),
    ({"layers": {"vision_encoder": "last 5"}}, "within its 4 blocks"),
    ({"layers": {"vision_encoder": "some"}}, "`last N`"),
    ({"layers": {"segmentation_head": [0, 0]}}, "it has no blocks"),
    ({"layers": {"decoder": [0, 0]}, "components": EVERYTHING | {"decoder": ["q"]}}, "decoder: no such component"),
    ({"rank_pattern": {"*.qkv": 2}}, "lora.rank_pattern: '*.qkv' matches no adapted layer"),
    ({"rank_pattern": {"*.q": 2, "transformer.*": 3}}, "matches patterns that disagree"),
    ({"modules_to_save": ["dot_prod_scorign"]}, "no module 'dot_prod_scorign'"),
    ({"modules_to_save": ["transformer.decoder"]}, "in full and transformer.decoder.layers.0.linear1 in it adapted"),
])
def test_mistakes_name_field_and_value_and_leave_the_model_alone(tiny, config: dict, said: str) -> None:
    before = {name: type(module) for name, module in tiny.named_modules()}
    lora = Lora(tiny)
    with pytest.raises(UserError) as error:
        lora.add(LoraConfig.from_dict({"components": EVERYTHING, "rank": 2} | config))
    assert said in str(error.value)
    assert {name: type(module) for name, module in tiny.named_modules()} == before and not lora.named


def test_a_module_of_a_similar_name_may_be_trained_in_full(tiny) -> None:
    """`transformer.decoder.layers.1` is not inside `transformer.decoder.layers.10`, nor the reverse."""
    norm = "transformer.encoder.layers.0.norm1"
    Lora(tiny).add(LoraConfig(rank=2, components={"detr_encoder": ["q"]}, modules_to_save=[norm]))
    assert list(tiny.lora.named["default"].full) == [f"{norm}.bias", f"{norm}.weight"]


def test_component_that_a_model_lacks(tiny) -> None:
    tiny.segmentation_head = None
    with pytest.raises(UserError, match="segmentation_head: this model has none. It has: vision_encoder, text"):
        layers(tiny, components=EVERYTHING)


def test_plan_lists_the_full_model_without_building_weights() -> None:
    listing = plan("lora_base.yaml", [
        "lora.layers.vision_encoder='last 1'", "lora.modules_to_save=[dot_prod_scoring.hs_proj]",
    ])
    assert f"{VISION}.31.attn.qkv.q  rank 8, alpha 16\n" in listing and f"{VISION}.30." not in listing
    assert "dot_prod_scoring.hs_proj.weight  in full" in listing
    expected = 4_161_536 - 31 * 8 * 8 * 1024 + 256 * 257
    assert f"{expected:,}" in listing and "840,509,750 parameters" in listing
