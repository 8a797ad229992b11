"""The LoRA math on official modules, against the dense formula W + s B A and against PEFT."""

import copy
import math
from itertools import chain, combinations

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from sam3_lora_wrapper.layers import Adapter, adapt, merge, restore, unmerge

VARIANTS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init": "pissa"},
    "DoRA and PiSSA": {"use_dora": True, "init": "pissa"},
}
QKV = [s for n in (1, 2, 3) for s in combinations("qkv", n)]
# Path in the tiny official model, and the layer kinds of the weight, to be adapted all or in part.
LINEAR = {
    "backbone.vision_backbone.trunk.blocks.1.attn.qkv": QKV,
    "backbone.vision_backbone.trunk.blocks.1.attn.proj": [("out",)],
    "backbone.vision_backbone.trunk.blocks.1.mlp.fc1": [("fc1",)],
    "backbone.language_backbone.encoder.transformer.resblocks.0.mlp.c_proj": [("fc2",)],
    "transformer.decoder.layers.0.linear1": [("fc1",)],
}
ATTENTION = {
    "backbone.language_backbone.encoder.transformer.resblocks.0.attn": QKV,
    "transformer.encoder.layers.0.self_attn": QKV,
    "transformer.decoder.layers.0.cross_attn": [("q", "v")],
    "segmentation_head.cross_attend_prompt": [("q", "k", "v")],
}
VIT_QKV, DETR_ATTENTION = "backbone.vision_backbone.trunk.blocks.1.attn.qkv", "transformer.encoder.layers.0.self_attn"
BOTH_FORMS = pytest.mark.parametrize("path, kinds", [(VIT_QKV, ("q", "v")), (DETR_ATTENTION, ("q", "v"))])
CASES = [(p, s) for p, kinds in chain(LINEAR.items(), ATTENTION.items()) for s in kinds]


def add_adapter(module: nn.Module, kinds: tuple, dropout: float = 0.0, init: str = "kaiming", **variant) -> Adapter:
    """Give a module an adapter whose factors are all random; every kind has a rank and alpha of its own."""
    adapt(module)
    weight = module.base_weight
    packed = "qkv" if kinds[0] in "qkv" else kinds
    rows = len(weight) // len(packed)
    slices = {k: (i * rows, (i + 1) * rows) for i, k in enumerate(packed) if k in kinds}
    rank = {k: 2 + i for i, k in enumerate(kinds)}
    alpha = {k: 5.0 - i for i, k in enumerate(kinds)}
    adapter = Adapter(weight.shape, slices, rank, alpha, dropout, **variant).to(weight.dtype)
    adapter.initialise(weight, init)
    with torch.no_grad():
        for name, parameter in adapter.to(weight.dtype).named_parameters():
            if not name.startswith("start."):
                parameter.add_(0.1 * torch.randn_like(parameter))
    module.adapters["default"], module.active = adapter, ("default",)
    adapter.alpha, adapter.rslora = alpha, variant.get("use_rslora", False)
    return adapter


def dense(weight: Tensor, adapter: Adapter) -> Tensor:
    """W + s B A by the definition: each slice alone, DoRA's rows scaled to their magnitudes."""
    rows = list(weight)
    for kind, (start, stop) in adapter.slices.items():
        A, B = adapter.lora_A[kind], adapter.lora_B[kind]
        scale = adapter.alpha[kind] / (math.sqrt(len(A)) if adapter.rslora else len(A))
        block = weight[start:stop] + scale * B @ A
        if adapter.start is not None:
            block = block - scale * adapter.start[f"B_{kind}"] @ adapter.start[f"A_{kind}"]
        if adapter.use_dora:
            norm = torch.linalg.vector_norm(block, dim=1, keepdim=True).detach()
            block = adapter.lora_magnitude[kind][:, None] * block / norm
        rows[start:stop] = block
    return torch.stack(rows)


