"""The demo's picture: quality against size, and speed."""

from __future__ import annotations

import os
from pathlib import Path

COLORS = {"fp32": "#555555", "bf16": "#999999", "torch-int4": "#c9a227", "minmax-w4a4": "#d1495b",
          "llm-fp4": "#00798c", "llm-fp4-a16": "#30638e"}  # fmt: skip


def _quality(axes, report: dict) -> None:
    """Perplexity over megabytes, one labelled point per model, both axes logarithmic."""
    size = {"fp32": report["bytes"]["fp32"], "bf16": report["bytes"]["bf16"]} | report["bytes_by_recipe"]
    for name, ppl in report["ppl"].items():
        megabytes = size[name] / 1e6
        axes.scatter(megabytes, ppl, s=70, color=COLORS[name], zorder=3)
        # The dense models share a height: their labels go below, the packed ones share a size: theirs go beside.
        dense = name in ("fp32", "bf16")
        axes.annotate(f"{name}  {ppl:,.1f}", (megabytes, ppl), xytext=(0, -14) if dense else (9, 0), va="center",
                      ha="center" if dense else "left", textcoords="offset points", fontsize=9)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = min(report["ppl"].values()), max(report["ppl"].values())
    margin = (high / low) ** 0.12 + 0.1  # room for the labels, a constant part of the axis
    axes.set_ylim(low / margin, high * margin)
    axes.set_xlim(min(size.values()) / 1.3e6, size["fp32"] * 1.3 / 1e6)
    for axis, ticks in ((axes.xaxis, (50, 100, 200, 400, 800)), (axes.yaxis, _ticks(low / margin, high * margin))):
        shown = [tick for tick in ticks if axis.get_view_interval()[0] <= tick <= axis.get_view_interval()[1]]
        axis.set_ticks(shown, [f"{tick:,g}" if tick < 1e5 else f"{tick:.0e}" for tick in shown])
        axis.set_ticks([], minor=True)
    axes.set(xlabel="size of the weights, MB", ylabel="perplexity", title="Quality and size (lower left is better)")
    axes.grid(alpha=0.25)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten between low and high, or the powers alone where these would be many."""
    every = [m * 10**e for e in range(-1, 9) for m in ((1, 2, 5) if high < 100 * low else (1,))]
    return [tick for tick in every if low <= tick <= high]


def _bars(axes, rates: dict[str, float], title: str) -> None:
    names = list(reversed(rates))
    bars = axes.barh(names, [rates[name] for name in names], color=[COLORS[name] for name in names])
    axes.bar_label(bars, [f"{rates[name]:.1f} ({rates[name] / rates['bf16']:.2f}× bf16)" for name in names],
                   padding=4, fontsize=9)  # fmt: skip
    axes.set_xlim(0, max(rates.values()) * 1.45)
    axes.set(xlabel="tokens/s", title=title)
    axes.spines[["top", "right"]].set_visible(False)


def demo(report: dict, path: Path) -> None:
    """Write the picture of a demo report as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(16, 5), layout="constrained")
    _quality(panels[0], report)
    sizes = report["sizes"]
    _bars(panels[1], report["tokens_per_s"]["decode"], f"Decode after {sizes['prompt']} tokens, batch 1")
    _bars(panels[2], report["tokens_per_s"]["prefill"], f"Prefill of {sizes['prefill']} tokens")
    machine = report["machine"]
    title = f"{report['model']}, {machine['cpu']}, {machine['threads']} threads, torch {machine['versions']['torch']}"
    figure.suptitle(f"{title}\nperplexity on {report['tokens']} held-out tokens of {report['text']}", fontsize=11)
    beside = path.with_suffix(".part.png")
    figure.savefig(beside, dpi=110)
    pyplot.close(figure)
    os.replace(beside, path)
