"""The table and the pictures of gpu.py's rows."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import markdown
from tables import where

from llmfp4_kernels.errors import BadFile
from llmfp4_kernels.packed import write_beside

BASE = "cuBLAS bf16"
TRITON, RIVALS_OF_TRITON = " [triton]", ("torch int4", "gemlite")
Key = tuple[int, int]


def by_shape(rows: list[dict]) -> dict[Key, list[dict]]:
    found: dict[Key, list[dict]] = {}
    for row in rows:
        found.setdefault((row["n"], row["k"]), []).append(row)
    return found


def _cell(row: dict | None, base: dict | None) -> str:
    if row is None:
        return "–"
    ratio = f"{base['seconds'] / row['seconds']:.2f}×, " if base else ""
    return f"{row['seconds'] * 1e6:,.1f} ({ratio}{row['floor']:.0%})"


def table(key: Key, rows: list[dict]) -> list[str]:
    """Everyone's time for each m; in brackets the ratio to cuBLAS bf16, and the share of the floor."""
    (n, k), first = key, rows[0]
    ms = sorted({row["m"] for row in rows})
    at = {(row["name"], row["m"]): row for row in rows}
    about = f"{first['gpu']}, {where(first)}, copies move {first['copy_gbps']:,.0f} GB/s"
    about = (
        f"n = {n}, k = {k} ({about}): µs of one product, times faster than {BASE}, and share of the floor: the bytes "
        "of weight, x and y at the speed of a copy."
    )
    names = dict.fromkeys(row["name"] for row in rows)
    cells = ([name, *(_cell(at.get((name, m)), at.get((BASE, m))) for m in ms)] for name in names)
    return markdown.table(about, ["m", *ms], cells)


def triton_table(rows: list[dict]) -> list[str]:
    """How many times faster than others Triton's kernels are; none without rows of theirs. By the goal, at least 0.8
    times our CUDA kernels' speed at every m, and more than gemlite's at m ≤ 64."""
    ms, at = sorted({row["m"] for row in rows}), {(row["name"], row["m"]): row["seconds"] for row in rows}
    names = [name for name in dict.fromkeys(row["name"] for row in rows) if name.endswith(TRITON)]
    others = {name for name, _ in at}
    lines = []
    for name in names:
        cuda = name.removesuffix(TRITON)
        for other in (cuda, *sorted(o for o in others if o == BASE or o.startswith(RIVALS_OF_TRITON))):
            ratios = [at[other, m] / at[name, m] if {(other, m), (name, m)} <= set(at) else None for m in ms]
            cells = [f"{ratio:.2f}×" if ratio else "–" for ratio in ratios]
            against = "our CUDA kernel" if other == cuda else other
            lines.append(f"| {name} | {against} | " + " | ".join(cells) + " |")
    head = "| Triton's | than | " + " | ".join(f"m = {m}" for m in ms) + " |"
    return ["How many times faster:", "", head, "|---" * (len(ms) + 2) + "|", *lines] if lines else []


def draw(key: Key, rows: list[dict], path: Path) -> Path:
    """Time over m, ours in solid lines, and the floor of the smallest weight."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 7), layout="constrained")
    ms = sorted({row["m"] for row in rows})
    for name in dict.fromkeys(row["name"] for row in rows):
        points = sorted((row["m"], row["seconds"] * 1e6) for row in rows if row["name"] == name)
        ours = next(row["ours"] for row in rows if row["name"] == name)
        look = dict(linestyle="-", linewidth=2) if ours else dict(linestyle="--", linewidth=1.1)
        axes.plot(*zip(*points), label=name, marker="o", markersize=3, **look)
    floor = [min(row["bytes"] / row["copy_gbps"] / 1e3 for row in rows if row["m"] == m) for m in ms]
    axes.plot(ms, floor, color="black", linewidth=0.8, label="floor of the fewest bytes")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="m, tokens",
        ylabel="µs",
        title=f"{rows[0]['gpu']}, n = {key[0]}, k = {key[1]}",
    )
    axes.set_xticks(ms, [str(m) for m in ms], minor=False)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, ncols=2)
    beside = path.with_suffix(".part.png")
    figure.savefig(beside, dpi=100)
    pyplot.close(figure)
    os.replace(beside, path)
    return path


def write(rows: list[dict], out: Path) -> list[Path]:
    """OUT.md and, where matplotlib is there, a picture for each shape; returns their paths."""
    if not rows:
        raise BadFile(f"{out} has no rows of gpu.py")
    shapes = by_shape(rows)
    written = [out.with_suffix(".md")]
    parts = [part for key, found in shapes.items() for part in (table(key, found), triton_table(found)) if part]
    text = "\n\n".join("\n".join(part) for part in parts) + "\n"
    write_beside(written[0], lambda beside: beside.write_text(text))
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures: there is no matplotlib")
        return written
    for (n, k), found in shapes.items():
        written.append(draw((n, k), found, out.with_name(f"{out.stem}-{n}x{k}.png")))
    return written
