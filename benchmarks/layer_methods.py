"""Ways to give one layer a LoRA adapter, for adapted_layer.py: this library, PEFT, the formula as it is written.

A method takes a layer (nn.Linear or nn.MultiheadAttention) with frozen weights and the factors [(A, B)] of these
weights, A (8, in) and B (out, 8). It returns what is called instead of the layer, and what is trained: for each
weight the list of its A and the list of its B.
"""

from functools import partial

import peft
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sam3_lora_wrapper.layers import Adapter, adapt, scaling

RANK, ALPHA = 8, 16
SCALE = scaling(RANK, ALPHA, use_rslora=False)


def owners(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """Module and name of each weight that is adapted."""
    if isinstance(layer, nn.MultiheadAttention):
        return [(layer, "in_proj_weight"), (layer.out_proj, "weight")]
    return [(layer, "weight")]


def frozen(layer: nn.Module, factors: list):
    return layer, []


def sam3_lora(layer: nn.Module, factors: list, parts: int = 1):
    """This library's adapter; with `parts` the first weight has a pair of factors for each third of its rows."""
    trained = []
    for (module, name), (A, B) in zip(owners(layer), factors):
        weight = getattr(module, name)
        kinds = [f"part{i}" for i in range(parts if module is layer else 1)]
        rows = len(weight) // len(kinds)
        slices = {kind: (i * rows, (i + 1) * rows) for i, kind in enumerate(kinds)}
        adapter = Adapter(weight.shape, slices, dict.fromkeys(kinds, RANK), dict.fromkeys(kinds, ALPHA))
        for kind, (start, stop) in slices.items():
            adapter.lora_A[kind].data, adapter.lora_B[kind].data = A.clone(), B[start:stop].clone()
        adapt(module)
        module.adapters["default"], module.active = adapter, ("default",)
        trained.append((list(adapter.lora_A.values()), list(adapter.lora_B.values())))
    return layer, trained


def with_peft(layer: nn.Module, factors: list):
    holder = nn.ModuleDict({"layer": layer})
    peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"]), holder)
    adapted, trained = holder["layer"], []
    modules = [adapted] if len(factors) == 1 else [adapted, adapted.base_layer.out_proj]
    for module, (A, B) in zip(modules, factors):
        pair = module.lora_A["default"].weight, module.lora_B["default"].weight
        # PEFT 0.21 adds the update of an attention's out_proj twice: half of it gives the same layer.
        pair[0].data, pair[1].data = A.clone(), B.clone() if module is adapted else B / 2
        trained.append(([pair[0]], [pair[1]]))
    return adapted, trained


class LowRank(nn.Module):
    """W + s B A as a parametrization of a weight."""

    def __init__(self, A: Tensor, B: Tensor):
        super().__init__()
        self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())

    def forward(self, weight: Tensor) -> Tensor:
        return weight + SCALE * self.B @ self.A


def weight_space(layer: nn.Module, factors: list):
    parts = [LowRank(A, B) for A, B in factors]
    for (module, name), part in zip(owners(layer), parts):
        parametrize.register_parametrization(module, name, part)
    return layer, [([part.A], [part.B]) for part in parts]


class ActivationSpace(nn.Module):
    """x W' + s (x A') B' for a linear layer, or for the two projections of an attention."""

    def __init__(self, layer: nn.Module, factors: list):
        super().__init__()
        self.layer, self.parts = layer, nn.ModuleList(LowRank(A, B) for A, B in factors)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor, part: LowRank, rows: slice = slice(None)) -> Tensor:
        return F.linear(x, weight[rows], bias[rows]) + SCALE * F.linear(F.linear(x, part.A), part.B[rows])

    def forward(self, x: Tensor, key: Tensor | None = None, value: Tensor | None = None, attn_mask=None, **_unused):
        layer = self.layer
        if key is None:
            return self.project(x, layer.weight, layer.bias, self.parts[0])
        width, qkv = layer.embed_dim, []
        for i, tokens in enumerate((x, key, value)):
            rows = slice(i * width, (i + 1) * width)
            projected = self.project(tokens, layer.in_proj_weight, layer.in_proj_bias, self.parts[0], rows)
            qkv.append(projected.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2))
        out = F.scaled_dot_product_attention(*qkv, attn_mask=attn_mask).transpose(1, 2).flatten(2)
        return self.project(out, layer.out_proj.weight, layer.out_proj.bias, self.parts[1]), None


def activation_space(layer: nn.Module, factors: list):
    module = ActivationSpace(layer, factors)
    return module, [([part.A], [part.B]) for part in module.parts]


METHODS = {
    "frozen layer": frozen,
    "SAM3-LoRA": sam3_lora,
    "SAM3-LoRA, q k v apart": partial(sam3_lora, parts=3),  # as the presets adapt it; three times A
    "PEFT": with_peft,
    "W + s B A": weight_space,
    "x W' + s (x A') B'": activation_space,
}
