"""The adapters of a model: adding, switching, merging, and their tensors (`model.lora`)."""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .config import KINDS, LoraConfig
from .errors import UserError
from .layers import Adapted, Adapter, adapt, merge, restore, unmerge
from .targets import COMPONENTS, Target, find_targets


@dataclass
class NamedAdapter:
    """One adapter: its configuration, its targets, and the parameters it trains in full.

    `full` maps the name of a base parameter to this adapter's value for it; the value of the
    adapter that is active lives in the model itself.
    """

    config: LoraConfig
    targets: list[Target]
    full: dict[str, Tensor] = field(default_factory=dict)


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
        adapted = [t.module for t in targets if t.module.startswith(path)]
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


def silence_dropout(model: nn.Module) -> None:
    """Set every dropout and drop-path rate to 0.

    The frozen base must stay in train() mode, which its activation checkpointing asks for, but
    must compute what it computes at inference.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for rate in ("drop_prob", "dropout", "dropout_p"):
            if isinstance(getattr(module, rate, None), float) and not isinstance(module, Adapter):
                setattr(module, rate, 0.0)


class Lora:
    """The adapters of an official model, which stays what it is; kept as `model.lora`.

    Args:
        model: an official SAM3 image model (or any module with its names).
        record: what a file must hold to rebuild the base (see checkpoint.py).
    """

    def __init__(self, model: nn.Module, record: dict | None = None):
        self.model, self.record = model, record or {}
        self.named: dict[str, NamedAdapter] = {}
        self.active: tuple[str, ...] = ()
        self._base_full: dict[str, Tensor] = {}
        silence_dropout(model)
        model.requires_grad_(False)
        model.lora = self

    # ------------------------------------------------------------ adding and switching

    def add(self, config: LoraConfig, name: str = "default") -> None:
        """Inject a new adapter and make it the active and trained one.

        Raises:
            UserError: nothing matches, or the name is taken; the model is as it was.
        """
        if name in self.named or not name.isidentifier():
            raise UserError(f"adapter name {name!r}: taken, or not a plain word")
        targets = find_targets(self.model, config)
        full = full_parameters(self.model, config, targets)
        self.unmerge()
        for target in targets:
            module = adapt(self.model.get_submodule(target.module))
            adapter = Adapter(
                target.shape, target.slices, target.rank, target.alpha,
                config.dropout, config.use_rslora, config.use_dora,
            )
            adapter.initialise(module.base_weight, config.init)
            module.adapters[name] = adapter.to(module.base_weight.device)
        parameters = dict(self.model.named_parameters())
        for key in full:
            self._base_full.setdefault(key, parameters[key].detach().clone())
        values = {key: self._base_full[key].clone() for key in full}
        self.named[name] = NamedAdapter(config, targets, values)
        self.set_adapter(name)

    def set_adapter(self, names: str | list[str], train: str | None = None) -> None:
        """Make adapters active (their updates add up) and one of them trainable.

        Args:
            names: the adapters to be active; an empty list is the bare base.
            train: the adapter whose parameters require gradients; the only active one if None.
        """
        names = (names,) if isinstance(names, str) else tuple(names)
        for name in (*names, *([train] if train else [])):
            if name not in self.named:
                raise UserError(f"no adapter {name!r}. There are: {', '.join(self.named) or 'none'}")
        if len(names) > 1 and any(self.named[n].config.use_dora for n in names):
            raise UserError("adapters with use_dora are not added to others: activate one alone")
        if len([n for n in names if self.named[n].full]) > 1:
            raise UserError("two adapters with modules_to_save or biases cannot be active together")
        self.unmerge()
        self._put_full(names)
        self.active = names
        for module in self.modules():
            module.active = tuple(n for n in names if n in module.adapters)
        self.model.requires_grad_(False)
        train = train or (names[0] if len(names) == 1 else None)
        for key, parameter in self.tensors(train).items() if train else ():
            parameter.requires_grad_(".start." not in key)

    def _put_full(self, names: tuple[str, ...]) -> None:
        """Move fully trained parameters: the old adapter's values out, the new one's in."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for old in self.active:
                for key in self.named[old].full:
                    self.named[old].full[key] = parameters[key].detach().clone()
            values = dict(self._base_full)
            for new in names:
                values |= self.named[new].full
            for key, value in values.items():
                parameters[key].copy_(value)

    @contextmanager
    def disable_adapter(self):
        """The bare base within a `with` block."""
        names, trained = self.active, [p for p in self.model.parameters() if p.requires_grad]
        self.set_adapter([])
        try:
            yield self.model
        finally:
            self.set_adapter(list(names))
            self.model.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)

    # ------------------------------------------------------------ merging

    def modules(self) -> list[nn.Module]:
        """The modules that carry adapters."""
        return [m for m in self.model.modules() if isinstance(m, Adapted)]

    def merge(self, keep: bool = True) -> None:
        """Write the active adapters into the weights; `keep` copies so that `unmerge` is exact."""
        for module in self.modules():
            merge(module, keep)

    def unmerge(self) -> None:
        """Put the base weights back, bit for bit."""
        for module in self.modules():
            unmerge(module)

    def merge_and_unload(self) -> nn.Module:
        """Merge, take the adapters out, and return the plain official model."""
        self.merge(keep=False)
        for module in self.modules():
            restore(module)
        del self.model.lora
        return self.model

    # ------------------------------------------------------------ tensors

    def tensors(self, name: str | None = None) -> dict[str, nn.Parameter]:
        """The parameters of an adapter: `<module>.lora_A.<kind>` etc., and those trained in full."""
        name = name or self._only()
        own = {
            f"{target.module}.{key}": parameter
            for target in self.named[name].targets
            for key, parameter in self.model.get_submodule(target.module).adapters[name].named_parameters()
        }
        parameters = dict(self.model.named_parameters())
        return own | {key: parameters[key] for key in self.named[name].full}

    def _only(self) -> str:
        if len(self.active) != 1:
            raise UserError(f"name an adapter: active are {', '.join(self.active) or 'none'}")
        return self.active[0]

    def state_dict(self, name: str | None = None) -> dict[str, Tensor]:
        """The tensors of an adapter, detached."""
        name = name or self._only()
        state = {key: p.detach() for key, p in self.tensors(name).items()}
        return state if name in self.active else state | self.named[name].full

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], name: str | None = None) -> None:
        """Load an adapter's tensors, all of them or none.

        Raises:
            UserError: a tensor is missing, unexpected, of another shape or not finite.
        """
        name = name or self._only()
        own = self.tensors(name)
        problems = [f"missing: {k}" for k in own if k not in state]
        problems += [f"unexpected: {k}" for k in state if k not in own]
        for key in own:
            if key in state and state[key].shape != own[key].shape:
                problems.append(f"shape of {key}: {tuple(state[key].shape)}, not {tuple(own[key].shape)}")
            elif key in state and not torch.isfinite(state[key]).all():
                problems.append(f"NaN or infinity in {key}")
        if problems:
            shown = "\n  ".join(problems[:20])
            raise UserError(f"the adapter does not fit ({len(problems)} tensors):\n  {shown}")
        for key, parameter in own.items():
            if key in self.named[name].full and name not in self.active:
                self.named[name].full[key] = state[key].clone()
            else:
                parameter.copy_(state[key])

    # ------------------------------------------------------------ reports

    def table(self, name: str | None = None) -> str:
        """What an adapter adapts: a line per component, with parameters and their share."""
        name = name or self._only()
        named = self.named[name]
        total = sum(p.numel() for n, p in self.model.named_parameters() if ".adapters." not in n)
        rows = []
        for component in COMPONENTS:
            own = [t for t in named.targets if t.component == component]
            if own:
                kinds = [k for k in KINDS if any(k in t.slices for t in own)]
                rows.append((component, sum(len(t.slices) for t in own), ", ".join(kinds),
                             sum(t.parameters for t in own)))
        if named.full:
            parameters = dict(self.model.named_parameters())
            rows.append(("trained in full", len(named.full), "", sum(parameters[k].numel() for k in named.full)))
        rows.append(("all", sum(r[1] for r in rows), "", sum(r[3] for r in rows)))
        lines = [f"{'component':<18} {'layers':>6}  {'parameters':>11} {'of model':>9}  kinds"]
        lines += [f"{c:<18} {n:>6}  {p:>11,} {100 * p / total:>8.3f}%  {k}" for c, n, k, p in rows]
        return "\n".join(lines) + f"\nbase model: {total:,} parameters, frozen"

    # ------------------------------------------------------------ the official trainer's hooks

    def save_run(self, folder: str, names: list[str], epoch: int) -> None:
        """Write the adapter beside each checkpoint that the trainer has saved."""
        from .checkpoint import save_adapter

        for name in names:
            save_adapter(self, f"{folder}/{'checkpoint_last' if name == 'checkpoint' else f'{name}_adapter'}.pt", epoch)

    def load_run(self, model: nn.Module, state_dict: dict[str, Tensor], ignore_missing_keys=None) -> None:
        """Load the adapter of a checkpoint from which the trainer resumes."""
        self.load_state_dict(state_dict)