def call(module: nn.Module, x: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
    """Output of a linear or attention module, with other weights in the place of its own if given."""
    attention = isinstance(module, nn.MultiheadAttention)
    inputs, options = ((x, x, x), {"need_weights": False}) if attention else ((x,), {})
    out = functional_call(module, weights, inputs, options) if weights else module(*inputs, **options)
    return out[0] if isinstance(out, tuple) else out


@pytest.fixture
def official(tiny):
    """A function that gives an official module twice, to adapt and as reference, and an input for it."""
    def pair(path: str, dtype=torch.float64) -> tuple[nn.Module, nn.Module, Tensor]:
        module = tiny.get_submodule(path).to(dtype)
        module.requires_grad_(False)
        if getattr(module, "bias", None) is not None:
            module.bias.requires_grad_(True)
        torch.manual_seed(1)
        width = module.embed_dim if hasattr(module, "embed_dim") else module.in_features
        return module, copy.deepcopy(module), torch.randn(5, 3, width, dtype=dtype, requires_grad=True)
    return pair


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("path, kinds", CASES)
def test_output_and_gradients_equal_the_dense_formula(official, path: str, kinds: tuple, variant: str) -> None:
    module, plain, x = official(path)
    adapters = {"in_proj_weight" if "in_proj_weight" in dict(plain.named_parameters()) else "weight":
                add_adapter(module, kinds, **VARIANTS[variant])}
    if hasattr(plain, "out_proj"):
        adapters["out_proj.weight"] = add_adapter(module.out_proj, ("out",), **VARIANTS[variant])
    parameters = dict(plain.named_parameters())
    weights = {name: dense(parameters[name], adapter) for name, adapter in adapters.items()}
    if "bias" in parameters:
        weights["bias"] = module.bias
    y, expected = call(module, x), call(plain, x, weights)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    trained = [x, *(p for p in module.parameters() if p.requires_grad)]
    assert len(trained) >= 1 + sum(2 * len(a.slices) for a in adapters.values())
    probe = torch.randn_like(y)
    for got, wanted in zip(torch.autograd.grad(y, trained, probe), torch.autograd.grad(expected, trained, probe)):
        assert wanted.abs().max() > 1e-6
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


MASKS = {
    "none": lambda n, heads, t, k: {},
    "causal": lambda n, heads, t, k: {"attn_mask": torch.ones(t, k, dtype=torch.bool).triu(1)},
    "of every head, added": lambda n, heads, t, k: {"attn_mask": torch.randn(n * heads, t, k, dtype=torch.float64)},
    "padding": lambda n, heads, t, k: {"key_padding_mask": torch.arange(k).expand(n, k) > 3},
    "added and padding": lambda n, heads, t, k: {
        "attn_mask": torch.randn(t, k, dtype=torch.float64),
        "key_padding_mask": torch.zeros(n, k, dtype=torch.float64).masked_fill(torch.arange(k) > 2, -torch.inf)},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("same", ["qkv", "qk", "kv", ""])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_equals_the_official_one_for_all_inputs_and_masks(batch_first: bool, same: str, mask: str) -> None:
    torch.manual_seed(0)
    batch, tokens, heads, width = 2, 6, 4, 16
    module = nn.MultiheadAttention(width, heads, batch_first=batch_first, dtype=torch.float64).requires_grad_(False)
    module.in_proj_bias.normal_()
    plain = copy.deepcopy(module)
    add_adapter(module, ("q", "k", "v"))
    keys = tokens if same in ("qkv", "qk") else tokens + 2
    q, k, v = (torch.randn((batch, n, width) if batch_first else (n, batch, width), dtype=torch.float64)
               for n in (tokens, keys, keys))
    k, v = {"qkv": (q, q), "qk": (q, v), "kv": (k, k), "": (k, v)}[same]
    options = MASKS[mask](batch, heads, tokens, keys)
    weights = {"in_proj_weight": dense(plain.in_proj_weight, module.adapters["default"])}
    expected = functional_call(plain, weights, (q, k, v), options)[0]
    torch.testing.assert_close(module(q, k, v, **options)[0], expected, rtol=0, atol=1e-12)
    module.adapters.clear()
    module.active = ()
    unadapted = module(q, k, v, need_weights=False, **options)[0]
    torch.testing.assert_close(unadapted, plain(q, k, v, **options)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["plain", "rsLoRA", "DoRA"])
def test_linear_equals_peft(official, variant: str) -> None:
    module, plain, x = official("transformer.decoder.layers.0.linear1", torch.float32)
    adapter = add_adapter(module, ("fc1",), **VARIANTS[variant])
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["0"], **VARIANTS[variant])
    theirs = peft.get_peft_model(nn.Sequential(plain), config)
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(adapter.lora_A["fc1"])
        layer.lora_B["default"].weight.copy_(adapter.lora_B["fc1"])
        if variant == "DoRA":
            layer.lora_magnitude_vector["default"].weight.copy_(adapter.lora_magnitude["fc1"])
    y, expected = module(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    probe = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, adapter.lora_A["fc1"], adapter.lora_B["fc1"]], probe)
    wanted = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    for a, b in zip(ours, torch.autograd.grad(expected, wanted, probe)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_who_reads_the_weight_sees_the_adapter(official, variant: str) -> None:
    module, plain, x = official("backbone.vision_backbone.trunk.blocks.1.mlp.fc1")
    adapter = add_adapter(module, ("fc1",), **VARIANTS[variant])
    with torch.no_grad():
        torch.testing.assert_close(module.weight, dense(plain.weight, adapter), rtol=0, atol=1e-12)
        read = torch.addmm(module.bias, x[0], module.weight.T)
        torch.testing.assert_close(read, module(x)[0], rtol=0, atol=1e-10)
        assert (read - plain(x)[0]).abs().max() > 1e-2
    assert torch.equal(module.state_dict()["weight"], plain.weight)


@BOTH_FORMS
def test_dropout_drops_inputs_of_a_in_training_alone(official, path: str, kinds: tuple) -> None:
    module, plain, x = official(path)
    adapter = add_adapter(module, kinds, dropout=0.4)
    full = dense(dict(plain.named_parameters())[module.weight_name], adapter) - module.base_weight
    module.eval()
    torch.testing.assert_close(module.adapted_weight() - module.base_weight, full, rtol=0, atol=1e-12)
    module.train()
    torch.manual_seed(0)
    with torch.no_grad():
        updates = torch.stack([module.adapted_weight() - module.base_weight for _ in range(500)])
    kept = (updates != 0).any(1, keepdim=True)
    torch.testing.assert_close(updates, kept * full / 0.6, rtol=0, atol=1e-12)
    # Standard error of a share of 0.6 in 500 draws: 0.022.
    assert (kept.double().mean(0) - 0.6).abs().max() < 0.1
    torch.manual_seed(3)
    y = call(module, x)
    torch.manual_seed(3)
    weight = module.adapted_weight()
    torch.testing.assert_close(y, call(plain, x, {module.weight_name: weight}), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@BOTH_FORMS
@pytest.mark.parametrize("variant", ["plain", "DoRA"])
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_float32(
    official, path: str, kinds: tuple, dtype: torch.dtype, variant: str
) -> None:
    module, plain, x = official(path, torch.float32)
    adapter = add_adapter(module, kinds, **VARIANTS[variant])
    weights = {module.weight_name: dense(dict(plain.named_parameters())[module.weight_name], adapter)}
    expected = call(plain, x, weights)
    wanted = torch.autograd.grad(expected.sum(), [x, *adapter.lora_A.values(), *adapter.lora_B.values()])
    with torch.autocast("cpu", dtype):
        y = call(module, x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    got = torch.autograd.grad(y.float().sum(), [x, *adapter.lora_A.values(), *adapter.lora_B.values()])
    for a, b in zip(got, wanted):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.03 * b.norm()


def test_base_in_bfloat16_stays_in_bfloat16(official) -> None:
    for path, kinds in ((DETR_ATTENTION, ("q",)), ("transformer.decoder.layers.0.linear1", ("fc1",))):
        module, _, x = official(path, torch.bfloat16)
        adapter = add_adapter(module, kinds, use_dora=True).float()
        assert call(module, x).dtype == torch.bfloat16 and adapter.lora_A[kinds[0]].dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
@BOTH_FORMS
def test_activation_checkpointing_changes_no_gradient(official, path: str, kinds: tuple, reentrant: bool) -> None:
    module, _, x = official(path)
    adapter = add_adapter(module, kinds, dropout=0.3)
    trained = list(adapter.parameters())
    gradients = []
    for run in (call, lambda m, x: checkpoint(call, m, x, use_reentrant=reentrant)):
        module.zero_grad()
        torch.manual_seed(0)
        run(module, x).square().sum().backward()
        gradients.append([p.grad.clone() for p in trained])
    for plain, recomputed in zip(*gradients):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(recomputed, plain, rtol=1e-10, atol=1e-10)


def test_linear_keeps_its_input_and_nothing_else_of_its_size(official) -> None:
    module, _, _ = official("backbone.vision_backbone.trunk.blocks.1.mlp.fc1", torch.float32)
    adapter = add_adapter(module, ("fc1",))
    x = torch.randn(4000, module.in_features, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(x)
    own = {p.data_ptr() for p in module.parameters()}
    activations = [t for t in saved if t.data_ptr() not in own and t.numel() > 4000]
    assert [t.data_ptr() for t in activations] == [x.data_ptr()]
    factors = sum(t.numel() for t in saved if t.data_ptr() not in own) - x.numel()
    assert factors <= sum(p.numel() for p in adapter.parameters())


@BOTH_FORMS
@pytest.mark.parametrize("variant", ["plain", "DoRA"])
def test_compiles_without_graph_breaks(official, path: str, kinds: tuple, variant: str) -> None:
    module, _, x = official(path)
    trained = list(add_adapter(module, kinds, **VARIANTS[variant]).parameters())
    torch.compiler.reset()
    compiled = torch.compile(lambda x: call(module, x), backend="aot_eager", fullgraph=True)
    y, expected = compiled(x), call(module, x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    for a, b in zip(torch.autograd.grad(y.sum(), trained), torch.autograd.grad(expected.sum(), trained)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
@BOTH_FORMS
def test_merge_writes_the_dense_weight_and_unmerge_is_exact(official, path: str, kinds: tuple, variant: str) -> None:
    module, plain, x = official(path)
    adapter = add_adapter(module, kinds, dropout=0.5, **VARIANTS[variant])
    base = dict(plain.named_parameters())[module.weight_name]
    merge(module)
    merge(module)
    torch.testing.assert_close(module.state_dict()[module.weight_name], dense(base, adapter), rtol=0, atol=1e-12)
    torch.testing.assert_close(call(module, x), call(plain, x, {module.weight_name: dense(base, adapter)}))
    unmerge(module)
    assert torch.equal(module.base_weight, base) and adapter.training
    cls = type(plain)
    restore(module)
    assert type(module) is cls and torch.equal(call(module, x), call(plain, x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_new_adapter_changes_nothing(official, variant: str) -> None:
    options = dict(VARIANTS[variant])
    init = options.pop("init", "kaiming")
    for path, kinds in CASES:
        module, plain, x = official(path, torch.float32)
        weight = dict(plain.named_parameters())["in_proj_weight" if hasattr(plain, "out_proj") else "weight"]
        rows = len(weight) // (3 if kinds[0] in "qkv" else 1)
        slices = {k: (i * rows, (i + 1) * rows) for i, k in enumerate("qkv" if kinds[0] in "qkv" else kinds)}
        adapter = Adapter(weight.shape, slices, dict.fromkeys(slices, 4), dict.fromkeys(slices, 8), **options)
        adapter.initialise(weight, init)
        adapt(module).adapters["default"] = adapter
        module.active = ("default",)
        if init == "pissa":  # B A - B0 A0 is zero but for the order of additions
            torch.testing.assert_close(call(module, x), call(plain, x), rtol=1e-5, atol=1e-6)
            block = weight[: slices[next(iter(slices))][1]]
            first = next(iter(slices))
            leading = torch.linalg.svdvals(adapter.scaling[first] * adapter.lora_B[first] @ adapter.lora_A[first])[:4]
            torch.testing.assert_close(leading, torch.linalg.svdvals(block)[:4], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(call(module, x), call(plain, x))
