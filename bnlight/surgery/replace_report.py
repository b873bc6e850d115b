"""What replace_norm did, layer by layer: a table when printed."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

_WIDEST = 48


@dataclass(frozen=True)
class Row:
    """One norm layer at one path; `new` is None and `reason` says why if it was left."""

    path: str
    old: str
    new: str | None = None
    carried: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    """State of the new layer that the old one did not have."""
    reason: str = ""
    shared_with: str = ""
    """The first path of the same layer, if this is another one."""


@dataclass(frozen=True)
class Report:
    """The rows, in the model's order; a shared layer has one for each of its paths.

    It holds nothing but text, so it can be saved.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def replaced(self) -> tuple[Row, ...]:
        """The rows of the layers that were replaced."""
        return tuple(row for row in self.rows if row.new is not None)

    @property
    def left(self) -> tuple[Row, ...]:
        """The rows of the layers that stayed."""
        return tuple(row for row in self.rows if row.new is None)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return "\n".join([self._summary(), *_table(self.rows), *self.notes])

    def _summary(self) -> str:
        if not self.rows:
            return "replaced no norm: the model has none"
        layers = [row for row in self.rows if not row.shared_with]
        kinds = Counter((row.old, row.new) for row in layers if row.new is not None)
        what = ", ".join(f"{number} {old} by {new}" for (old, new), number in kinds.items())
        return f"replaced {kinds.total()} of {len(layers)} norms" + (f": {what}" if what else "")


def _table(rows: tuple[Row, ...]) -> list[str]:
    if not rows:
        return []
    lines: list[tuple[str, ...]] = [("path", "was", "is", "carried", "dropped", "new", "note")]
    for row in rows:
        texts = map(_listed, (row.carried, row.dropped, row.fresh))
        note = f"the same layer as {row.shared_with}" if row.shared_with else row.reason
        lines.append((row.path, row.old, row.new or "left", *texts, note))
    columns = [column for column in zip(*lines, strict=True) if any(column[1:])]
    widths = [min(max(map(len, column)), _WIDEST) for column in columns]
    table = []
    for cells in zip(*columns, strict=True):
        wrapped = [_wrapped(cell, width) for cell, width in zip(cells, widths, strict=True)]
        for number in range(max(map(len, wrapped))):
            parts = [cell[number] if number < len(cell) else "" for cell in wrapped]
            table.append("  ".join(p.ljust(w) for p, w in zip(parts, widths, strict=True)).rstrip())
    return table


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names).replace("running_mean, running_var, num_batches_tracked", "running statistics")


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".lstrip()
    return lines
