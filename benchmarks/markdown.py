"""Markdown tables, line by line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def line(cells: Sequence[object]) -> str:
    """| a | b |; an empty cell is one blank."""
    return "|" + "".join(f" {cell} |" if cell != "" else " |" for cell in cells)


def table(about: str, head: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    """A sentence, a blank line, the head, the rule and a line for each row."""
    return [about, "", line(head), "|---" * len(head) + "|", *map(line, rows)]
