"""Pictures of gemm.py's result files, gemm-NxK-Tt.png beside them: python benchmarks/plot.py --help.

Throughput against m under the roofline, and speed against error, one picture for each shape and thread count.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import arguments
from machine import ROOT
from result_file import lines_of
from tables_speed import is_rival, problems

from llmfp4_kernels.errors import BadFile, LLMFP4Error

NEEDED = {"name", "m", "n", "k", "threads", "unit", "gflops", "roofline_seconds", "error", "ratio", "machine", "commit"}
"""What a row must have to be drawn."""

FAMILIES = {"torch": "#999999", "oneDNN": "#555555", "llama.cpp": "#c9a227", "onnxruntime": "#d1495b",
            "bitsandbytes": "#8d6a9f", "torchao": "#b08968"}  # fmt: skip
"""Colours of rivals by the first word of their names; ours are blue."""
OURS = ("#00798c", "#30638e", "#003d5b", "#4ba3c3", "#6096ba", "#274c77", "#48bfe3", "#5390d9", "#80ced7")


def style(rows: list[dict]) -> dict[str, dict]:
    """Line styles by contender: one colour per family, dashes within it."""
    dashes, styles, count = ("-", "--", ":", "-."), {}, {}
    for row in {row["name"]: row for row in rows}.values():
        name = row["name"]
        family = next((start for start in FAMILIES if name.split()[0] == start), None) if is_rival(row) else "ours"
        index = count[family] = count.get(family, -1) + 1
        color = OURS[index % len(OURS)] if family == "ours" else FAMILIES[family]
        styles[name] = dict(color=color, linestyle="-" if family == "ours" else dashes[index % len(dashes)],
                            linewidth=2.2 if family == "ours" else 1.1)  # fmt: skip
    return styles


def throughput(axes, rows: list[dict], styles: dict[str, dict]) -> None:
    """GFLOP/s over m, and the roofline of 4-bit weights and int8 operations."""
    for name, look in styles.items():
        points = sorted((row["m"], row["gflops"]) for row in rows if row["name"] == name)
        axes.plot(*zip(*points), label=name, marker="o", markersize=3, **look)
    bounds = {}
    for row in rows:
        if row["unit"] == "int8" and not is_rival(row):
            bounds[row["m"]] = 2e-9 * row["m"] * row["n"] * row["k"] / row["roofline_seconds"]
    axes.plot(*zip(*sorted(bounds.items())), color="black", linewidth=0.8, label="roofline, W4 × int8")
    axes.set(xscale="log", yscale="log", xlabel="m, tokens", ylabel="GFLOP/s", title="Throughput")
    axes.set_xticks(
        sorted({row["m"] for row in rows}), [str(m) for m in sorted({row["m"] for row in rows})], minor=False
    )
    axes.grid(alpha=0.25)


def against_error(axes, rows: list[dict], styles: dict[str, dict], m: int) -> None:
    """Speed over torch fp32 against the relative error of y: upper left is better."""
    for row in rows:
        if row["m"] == m:
            axes.scatter(row["error"], row["ratio"], color=styles[row["name"]]["color"], s=40, zorder=3)
            axes.annotate(
                row["name"], (row["error"], row["ratio"]), xytext=(4, 2), textcoords="offset points", fontsize=6
            )
    axes.set(yscale="log", xlabel="error of y, relative to fp32", ylabel="times faster than torch fp32",
             title=f"Speed and error, m = {m}")  # fmt: skip
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis("{x:g}")
    axes.grid(alpha=0.25)


def draw(key: tuple[int, int, int], rows: list[dict], folder: Path) -> Path:
    """One picture of a shape and thread count; returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ms, styles, (n, k, threads) = sorted({row["m"] for row in rows}), style(rows), key
    figure, panels = pyplot.subplots(1, 3, figsize=(20, 7), layout="constrained")
    throughput(panels[0], rows, styles)
    against_error(panels[1], rows, styles, ms[0])
    against_error(panels[2], rows, styles, ms[-1])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(f"n = {n}, k = {k}, threads: {threads}, {rows[0]['machine']['cpu']}, {rows[0]['commit'][:10]}")
    path = folder / f"gemm-{n}x{k}-{threads}t.png"
    beside = path.with_suffix(".part.png")
    figure.savefig(beside, dpi=100)
    pyplot.close(figure)
    os.replace(beside, path)
    return path


def drawn(file: Path, shapes: list[tuple[int, int]]) -> list[Path]:
    """Pictures of these shapes, or of all. Raises BadFile where there are no rows of them."""
    if not file.is_file():
        raise BadFile(f"there is no file {file}")
    found = problems([row for row in lines_of(file) if row.keys() >= NEEDED])
    if not found:
        raise BadFile(f"{file} has no rows of gemm.py --out")
    missing = [f"{n}x{k}" for n, k in shapes if (n, k) not in {key[:2] for key in found}]
    if missing:
        raise BadFile(f"{file} has no rows of {', '.join(missing)}")
    return [draw(key, rows, file.parent) for key, rows in found.items() if not shapes or key[:2] in shapes]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    results = ROOT / "benchmarks" / "results" / "gemm.jsonl"
    parser.add_argument("file", type=Path, nargs="?", default=results, help="JSON lines of gemm.py --out")
    parser.add_argument("shapes", type=arguments.shape, nargs="*", metavar="NxK", help="those to draw (default: all)")
    options = parser.parse_args(argv)
    try:
        for path in drawn(options.file, options.shapes):
            print(f"wrote {path}")
    except (LLMFP4Error, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
