"""The adapters of a whole official model: training, switching, merging, combining."""

import copy
import math

import pytest
import torch
from small_models import close, config, copied, difference, randomise, same, snapshot
from torch import Tensor, nn

from sam3_lora_wrapper.adapters import Lora
from sam3_lora_wrapper.config import LoraConfig
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.layers import Adapted

VARIANTS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init": "pissa"},
    "with biases and full modules": {
        "bias": "all", "modules_to_save": ["dot_prod_scoring", "transformer.decoder.norm"],
    },
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", ["plain", "rsLoRA", "DoRA", "with biases and full modules"])
def test_a_new_adapter_changes_nothing_but_the_rounding_of_attention(tiny, forward, variant: str, training: bool) -> None:
    with torch.no_grad():
        base = forward(tiny.train(training))
        Lora(tiny).add(config(**VARIANTS[variant]))
        assert difference(forward(tiny), base) < 2e-5  # adapted attention is fused, that of the decoder is not
    close(forward(tiny), base)


def test_dropout_of_the_base_is_silenced(tiny_config, forward) -> None:
    """Training mode computes what eval mode does: the reference has dropout and drop path."""
    from sam3_lora_wrapper.base import build_base

    config_ = copy.deepcopy(tiny_config)
    config_["transformer"]["decoder"]["layer"]["dropout"] = 0.3
    config_["backbone"]["visual"]["trunk"]["drop_path_rate"] = 0.3
    model = build_base(config_, "random")
    assert difference(forward(model.train()), forward(model.eval())) > 1e-3
    Lora(model).add(config(dropout=0.5))
    assert all(a.dropout == 0.5 for m in model.lora.modules() for a in m.adapters.values())
    close(forward(model.train()), forward(model.eval()))


