"""Which layers are adapted: components, layer kinds and blocks of the official model."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from sam3_lora_wrapper.config import LoraConfig, expand_kinds
from sam3_lora_wrapper.errors import UserError

COMPONENTS = {
    "vision_encoder": "backbone.vision_backbone.trunk.blocks",
    "text_encoder": "backbone.language_backbone.encoder.transformer.resblocks",
    "geometry_encoder": "geometry_encoder.encode",
    "detr_encoder": "transformer.encoder.layers",
    "detr_decoder": "transformer.decoder.layers",
    "segmentation_head": "segmentation_head",
}
FEED_FORWARD = {
    "fc1": "fc1", "fc2": "fc2", "c_fc": "fc1", "c_proj": "fc2", "linear1": "fc1", "linear2": "fc2",
}


@dataclass(frozen=True)
class Target:
    """One weight to adapt.

    Args:
        component: key of COMPONENTS.
        module: full name of the module that owns the weight.
        shape: (out, in) of the weight.
        slices: rows of each adapted layer kind.
        rank: rank of each kind.
        alpha: alpha of each kind.
    """

    component: str
    module: str
    shape: tuple[int, int]
    slices: dict
    rank: dict
    alpha: dict

    @property
    def parameters(self) -> int:
        """Number of parameters that adapting this weight adds."""
        return sum(
            self.rank[k] * (stop - start + self.shape[1]) for k, (start, stop) in self.slices.items()
        )


def _weights(module: nn.Module, name: str):
    """(module name, weight, its layer kinds in row order) for each weight that `module` owns."""
    # By shape, not by class: later versions of SAM3 have an attention class of their own.
    if isinstance(module, nn.MultiheadAttention):
        yield name, module.in_proj_weight, ("q", "k", "v")
        yield f"{name}.out_proj", module.out_proj.weight, ("out",)
    elif isinstance(getattr(module, "qkv", None), nn.Linear):
        yield f"{name}.qkv", module.qkv.weight, ("q", "k", "v")
        yield f"{name}.proj", module.proj.weight, ("out",)
    for child, kind in FEED_FORWARD.items():
        layer = module._modules.get(child)
        if isinstance(layer, nn.Linear):
            yield f"{name}.{child}", layer.weight, (kind,)


def component_module(model: nn.Module, component: str) -> nn.Module | None:
    """Root module of a component, or None where the model has none."""
    try:
        return model.get_submodule(COMPONENTS[component])
    except AttributeError:
        return None


def _selected_blocks(choice, root: nn.Module, component: str) -> range | None:
    """Blocks that an entry of `lora.layers` names; None for all."""
    if choice is None:
        return None
    if not isinstance(root, nn.ModuleList):
        raise UserError(f"lora.layers.{component}={choice!r}: it has no blocks. Set it to null")
    count = len(root)
    words = choice.split() if isinstance(choice, str) else None
    if words and len(words) == 2 and words[0] in ("first", "last") and words[1].isdigit():
        size = int(words[1])
        if 1 <= size <= count:
            return range(size) if words[0] == "first" else range(count - size, count)
    elif isinstance(choice, (list, tuple)) and len(choice) == 2 and all(isinstance(c, int) for c in choice):
        if 0 <= choice[0] <= choice[1] < count:
            return range(choice[0], choice[1] + 1)
    raise UserError(
        f"lora.layers.{component}={choice!r}: must be [first, last], `first N` or `last N` "
        f"within its {count} blocks (0 to {count - 1})"
    )


def _pattern_value(config: LoraConfig, what: str, layer: str):
    """`rank` or `alpha` of a layer: that of the pattern that matches it; two that disagree are an error."""
    patterns = getattr(config, f"{what}_pattern")
    values = {p: v for p, v in patterns.items() if fnmatchcase(layer, p)}
    if len(set(values.values())) > 1:
        raise UserError(f"lora.{what}_pattern: {layer} matches patterns that disagree: {values}")
    return next(iter(values.values()), getattr(config, what))


def _component_targets(model: nn.Module, component: str, config: LoraConfig):
    """Targets of one component; what it has none of is an error that names what exists."""
    root, path = component_module(model, component), COMPONENTS[component]
    if root is None:
        there = [c for c in COMPONENTS if component_module(model, c) is not None]
        raise UserError(f"lora.components.{component}: this model has none. It has: {', '.join(there)}")
    wanted = expand_kinds(config.components[component])
    blocks = _selected_blocks(config.layers.get(component), root, component)
    targets, existing = [], set()
    for name, module in root.named_modules(prefix=path):
        block = name[len(path) + 1:].split(".")[0]
        for owner, weight, kinds in _weights(module, name):
            existing.update(kinds)
            if blocks is not None and int(block) not in blocks:
                continue
            rows = weight.shape[0] // len(kinds)
            slices = {k: (i * rows, (i + 1) * rows) for i, k in enumerate(kinds) if k in wanted}
            if slices:
                targets.append(_target(component, owner, weight.shape, slices, config))
    absent = [kind for kind in wanted if kind not in existing]
    if absent:
        raise UserError(
            f"lora.components.{component}: it has no layer of kind {', '.join(absent)}. "
            f"It has: {', '.join(sorted(existing))}"
        )
    return targets


def _target(component: str, owner: str, shape, slices: dict, config: LoraConfig) -> Target:
    rank = {k: _pattern_value(config, "rank", f"{owner}.{k}") for k in slices}
    alpha = {k: _pattern_value(config, "alpha", f"{owner}.{k}") for k in slices}
    for kind, (start, stop) in slices.items():
        limit = min(stop - start, shape[1])
        if rank[kind] > limit:
            raise UserError(
                f"lora: rank {rank[kind]} is above the dimension of {owner} ({kind}: {stop - start} x "
                f"{shape[1]}): at most {limit} there. Lower lora.rank, or give that layer a lora.rank_pattern"
            )
    return Target(component, owner, tuple(shape), slices, rank, alpha)


def find_targets(model: nn.Module, config: LoraConfig) -> list[Target]:
    """All weights that a configuration adapts, in the model's order.

    Works on a model on the meta device too, so a plan can be listed without any weights.

    Raises:
        UserError: a component, layer kind, block or pattern matches nothing.
    """
    for section in ("components", "layers"):
        unknown = [c for c in getattr(config, section) if c not in COMPONENTS]
        if unknown:
            raise UserError(f"lora.{section}.{unknown[0]}: no such component. Known: {', '.join(COMPONENTS)}")
    targets = []
    for component, kinds in config.components.items():
        if kinds:
            targets += _component_targets(model, component, config)
    layers = [f"{t.module}.{k}" for t in targets for k in t.slices]
    for what in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, what):
            if not any(fnmatchcase(layer, pattern) for layer in layers):
                raise UserError(f"lora.{what}: {pattern!r} matches no adapted layer, e.g. {layers[:1]}")
    if not targets and not config.modules_to_save and config.bias != "all":
        raise UserError("lora.components: nothing is adapted. Give at least one component a layer kind")
    return targets


def full_parameters(model: nn.Module, config: LoraConfig, targets: list[Target]) -> list[str]:
    """Names of the base parameters that an adapter trains in full (modules_to_save, bias)."""
    parameters = {n for n, _ in model.named_parameters() if ".adapters." not in n}
    chosen = set()
    for path in config.modules_to_save:
        inside = {n for n in parameters if n.startswith(f"{path}.")}
        if not inside:
            near = sorted({n.rsplit(".", 1)[0] for n in parameters if path.split(".")[-1] in n})[:5]
            raise UserError(
                f"lora.modules_to_save: no module {path!r} with parameters. "
                f"Close: {', '.join(near) or ', '.join(n for n, _ in model.named_children())}"
            )
        adapted = [t.module for t in targets if f"{t.module}.".startswith(f"{path}.")]
        if adapted:
            raise UserError(f"lora.modules_to_save: {path} is trained in full and {adapted[0]} in it adapted")
        chosen |= inside
    owners = {t.module for t in targets}
    for name in parameters:
        owner, _, leaf = name.rpartition(".")
        if leaf in ("bias", "in_proj_bias") and (
            config.bias == "all" or (config.bias == "lora_only" and owner in owners)
        ):
            chosen.add(name)
    return sorted(chosen)
