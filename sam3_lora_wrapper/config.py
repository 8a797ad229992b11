"""What is adapted and how: the `lora` section of a configuration."""

import math
from dataclasses import asdict, dataclass, field, fields

from sam3_lora_wrapper.errors import UserError

TYPES = {
    "components": dict, "layers": dict, "rank_pattern": dict, "alpha_pattern": dict,
    "modules_to_save": (list, tuple), "use_rslora": bool, "use_dora": bool,
}
CHOICES = {"bias": ("none", "lora_only", "all"), "init": ("kaiming", "pissa")}
KINDS = ("q", "k", "v", "out", "fc1", "fc2")
GROUPS = {"attention": ("q", "k", "v", "out"), "feed_forward": ("fc1", "fc2")}


def expand_kinds(kinds) -> tuple[str, ...]:
    """Layer kinds that a list of kinds and groups names, in the order of KINDS."""
    named = {kind for entry in kinds for kind in GROUPS.get(entry, (entry,))}
    return tuple(kind for kind in KINDS if kind in named)


class Section:
    """Mixin of a dataclass that holds a section of a configuration."""

    section = ""

    @classmethod
    def from_dict(cls, values):
        """Build from a mapping; an unknown key is an error that lists the known ones."""
        known = [f.name for f in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise UserError(f"{cls.section}.{unknown[0]}: no such key. Known: {', '.join(known)}")
        return cls(**values)


@dataclass(frozen=True)
class LoraConfig(Section):
    """The `lora` section, checked.

    Args:
        rank: r, the number of columns of B and rows of A.
        alpha: the update is scaled by alpha / rank.
        dropout: share of A's input features dropped in training.
        components: for each component, the layer kinds to adapt: any of `attention` (q, k, v,
            out), `feed_forward` (fc1, fc2) or single kinds.
        layers: for each component, which of its blocks: [first, last], `last N` or `first N`;
            all where it is not named.
        rank_pattern: rank of the layers whose name matches a pattern (fnmatch over
            `<module>.<kind>`), instead of `rank`.
        alpha_pattern: the same for alpha.
        modules_to_save: modules trained in full and stored with the adapter.
        bias: `none`, `lora_only` (of the adapted modules) or `all`: biases trained and stored.
        use_rslora: scale by alpha / sqrt(rank).
        use_dora: weight-decomposed LoRA.
        init: `kaiming` or `pissa`.

    Raises:
        UserError: a value is impossible; the message names the field and the value.
    """

    section = "lora"

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    components: dict = field(default_factory=dict)
    layers: dict = field(default_factory=dict)
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict = field(default_factory=dict)
    modules_to_save: list = field(default_factory=list)
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init: str = "kaiming"

    def to_dict(self) -> dict:
        """The section as plain values, for files."""
        return asdict(self)

    def __post_init__(self):
        self._check_types()
        self._check_numbers()
        self._check_components()

    def _check_types(self) -> None:
        for name, expected in TYPES.items():
            if not isinstance(getattr(self, name), expected):
                what = {dict: "a mapping", bool: "true or false"}.get(expected, "a list")
                raise UserError(f"lora.{name}={getattr(self, name)!r}: must be {what}")
        if not all(isinstance(path, str) for path in self.modules_to_save):
            raise UserError(f"lora.modules_to_save={self.modules_to_save!r}: must be a list of names")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"lora.{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}")

    def _check_numbers(self) -> None:
        ranks = {"rank": self.rank} | {f"rank_pattern[{k}]": v for k, v in self.rank_pattern.items()}
        for name, value in ranks.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"lora.{name}={value!r}: must be a whole number of at least 1")
        alphas = {"alpha": self.alpha} | {f"alpha_pattern[{k}]": v for k, v in self.alpha_pattern.items()}
        for name, value in alphas.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise UserError(f"lora.{name}={value!r}: must be a number above 0")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout={self.dropout!r}: must be in [0, 1)")

    def _check_components(self) -> None:
        for component, kinds in self.components.items():
            if not isinstance(kinds, (list, tuple)):
                raise UserError(f"lora.components.{component}={kinds!r}: must be a list of layer kinds")
            for kind in kinds:
                if kind not in (*KINDS, *GROUPS):
                    raise UserError(
                        f"lora.components.{component}: no layer kind {kind!r}. "
                        f"Known: {', '.join([*GROUPS, *KINDS])}"
                    )
        for component, blocks in self.layers.items():
            if blocks is not None and not self.components.get(component):
                raise UserError(
                    f"lora.layers.{component}={blocks!r}: lora.components.{component} names no layer kind, "
                    "so these blocks would not be adapted. Give it kinds, or set this to null"
                )