def test_every_adapter_gets_a_gradient_and_changes_the_output(tiny, forward) -> None:
    Lora(tiny).add(config())
    randomise(tiny.lora)
    tiny.train()
    sum(v.square().sum() for v in forward(tiny).values()).backward()
    tensors = tiny.lora.tensors()
    assert len(tensors) == 2 * sum(len(t.slices) for t in tiny.lora.named["default"].targets)
    # A key's bias shifts all of a query's scores alike, but its weight does not: none of these is dead.
    dead = [key for key, p in tensors.items() if p.grad is None or p.grad.abs().max() < 1e-9]
    assert not dead
    assert all(p.grad is None for n, p in tiny.named_parameters() if ".adapters." not in n)
    tiny.eval()
    with torch.no_grad():
        reference = forward(tiny)
        for key, parameter in tensors.items():
            if ".lora_B." in key:
                value = parameter.clone()
                parameter.zero_()
                assert difference(forward(tiny), reference) > 1e-7, key
                parameter.copy_(value)
        assert same(forward(tiny), reference)


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_moves_what_it_trains_and_no_bit_of_the_base(tiny, forward, variant: str) -> None:
    base = snapshot(tiny)
    Lora(tiny).add(config(**VARIANTS[variant]))
    before = {k: v.clone() for k, v in tiny.lora.state_dict().items()}
    trained = [p for p in tiny.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
    for _ in range(3):
        optimizer.zero_grad()
        sum(v.square().sum() for v in forward(tiny.train()).values()).backward()
        optimizer.step()
    after = tiny.lora.state_dict()
    still = [k for k in after if torch.equal(after[k], before[k]) and ".start." not in k]
    # Biases of parts that a box prompt does not use, and of keys, which a softmax does not see.
    assert all(k.endswith("bias") for k in still) and len(still) < len(after) / 4
    full = set(tiny.lora.named["default"].full)
    assert all(torch.equal(v, base[k]) for k, v in snapshot(tiny).items() if k not in full)
    with tiny.lora.disable_adapter():
        assert same(snapshot(tiny), base)
    assert same(tiny.lora.state_dict(), after)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merge_keeps_the_outputs_and_unmerge_restores_every_bit(tiny, forward, variant: str) -> None:
    Lora(tiny).add(config(dropout=0.5, **VARIANTS[variant]))
    randomise(tiny.lora)
    tiny.eval()
    with torch.no_grad():
        unmerged, weights = forward(tiny), snapshot(tiny)
        tiny.lora.merge()
        assert tiny.lora.merged and not same(snapshot(tiny), weights)
        close(forward(tiny), unmerged)
        with tiny.lora.disable_adapter():
            assert not tiny.lora.merged
        assert tiny.lora.merged
        close(forward(tiny), unmerged)
        tiny.lora.unmerge()
        assert same(snapshot(tiny), weights) and same(forward(tiny), unmerged)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merge_and_unload_gives_back_a_plain_official_model(tiny, forward, variant: str) -> None:
    plain = copied(tiny)
    Lora(tiny).add(config(**VARIANTS[variant]))
    randomise(tiny.lora)
    with torch.no_grad():
        adapted = forward(tiny.eval())
        model = tiny.lora.merge_and_unload()
        assert model is tiny and not hasattr(model, "lora")
        assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
        assert model.state_dict().keys() == plain.state_dict().keys()
        plain.load_state_dict(model.state_dict(), strict=True)
        close(forward(plain.eval()), adapted)
        assert same(forward(model), forward(plain))
        attributes = [{n: vars(m).keys() for n, m in one.named_modules()} for one in (model, plain)]
        assert attributes[0] == attributes[1]


@torch.no_grad()
def test_disable_adapter_is_the_base_and_changes_nothing_after(tiny, forward) -> None:
    base = forward(tiny.eval())
    Lora(tiny).add(config(modules_to_save=["dot_prod_scoring"]))
    randomise(tiny.lora)
    adapted, trained = forward(tiny), {n for n, p in tiny.named_parameters() if p.requires_grad}
    with pytest.raises(RuntimeError), tiny.lora.disable_adapter():
        assert same(forward(tiny), base)
        raise RuntimeError
    assert same(forward(tiny), adapted)
    assert {n for n, p in tiny.named_parameters() if p.requires_grad} == trained


def test_several_adapters_switch_add_up_and_train_one_alone(tiny, forward) -> None:
    base = forward(tiny.eval())
    lora = Lora(tiny)
    outputs = {}
    for seed, name in enumerate(("first", "second")):
        lora.add(config(components={"detr_decoder": ["q", "fc1"]}), name)
        randomise(lora, name, seed)
        outputs[name] = forward(tiny)
    assert difference(outputs["first"], outputs["second"]) > 1e-3
    lora.set_adapter("first")
    assert same(forward(tiny), outputs["first"])
    lora.set_adapter([])
    assert same(forward(tiny), base) and not any(p.requires_grad for p in tiny.parameters())
    lora.set_adapter(["first", "second"], train="second")
    trained = [n for n, p in tiny.named_parameters() if p.requires_grad]
    assert trained and all(".adapters.second." in n for n in trained)
    module = tiny.get_submodule("transformer.decoder.layers.0.linear1")
    updates = sum(B @ A for A, B in (a.factors() for a in module.adapters.values()))
    torch.testing.assert_close(module.weight, module.base_weight + updates)
    sum(v.square().sum() for v in forward(tiny.train()).values()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in tiny.parameters())


def test_parameters_in_full_follow_their_adapter(tiny) -> None:
    base = tiny.dot_prod_scoring.hs_proj.weight.clone()
    lora = Lora(tiny)
    for value, name in ((1.0, "first"), (2.0, "second")):
        lora.add(config(modules_to_save=["dot_prod_scoring"]), name)
        with torch.no_grad():
            assert torch.equal(tiny.dot_prod_scoring.hs_proj.weight, base)
            tiny.dot_prod_scoring.hs_proj.weight.fill_(value)
    for names, value in ((["first"], 1.0), (["second"], 2.0), ([], base)):
        lora.set_adapter(names)
        assert (tiny.dot_prod_scoring.hs_proj.weight == value).all()
    assert (lora.state_dict("second")["dot_prod_scoring.hs_proj.weight"] == 2.0).all()


@pytest.mark.parametrize("options", [
    ({}, {}), ({"use_rslora": True}, {"rank": 3}), ({"init": "pissa"}, {"alpha": 1}),
    ({"components": {"vision_encoder": ["q"]}, "layers": {"vision_encoder": "last 2"}},
     {"components": {"vision_encoder": ["v"]}}),
])
def test_weighted_sum_of_adapters_is_exact(tiny, options: tuple) -> None:
    tiny.double()
    lora = Lora(tiny)
    components = {"vision_encoder": ["q", "fc1"], "detr_decoder": ["attention"]}
    for seed, (name, changes) in enumerate(zip(("first", "second"), options)):
        lora.add(config(**{"components": components} | changes), name)
        tiny.double()
        randomise(lora, name, seed)
    lora.add_weighted_adapter(["first", "second"], [0.25, -1.5], "sum")
    tiny.double()
    updates = {}
    for name in ("first", "second", "sum"):
        lora.set_adapter(name)
        updates[name] = [(m.adapted_weight() - m.base_weight).detach() for m in lora.modules()]
    assert lora.named["sum"].config == LoraConfig.from_dict(lora.named["sum"].config.to_dict())
    for first, second, total in zip(*updates.values()):
        torch.testing.assert_close(total, 0.25 * first - 1.5 * second, rtol=0, atol=1e-6)
    assert sum(u.abs().sum() for u in updates["sum"]) > 1


@pytest.mark.parametrize("first, weights, said", [
    ({"use_dora": True}, [1, 1], "use_dora"), ({"bias": "all"}, [1, 1], "biases"),
    ({}, [1], "1 weights for 2 adapters"),
    ({"rank": 32}, [1, 1], "rank 34 is above the dimension"),
])
def test_sums_that_cannot_be(tiny, first: dict, weights: list, said: str) -> None:
    lora = Lora(tiny)
    lora.add(config(**first), "first")
    lora.add(config(), "second")
    with pytest.raises(UserError, match=said):
        lora.add_weighted_adapter(["first", "second"], weights, "sum")
    assert list(lora.named) == ["first", "second"]
    assert all(list(m.adapters) == ["first", "second"] for m in lora.modules())


@pytest.mark.parametrize("bias, full", [
    ("none", []),
    ("lora_only", ["ca_text.in_proj_bias", "cross_attn.in_proj_bias", "linear1.bias", "self_attn.in_proj_bias"]),
])
def test_bias_of_the_adapted_modules(tiny, bias: str, full: list) -> None:
    tiny.transformer.decoder.layers = tiny.transformer.decoder.layers[:1]
    Lora(tiny).add(config(bias=bias, components={"detr_decoder": ["q", "fc1"]}))
    found = [n for n, p in tiny.named_parameters() if p.requires_grad and ".adapters." not in n]
    assert sorted(found) == [f"transformer.decoder.layers.0.{name}" for name in full]
    assert found == [] or sorted(found) == list(tiny.lora.named["default"].full)


def test_bias_all_is_every_bias_of_the_model(tiny) -> None:
    biases = {n for n, _ in tiny.named_parameters() if n.endswith("bias")}
    Lora(tiny).add(config(bias="all"))
    assert set(tiny.lora.named["default"].full) == biases and len(biases) > 100


@pytest.mark.parametrize("change, said", [
    (lambda s: s.pop(next(iter(s))), "missing: "),
    (lambda s: s.update(extra=torch.ones(1)), "unexpected: extra"),
    (lambda s: s.update({next(iter(s)): torch.ones(1, 1)}), r"shape of .*: \(1, 1\) in the file"),
    (lambda s: s.update({next(iter(s)): [1.0]}), "is no tensor"),
    (lambda s: next(reversed(s.values())).view(-1)[0].fill_(float("inf")), "NaN or infinity"),
])
def test_tensors_that_do_not_fit_are_not_half_loaded(tiny, change, said: str) -> None:
    Lora(tiny).add(config(modules_to_save=["dot_prod_scoring"]))
    before = {k: v.clone() for k, v in tiny.lora.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    change(state)
    with pytest.raises(UserError, match=said):
        tiny.lora.load_state_dict(state)
    assert same(tiny.lora.state_dict(), before)


def test_loading_replaces_what_is_merged(tiny, forward) -> None:
    Lora(tiny).add(config())
    randomise(tiny.lora)
    state = {k: v.clone() for k, v in tiny.lora.state_dict().items()}
    wanted = forward(tiny.eval())
    randomise(tiny.lora, seed=2)
    tiny.lora.merge()
    tiny.lora.load_state_dict(state)
    assert same(forward(tiny), wanted)


@pytest.mark.parametrize("act, said", [
    (lambda lora: lora.add(config()), "'default': taken"),
    (lambda lora: lora.add(config(), "a.b"), "not a plain word"),
    (lambda lora: lora.add(config(), "train"), "'train': taken"),
    (lambda lora: lora.set_adapter("other"), "no adapter 'other'. There are: default, dora"),
    (lambda lora: lora.set_adapter(["default", "dora"]), "use_dora are not added to others"),
    (lambda lora: lora.set_adapter("default", train="dora"), "not among the active"),
    (lambda lora: Lora(lora.model), "has adapters already"),
    (lambda lora: (lora.set_adapter([]), lora.state_dict()), "name an adapter: active are none"),
])
def test_wrong_uses_say_so(tiny, act, said: str) -> None:
    lora = Lora(tiny)
    lora.add(config())
    lora.add(config(use_dora=True), "dora")
    with pytest.raises(UserError) as error:
        act(lora)
    assert said in str(error.value)


def test_adapter_added_to_a_model_in_eval_mode_drops_nothing(tiny, forward) -> None:
    Lora(tiny.eval()).add(config(dropout=0.9))
    randomise(tiny.lora)
    assert same(forward(tiny), forward(tiny))


@pytest.mark.parametrize("path, shape", [
    ("backbone.vision_backbone.trunk.blocks.1", (1, 12, 12, 96)), ("transformer.encoder.layers.0", (2, 9, 64)),
])
def test_official_blocks_compile_with_no_graph_break_of_ours(tiny, path: str, shape: tuple) -> None:
    def breaks(model: nn.Module) -> tuple[int, Tensor]:
        torch.compiler.reset()
        block, x = model.get_submodule(path), torch.linspace(-1, 1, math.prod(shape)).view(shape)
        arguments = {} if len(shape) == 4 else {"memory": x, "query_pos": x, "pos": x}
        return torch._dynamo.explain(block)(x, **arguments).graph_break_count, block(x, **arguments)

    before, _ = breaks(tiny)
    assert before == 0
    Lora(tiny).add(config())
    randomise(tiny.lora)
    after, eager = breaks(tiny)
    assert after == before
    block = tiny.get_submodule(path)
    assert sum(isinstance(m, Adapted) for m in block.modules()) >= 4 and eager.isfinite().all()
