"""The tables of products, quantization and models as Markdown, from their JSON lines."""

from __future__ import annotations

from collections.abc import Callable

import markdown
from bench import ratio_quartiles
from tables import where

BASE = "torch fp32"
PRODUCT_ONLY = "product only"
REFERENCES: dict[str, Callable[[str], bool]] = {
    "torch fp32": lambda name: name == BASE,
    "torch bf16": lambda name: name == "torch bf16",
    "oneDNN int8": lambda name: name.startswith("oneDNN") and PRODUCT_ONLY not in name,
    "llama.cpp MXFP4": lambda name: name.startswith("llama.cpp MXFP4"),
    "llama.cpp": lambda name: name.startswith("llama.cpp"),
    "any 4-bit rival": lambda name: name.startswith(("llama.cpp", "torch int4", "torchao", "bitsandbytes", "onnxrun")),
}
"""What ours are compared with: the fastest of the contenders that a name stands for."""
UNSTEADY = 0.6
"""An interquartile range, relative to the time, above which ratios are guesses."""


def is_rival(row: dict) -> bool:
    return any(row["name"].startswith(start) for start in ("torch", "oneDNN", "llama.cpp", "bitsandbytes", "onnxrun"))


def problems(rows: list[dict]) -> dict[tuple[int, int, int], list[dict]]:
    """Rows by (n, k, threads). Of each m those of the last run count, for times of two runs are no pairs."""
    last = {(row["n"], row["k"], row["threads"], row["m"]): _run(row) for row in rows}
    found: dict[tuple, dict] = {}
    for row in rows:
        key = row["n"], row["k"], row["threads"]
        if _run(row) == last[(*key, row["m"])]:
            found.setdefault(key, {})[row["name"], row["m"]] = row
    return {key: list(by_name.values()) for key, by_name in found.items()}


def _run(row: dict) -> tuple:
    """What rows of one run have in common."""
    machine = row.get("machine")
    return machine.get("date") if isinstance(machine, dict) else None, row.get("commit")


def faster(row: dict, rows: list[dict], among: Callable[[str], bool]) -> float | None:
    """How many times faster than the fastest of `among` at the same m: median of pairs; None if there is none."""
    others = [other for other in rows if other["m"] == row["m"] and among(other["name"]) and "times" in other]
    if not others or "times" not in row:
        return None
    return ratio_quartiles(min(others, key=lambda other: other["seconds"]), row)[1]


def _cell(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _about(key: tuple[int, int, int], rows: list[dict], source: str) -> str:
    (n, k, threads), row = key, max(rows, key=lambda row: row.get("others", 0))
    turns = f", weights in turn over {row['copies'] * row['weight_bytes'] / 1e6:.0f} MB" if "copies" in row else ""
    others = f", {row['others']} CPUs busy with other things" if row.get("others", 0) > 0.1 else ""
    return (
        f"One product, n = {n}, k = {k}, {threads} thread{'s' if threads > 1 else ''}{turns} (`results/{source}`, "
        f"{where(row, dict(enumerate(rows)))}{others}{_unsteady(rows)})"
    )


def _unsteady(rows: list[dict]) -> str:
    """How many of the times at each m have an interquartile range that makes their ratios guesses."""
    counts = {}
    for m in sorted({row["m"] for row in rows}):
        spreads = [row.get("spread", 0) for row in rows if row["m"] == m]
        if wide := sum(spread > UNSTEADY for spread in spreads):
            counts[m] = f"{wide} of {len(spreads)} at m = {m}"
    return f"; interquartile ranges above {UNSTEADY:.0%}: {', '.join(counts.values())}" if counts else ""


def rivals_table(key: tuple[int, int, int], rows: list[dict], source: str = "gemm.jsonl") -> list[str]:
    """Everyone's speed over torch fp32 for each m, beside the error against fp32."""
    ms = sorted({row["m"] for row in rows})
    what = "times faster than torch's fp32 linear, median of pairs. Error: of y, relative to fp32's."
    cells = []
    for name in dict.fromkeys(row["name"] for row in rows):
        by_m = {row["m"]: row for row in rows if row["name"] == name}
        error = _cell(next(iter(by_m.values())).get("error"), 3)
        cells.append([name, error, *(_cell(by_m[m]["ratio"], 2) if m in by_m else "–" for m in ms)])
    return markdown.table(f"{_about(key, rows, source)}: {what}", ["m", "error", *ms], cells)


def ours_table(key: tuple[int, int, int], rows: list[dict], source: str = "gemm.jsonl") -> list[str]:
    """Ours against the fastest of each kind of rival, with what part of the roofline they reach."""
    about = (
        f"{_about(key, rows, source)}: our kernels, their median time with its interquartile range, their share of the "
        "roofline and (m = 1) of the bandwidth of reading in the same run, and how many times faster they are than the "
        "fastest of each kind, median of pairs."
    )
    cells = []
    for row in rows:
        if not is_rival(row) and "roofline" in row:
            ratios = [_cell(faster(row, rows, among), 2) for among in REFERENCES.values()]
            share = f"{row['gbps'] / row['read_gbps']:.0%}" if row["m"] == 1 else "–"
            time = f"{row['seconds'] * 1e6:,.0f} ± {row['spread']:.0%}"
            kernel = row["kernel"].removeprefix("cpu.")
            cells.append([row["name"], row["m"], kernel, time, f"{row['roofline']:.0%}", share, *ratios])
    return markdown.table(about, ["recipe", "m", "kernel", "µs", "roofline", "bandwidth", *REFERENCES], cells)


def gemm_tables(rows: list[dict], source: str = "gemm.jsonl") -> list[list[str]]:
    """For each shape and thread count of the result file `source`: ours against the best, then everyone."""
    parts = []
    for key, found in problems(rows).items():
        ours = ours_table(key, found, source)
        parts += [ours] if len(ours) > 4 else []
        parts.append(rivals_table(key, found, source))
    return parts


def model_table(rows: list[dict]) -> list[str]:
    """Tokens per second of whole models with random weights."""
    about = (
        f"Whole models of random weights, tokens per second (`results/model.jsonl`, {where(rows[0])}). Decode is "
        f"batch 1 after {rows[0]['prompt']} tokens, prefill {rows[0]['prefill_tokens']} tokens."
    )
    cells = ([r["model"], r["name"], r["threads"], _cell(r["decode"]), _cell(r["prefill"])] for r in rows)
    return markdown.table(about, ["model", "", "threads", "decode", "prefill"], cells)


def quantize_table(rows: list[dict]) -> list[str]:
    """Weights per second of quantization."""
    n, k, tokens = (rows[0][name] for name in ("n", "k", "tokens"))
    threads = sorted({row["threads"] for row in rows})
    about = (
        f"Quantizing a weight, n = {n}, k = {k}, {tokens} tokens of calibration: million weights per second "
        f"(`results/quantize.jsonl`, {where(rows[0])}). Error: of the weight, relative."
    )
    cells = []
    for name in dict.fromkeys(row["name"] for row in rows):
        by_threads = {row["threads"]: row for row in rows if row["name"] == name}
        speeds = [_cell(by_threads[count]["mega_weights"], 2) if count in by_threads else "–" for count in threads]
        cells.append([name, _cell(next(iter(by_threads.values()))["error"], 3), *speeds])
    head = ["", "error", *(f"{count} thread{'s' if count > 1 else ''}" for count in threads)]
    return markdown.table(about, head, cells)
