"""The adapters of a model: adding, switching, merging, and their tensors (`model.lora`)."""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sam3_lora_wrapper.base import identity
from sam3_lora_wrapper.combine import combined_config
from sam3_lora_wrapper.config import LoraConfig
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.layers import Adapted, Adapter, adapt, merge, restore, unmerge
from sam3_lora_wrapper.plan import table
from sam3_lora_wrapper.targets import Target, find_targets, full_parameters
from sam3_lora_wrapper.tensors import require_tensors


@dataclass
class NamedAdapter:
    """One adapter: its configuration, its targets, and the parameters it trains in full.

    `full` maps the name of a base parameter to this adapter's value for it; the value of the
    adapter that is active lives in the model itself.
    """

    config: LoraConfig
    targets: list[Target]
    full: dict[str, Tensor] = field(default_factory=dict)


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
        record: what a file must hold to rebuild the base (see checkpoint.py); what
            identifies it alone where nothing else is known.

    Raises:
        UserError: the model has adapters already.
    """

    def __init__(self, model: nn.Module, record: dict | None = None):
        if hasattr(model, "lora"):
            raise UserError("this model has adapters already: add another one with model.lora.add")
        self.model, self.record = model, record or identity(model)
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
        self.check_name(name, self.named)
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
            module.adapters[name] = adapter.to(module.base_weight.device).train(module.training)
        parameters = dict(self.model.named_parameters())
        for key in full:
            self._base_full.setdefault(key, parameters[key].detach().clone())
        values = {key: self._base_full[key].clone() for key in full}
        self.named[name] = NamedAdapter(config, targets, values)
        self.set_adapter(name)

    @staticmethod
    def check_name(name: str, taken) -> None:
        """Raise UserError unless a new adapter can be called so."""
        if name in taken or not name.isidentifier() or hasattr(nn.ModuleDict, name):
            raise UserError(f"adapter name {name!r}: taken, or not a plain word")

    @torch.no_grad()
    def add_weighted_adapter(self, names: list[str], weights: list[float], name: str) -> None:
        """Add an adapter whose update is the weighted sum of those of others, exactly.

        Its factors are theirs side by side, so its ranks are the sums of theirs.

        Args:
            names: adapters to sum.
            weights: factor of each one's update.
            name: of the new adapter, which becomes the active one.

        Raises:
            UserError: one of them cannot be summed, or a rank exceeds the dimension of its layer.
        """
        self._require(names)
        if len(weights) != len(names) or not names:
            raise UserError(f"{len(weights)} weights for {len(names)} adapters: give one for each")
        factors: dict[str, list] = {}
        for source, weight in zip(names, weights):
            for target in self.named[source].targets:
                adapter = self.model.get_submodule(target.module).adapters[source]
                for kind in target.slices:
                    A, B = adapter.slice_factors(kind)
                    factors.setdefault(f"{target.module}.{kind}", []).append((A, weight * B))
        ranks = {layer: sum(len(A) for A, _ in parts) for layer, parts in factors.items()}
        self.add(combined_config([self.named[n].config for n in names], ranks), name)
        for target in self.named[name].targets:
            adapter = self.model.get_submodule(target.module).adapters[name]
            for kind in target.slices:
                parts = factors.get(f"{target.module}.{kind}", [])
                if parts:
                    adapter.lora_A[kind].copy_(torch.cat([A for A, _ in parts]))
                    adapter.lora_B[kind].copy_(torch.cat([B for _, B in parts], 1))

    def _require(self, names) -> None:
        for name in names:
            if name not in self.named:
                raise UserError(f"no adapter {name!r}. There are: {', '.join(self.named) or 'none'}")

    def set_adapter(self, names: str | list[str], train: str | None = None) -> None:
        """Make adapters active (their updates add up) and one of them trainable.

        Args:
            names: the adapters to be active; an empty list is the bare base.
            train: the adapter whose parameters require gradients; the only active one if None.
        """
        names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
        self._require(names)
        if train is not None and train not in names:
            raise UserError(f"adapter {train!r} cannot be trained: it is not among the active {list(names)}")
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
        """The bare base within a `with` block; afterwards all is as before."""
        names, trained = self.active, [p for p in self.model.parameters() if p.requires_grad]
        merged = self.merged
        self.set_adapter([])
        try:
            yield self.model
        finally:
            self.set_adapter(list(names))
            self.model.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
            if merged:
                self.merge()

    # ------------------------------------------------------------ merging

    def modules(self) -> list[nn.Module]:
        """The modules that carry adapters."""
        return [m for m in self.model.modules() if isinstance(m, Adapted)]

    @property
    def merged(self) -> bool:
        """Whether the active adapters are in the weights."""
        return any(m.merged_from is not None for m in self.modules())

    def merge(self) -> None:
        """Write the active adapters into the weights; copies are kept, so `unmerge` is exact."""
        for module in self.modules():
            merge(module)

    def unmerge(self) -> None:
        """Put the base weights back, bit for bit."""
        for module in self.modules():
            unmerge(module)

    def merge_and_unload(self) -> nn.Module:
        """Merge, take the adapters out, and return the plain official model."""
        for module in self.modules():
            merge(module)
            restore(module)
        del self.model.lora
        return self.model

    # ------------------------------------------------------------ tensors

    def tensors(self, name: str | None = None) -> dict[str, nn.Parameter]:
        """The parameters of an adapter: `<module>.lora_A.<kind>` etc., and those trained in full."""
        name = name or self.only_active()
        own = {
            f"{target.module}.{key}": parameter
            for target in self.named[name].targets
            for key, parameter in self.model.get_submodule(target.module).adapters[name].named_parameters()
        }
        parameters = dict(self.model.named_parameters())
        return own | {key: parameters[key] for key in self.named[name].full}

    def only_active(self) -> str:
        """Name of the active adapter, where there is one alone."""
        if len(self.active) != 1:
            raise UserError(f"name an adapter: active are {', '.join(self.active) or 'none'}")
        return self.active[0]

    def state_dict(self, name: str | None = None) -> dict[str, Tensor]:
        """The tensors of an adapter, detached."""
        name = name or self.only_active()
        state = {key: p.detach() for key, p in self.tensors(name).items()}
        return state if name in self.active else state | self.named[name].full

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], name: str | None = None) -> None:
        """Load an adapter's tensors, all of them or none.

        Raises:
            UserError: a tensor is missing, unexpected, of another shape or not finite.
        """
        name = name or self.only_active()
        own = self.tensors(name)
        require_tensors(state, {k: p.shape for k, p in own.items()}, "the adapter does not fit the model")
        self.unmerge()
        for key, parameter in own.items():
            if key in self.named[name].full and name not in self.active:
                self.named[name].full[key] = state[key].clone()
            else:
                parameter.copy_(state[key])

    # ------------------------------------------------------------ reports

    def table(self, name: str | None = None) -> str:
        """What an adapter adapts: a line per component, with parameters and their share."""
        named = self.named[name or self.only_active()]
        return table(self.model, named.targets, list(named.full))

    # ------------------------------------------------------------ the official trainer's hooks

    def save_run(self, folder: str, names: list[str], epoch: int) -> None:
        """Write the adapter beside each checkpoint that the trainer has saved: a file and a folder."""
        from sam3_lora_wrapper.checkpoint import save_adapter
        from sam3_lora_wrapper.formats.peft_format import run_record, save_pretrained

        for name in names:
            file = {"checkpoint": "checkpoint_last", "checkpoint_best": name}.get(name, f"{name}_adapter")
            save_adapter(self, f"{folder}/{file}.pt", epoch)
            kept = f"{folder}/adapter{name.removeprefix('checkpoint')}"
            save_pretrained(self, kept, epoch=epoch, run=run_record(folder))

    def load_run(self, model: nn.Module, state_dict: dict[str, Tensor], ignore_missing_keys=None) -> None:
        """Load the adapter of a checkpoint from which the trainer resumes."""
        self.load_state_dict(state_dict)
