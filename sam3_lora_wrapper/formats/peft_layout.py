"""Where each tensor of an adapter stands in PEFT's layout, and the way there and back.

PEFT keeps one pair of factors per module. The factors of q, k and v of a packed weight become
one pair with their ranks side by side: A is stacked, B is block-diagonal. nn.MultiheadAttention
is one module to PEFT, with two pairs of one rank and one scaling: its packed projection and
its `out_proj`; what is not adapted there is zero.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sam3_lora_wrapper.config import LoraConfig
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.layers import scaling
from sam3_lora_wrapper.targets import Target

PREFIX = "base_model.model."
OUT_PROJ = ".base_layer.out_proj"
# PEFT up to 0.21 adds the update of an attention module's out_proj twice (huggingface/peft#3774):
# its B is stored at half its size, so that the outputs are right there.
OUT_PROJ_TIMES = 2


@dataclass(frozen=True)
class PeftLayer:
    """A module that PEFT adapts.

    Args:
        path: its name in the model.
        weights: the adapted weights in it, by the prefix of their tensors.
        rank: rank of their factors.
        scaling: factor of B A, the same for all of them.
    """

    path: str
    weights: dict[str, Target]
    rank: int
    scaling: float


@dataclass(frozen=True)
class Place:
    """Where one of our tensors stands: a part of a tensor of PEFT, which holds it times a factor."""

    own: str
    key: str
    where: tuple
    factor: float = 1.0


@dataclass(frozen=True)
class Layout:
    """All of an adapter's tensors in PEFT's layout.

    Args:
        layers: the modules that PEFT adapts.
        places: of each of our tensors.
        shapes: of each tensor of PEFT.
    """

    layers: list[PeftLayer]
    places: list[Place]
    shapes: dict[str, tuple]


def peft_layer(path: str, weights: dict[str, Target], config: LoraConfig) -> PeftLayer:
    """A module of PEFT; slices that are scaled differently have that folded into B."""
    factor = 2 if config.init == "pissa" else 1
    rank = max(factor * sum(t.rank[k] for k in t.slices) for t in weights.values())
    scalings = {scaling(t.rank[k], t.alpha[k], config.use_rslora) for t in weights.values() for k in t.slices}
    return PeftLayer(path, weights, rank, scalings.pop() if len(scalings) == 1 else 1.0)


def official_layers(model: nn.Module, targets: list[Target], config: LoraConfig) -> list[PeftLayer]:
    """The targets as PEFT adapts them in the official model."""
    modules: dict[str, dict[str, Target]] = {}
    for target in targets:
        path = target.module.removesuffix(".out_proj")
        attention = model.get_submodule(path)
        if hasattr(attention, "in_proj_weight"):
            pair = {path: attention.in_proj_weight, path + OUT_PROJ: attention.out_proj.weight}
            absent = {p: Target(target.component, p, tuple(w.shape), {}, {}, {}) for p, w in pair.items()}
            prefix = path if target.module == path else path + OUT_PROJ
            modules[path] = absent | modules.get(path, {}) | {prefix: target}
        else:
            modules[path] = {path: target}
    return [peft_layer(path, weights, config) for path, weights in modules.items()]


def split_layers(
    targets: list[Target], names: dict[tuple[str, str], str], config: LoraConfig
) -> list[PeftLayer]:
    """The targets for a model in which every layer kind is a module of its own.

    Args:
        targets: the adapted weights.
        names: of these modules, by our module and layer kind.
        config: the adapter's configuration.
    """
    layers = []
    for target in targets:
        for kind, (start, stop) in target.slices.items():
            name = names[target.module, kind]
            alone = replace(target, shape=(stop - start, target.shape[1]), slices={kind: (0, stop - start)})
            layers.append(peft_layer(name, {name: alone}, config))
    return layers


def lay_out(layers: list[PeftLayer], full: dict[str, tuple], config: LoraConfig) -> Layout:
    """Lay an adapter out.

    Args:
        layers: the modules that PEFT adapts.
        full: shapes of the parameters trained in full, by name in the base model.
        config: the adapter's configuration.
    """
    places, shapes = [], {}
    for layer in layers:
        for prefix, target in layer.weights.items():
            rows, columns = target.shape
            shapes[f"{PREFIX}{prefix}.lora_A.weight"] = (layer.rank, columns)
            shapes[f"{PREFIX}{prefix}.lora_B.weight"] = (rows, layer.rank)
            if config.use_dora:
                shapes[f"{PREFIX}{prefix}.lora_magnitude_vector"] = (rows,)
            places += _places(layer, f"{PREFIX}{prefix}", target, config)
    for name, shape in full.items():
        key = _full_key(name, layers)
        shapes[key] = tuple(shape)
        places.append(Place(name, key, (...,)))
    return Layout(layers, places, shapes)


def _places(layer: PeftLayer, prefix: str, target: Target, config: LoraConfig):
    """Places of the tensors of one weight."""
    column = 0
    for kind, (start, stop) in target.slices.items():
        rank, rows = target.rank[kind], slice(start, stop)
        factor = scaling(rank, target.alpha[kind], config.use_rslora) / layer.scaling
        if prefix.endswith(OUT_PROJ):
            factor /= OUT_PROJ_TIMES
        pairs = [(f"lora_A.{kind}", f"lora_B.{kind}", factor)]
        if config.init == "pissa":  # the initial product is subtracted
            pairs.append((f"start.A_{kind}", f"start.B_{kind}", -factor))
        for A, B, sign in pairs:
            ranks = slice(column, column + rank)
            yield Place(f"{target.module}.{A}", f"{prefix}.lora_A.weight", (ranks,))
            yield Place(f"{target.module}.{B}", f"{prefix}.lora_B.weight", (rows, ranks), sign)
            column += rank
        if config.use_dora:
            yield Place(f"{target.module}.lora_magnitude.{kind}", f"{prefix}.lora_magnitude_vector", (rows,))


def _full_key(name: str, layers: list[PeftLayer]) -> str:
    """PEFT's name of a parameter of the base: that of an adapted module is one level deeper."""
    owner, _, leaf = name.rpartition(".")
    adapted = {layer.path for layer in layers}
    if owner in adapted:
        return f"{PREFIX}{owner}.base_layer.{leaf}"
    if owner.removesuffix(".out_proj") in adapted:
        return f"{PREFIX}{owner.removesuffix('.out_proj')}{OUT_PROJ}.base_layer.{leaf}"
    return PREFIX + name


