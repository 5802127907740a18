"""The tables of accuracy, zero-shot tasks and ablations as Markdown, from their result files."""

from __future__ import annotations

from collections.abc import Callable

import markdown

FULL = "full precision"
WIDTHS = (4, 8, 16)
METHODS = {
    "MinMax INT4": ("minmax-int-w4a4", "minmax-int-w4a8", "minmax-int-w4a16"),
    "MinMax FP4": ("minmax-w4a4", "minmax-w4a8", "minmax-w4a16"),
    "FPQ baseline": ("llm-fp4-baseline", "llm-fp4-baseline-a8", "llm-fp4-a16"),
    "FPQ (LLM-FP4)": ("llm-fp4", "llm-fp4-a8", "llm-fp4-a16"),
    "MXFP4": ("mxfp4-a4", "mxfp4-a8", "mxfp4"),
    "NVFP4": ("nvfp4-a4", "nvfp4-a8", "nvfp4"),
    "INT4, groups of 128": ("int4-a4", "int4-a8", "int4"),
}
"""Recipes of the accuracy table's methods at activations of WIDTHS bits. At 16 bits LLM-FP4's two searches are one."""
TASK_TITLES = {"boolq": "BoolQ", "piqa": "PIQA", "hellaswag": "HellaSwag", "winogrande": "WinoGrande",
               "arc_easy": "ARC-e", "arc_challenge": "ARC-c"}  # fmt: skip


def where(record: dict, rows: dict | None = None) -> str:
    """Machine and commit; rows that were measured at several commits name them all."""
    machine = record["machine"]
    commits = [row["commit"] for row in rows.values()] if rows else [record["commit"]]
    named = ", ".join(dict.fromkeys(commit[:10] + "-dirty" * commit.endswith("-dirty") for commit in commits))
    return f"{machine['cpu']} with {machine['cores']} cores, commit {named}"


def accuracy_tables(report: dict) -> list[list[str]]:
    """A table for each model of accuracy.json."""
    agreement = "cosine to full precision / rank correlation of retrieval / share of the 10 nearest; 1 is best"
    kinds = {"language": ("perplexity; less is better", _perplexity), "embedding": (agreement, _agreement)}
    return [_accuracy_table(report, section, *kind) for section, kind in kinds.items() if section in report]


def _perplexity(quality: dict) -> str:
    return f"{quality['perplexity']:.1f}" if quality["perplexity"] < 1000 else f"{quality['perplexity']:,.0f}"


def _agreement(quality: dict) -> str:
    return f"{quality['cosine']:.3f} / {quality['rank_correlation']:.3f} / {quality['overlap']:.2f}"


def _accuracy_table(report: dict, section: str, what: str, cell: Callable[[dict], str]) -> list[str]:
    about, rows = report[section]["about"], report[section]["rows"]
    methods = {title: dict(zip(WIDTHS, names)) for title, names in METHODS.items()} | _other_methods(rows)
    sentence = (
        f"{about['model']}, {about['text']}: {what}. In full precision {cell(rows[FULL]['quality'])} "
        f"(`results/accuracy.json`, {where(report, rows)})."
    )
    cells = []
    for title, names in methods.items():
        found = [rows.get(names.get(width)) for width in WIDTHS]
        if any(found):
            bits = " / ".join(dict.fromkeys(f"{row['bits_per_weight']:.2f}" for row in found if row))
            cells.append([title, bits, *("–" if row is None else cell(row["quality"]) for row in found)])
    lines = markdown.table(sentence, ["", "bits per weight", *(f"W4A{width}" for width in WIDTHS)], cells)
    checks = {name: row["check"] for name, row in rows.items() if "check" in row}
    if checks:
        lines += [
            "",
            _checked(checks, "embeddings (of length 1)" if section == "embedding" else "perplexities, relatively,"),
        ]
    return lines


def _other_methods(rows: dict) -> dict[str, dict[int, str]]:
    """{title: {width: recipe}} of recipes beyond METHODS; those that differ in their ending -a4, -a8, -a16 are one."""
    known, others = {FULL, *(name for names in METHODS.values() for name in names)}, {}
    for name, row in rows.items():
        if name not in known:
            others.setdefault(name.removesuffix(f"-a{row['width']}"), {})[row["width"]] = name
    return others


def _checked(checks: dict[str, dict], what: str) -> str:
    """How far packed layers and models are from floating point, at most, and where."""

    def most(key: str, digits: str) -> tuple[str, str]:
        name = max(checks, key=lambda name: checks[name][key])
        return format(checks[name][key], digits), name

    units, layers = most("worst_units", ".1f")
    simulated, worst = most("off_simulated", ".1e")
    reference, worst_reference = most("off_reference", ".1e")
    return (
        f"Beside a floating-point simulation packed layers are off by at most {units} · 2^-24 of Σ|x||w| ({layers}), "
        f"{what} by at most {simulated} ({worst}); beside the reference, which rounds in the kernels' order, by at "
        f"most {reference} ({worst_reference})."
    )


def zero_shot_table(report: dict) -> list[str]:
    """Accuracy per task, one line per model."""
    about, rows = report["zero_shot"]["about"], report["zero_shot"]["rows"]
    tasks = rows[FULL]["scores"]
    sentence = (
        f"{about['model']}, zero-shot accuracy in % ± standard error, {about['limit']} documents per task drawn by "
        f"seed {about['seed']}, lm-eval {about['lm_eval']} (`results/zero_shot.json`, {where(report, rows)}). The last "
        "column is the difference to full precision on the same documents."
    )
    lines = []
    for name, row in rows.items():
        pairs = [(task["acc"], task["stderr"]) for task in row["scores"].values()] + [row["average"]]
        cells = [f"{100 * mean:.1f} ± {100 * error:.1f}" for mean, error in pairs]
        cells.append(f"{-100 * row['loss'][0]:+.1f} ± {100 * row['loss'][1]:.1f}" if "loss" in row else "–")
        lines.append([name, *cells])
    head = ["", *(TASK_TITLES.get(name, name) for name in tasks), "average", "difference"]
    return markdown.table(sentence, head, lines)


def ablations_table(report: dict) -> list[str]:
    """Output error of each variant of the search relative to the default."""
    about, rows = report["ablations"]["about"], report["ablations"]["rows"]
    sentence = (
        f"Variants of the search on {len(about['layers'])} layers of {about['model']}, W4A4: mean squared error of the "
        f"output on {about['held_out']} tokens that the search has not seen, geometric mean of the ratios to the "
        f"default, {about['default']} (`results/ablations.json`, {where(report, rows)})."
    )
    cells = []
    for name, row in rows.items():
        group, _, variant = name.partition(": ")
        perplexity = f"{row['perplexity']:.1f}" if "perplexity" in row else "–"
        extremes = f"{row['least']:.2f} – {row['largest']:.2f}"
        cells.append([group, variant, f"{row['ratio']:.3f}", extremes, perplexity])
    return markdown.table(sentence, ["", "variant", "error / default's", "least and largest", "perplexity"], cells)
