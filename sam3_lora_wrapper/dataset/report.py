"""What a check found: kinds of defects, how often each occurs, and examples."""

from collections import Counter
from dataclasses import dataclass, field

LEVELS = ("error", "warning", "filled in")


@dataclass
class Kind:
    """One kind of finding.

    Args:
        level: one of LEVELS.
        count: how often it occurs.
        examples: what was found, and what mending it changes.
        unmendable: how many of them mending cannot change.
    """

    level: str
    count: int = 0
    examples: list[str] = field(default_factory=list)
    unmendable: int = 0


class Report:
    """Findings, counted by kind.

    Args:
        keep: examples to keep of each kind; None for all.
    """

    def __init__(self, keep: int | None = 3):
        self.keep = keep
        self.kinds: dict[str, Kind] = {}
        self.left_out: Counter[str] = Counter()

    def _add(self, level: str, kind: str, where: str, change: str | None) -> None:
        found = self.kinds.setdefault(kind, Kind(level))
        found.count += 1
        found.unmendable += level == "error" and change is None
        if self.keep is None or len(found.examples) < self.keep:
            found.examples.append(f"{where}: {change}" if change else where)

    def error(self, kind: str, where: str, change: str | None) -> None:
        """Add what must not be trained on; `change` says how mending alters it, None that it cannot."""
        self._add("error", kind, where, change)

    def drop(self, section: str, kind: str, where: str) -> None:
        """Add an error that is mended by leaving an entry of `section` out."""
        self.left_out[section] += 1
        self._add("error", kind, where, "left out")

    def join(self, section: str, kind: str, where: str, first: object) -> None:
        """Add an error that is mended by making an entry of `section` one with an earlier one."""
        self.left_out[section] += 1
        self._add("error", kind, where, f"joined with id {first!r}")

    def warning(self, kind: str, where: str) -> None:
        """Add what can be trained on but may not be meant."""
        self._add("warning", kind, where, None)

    def fill(self, kind: str, where: str, value: object) -> None:
        """Add a value that was missing and follows from the rest."""
        self._add("filled in", kind, where, str(value))

    def count(self, level: str) -> int:
        """Number of findings of a level."""
        return sum(k.count for k in self.kinds.values() if k.level == level)

    @property
    def unmendable(self) -> int:
        """Number of errors that mending cannot change."""
        return sum(k.unmendable for k in self.kinds.values())

    def lines(self, level: str) -> list[str]:
        """A line per kind of a level, most frequent first, each with its examples below."""
        found = [(name, k) for name, k in self.kinds.items() if k.level == level]
        lines = []
        for name, kind in sorted(found, key=lambda item: -item[1].count):
            lines.append(f"{level}: {name}: {kind.count:,}")
            lines += [f"    {example}" for example in kind.examples]
        return lines

    def text(self) -> str:
        """All findings, errors first."""
        return "\n".join(line for level in LEVELS for line in self.lines(level))