def row_norms(layout: Layout, model: nn.Module) -> dict[str, Tensor]:
    """DoRA's magnitudes of the base weights, by the name of PEFT's tensor: of rows that are not adapted."""
    norms = {}
    for layer in layout.layers:
        for prefix, target in layer.weights.items():
            key = f"{PREFIX}{prefix}.lora_magnitude_vector"
            if key in layout.shapes and target.slices:
                module = model.get_submodule(target.module)
                weight = module.base_weight if module.merged_from is None else module.merged_from
                norms[key] = weight.detach().norm(dim=1)
    return norms


def pack(layout: Layout, own: dict[str, Tensor], norms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors in PEFT's layout.

    Args:
        layout: where they stand.
        own: our tensors by name.
        norms: what row_norms gives, where not all rows of a weight are adapted.
    """
    dtypes = {place.key: own[place.own].dtype for place in layout.places}
    packed = {key: torch.zeros(shape, dtype=dtypes.get(key)) for key, shape in layout.shapes.items()}
    for key, values in norms.items():
        packed[key].copy_(values)
    for place in layout.places:
        packed[place.key][place.where] = (own[place.own] * place.factor).cpu()
    return packed


def unpack(layout: Layout, packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors out of PEFT's layout.

    Raises:
        UserError: a tensor has values where the layout has none.
    """
    own = {place.own: packed[place.key][place.where] / place.factor for place in layout.places}
    rest = {key: tensor.clone() for key, tensor in packed.items() if key.endswith(".lora_B.weight")}
    for place in layout.places:
        if place.key in rest:
            rest[place.key][place.where] = 0
    filled = [key for key, tensor in rest.items() if tensor.any()]
    if filled:
        raise UserError(f"{filled[0]} has values outside of the adapted rows: it was altered")
    return own
