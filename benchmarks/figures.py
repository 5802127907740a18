"""Write the README's figures from the files in benchmarks/results/: python benchmarks/figures.py.

The README shows the first shape of products in gemm.jsonl; products.md all of them, products-NAME.md those of
gemm-NAME.jsonl, another kind of CPU.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import markdown
import tables
import tables_speed
from result_file import lines_of
from tables import where

from llmfp4_kernels.errors import BadFile

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def demo_table(report: dict) -> list[str]:
    """The demo's language model: quality, size, speed."""
    decode, prefill = report["tokens_per_s"]["decode"], report["tokens_per_s"]["prefill"]
    sizes = report["bytes"] | report["bytes_by_recipe"]
    about = (
        f"`make demo`: {report['model']}, {report['tokens']} held-out tokens of {report['text']} "
        f"(`results/demo.json`, {where(report)}, {report['seconds']:.0f} s in all). "
        f"{report['quantization']['llm-fp4']['coverage']:.0%} of the parameters are in FP4; embedding, head and norms "
        "stay in bf16.\n\n![quality against size, and speed](benchmarks/results/demo.png)"
    )
    rows = []
    for name in dict.fromkeys([*decode, *report["ppl"]]):
        cells = (report["ppl"].get(name), sizes.get(name, 0) / 1e6 or None, decode.get(name), prefill.get(name))
        rows.append([name, *("–" if c is None else f"{c:.1f}" for c in cells)])
    return markdown.table(about, ["", "perplexity", "MB of weights", "decode tokens/s", "prefill tokens/s"], rows)


def speed(results: Path) -> list[list[str]]:
    demo = results / "demo.json"
    parts = [demo_table(json.loads(demo.read_text()))] if demo.is_file() else []
    rows = lines_of(results / "gemm.jsonl")
    parts += tables_speed.gemm_tables([row for row in rows if (row["n"], row["k"]) == (rows[0]["n"], rows[0]["k"])])
    for name, draw in (("model", tables_speed.model_table), ("quantize", tables_speed.quantize_table)):
        rows = lines_of(results / f"{name}.jsonl")
        parts += [draw(rows)] if rows else []
    return parts


def of_file(name: str, draw: Callable[[dict], list[list[str]]]) -> Callable[[Path], list[list[str]]]:
    """The tables of one result file; none while it is missing."""

    def parts(results: Path) -> list[list[str]]:
        file = results / name
        return draw(json.loads(file.read_text())) if file.is_file() else []

    return parts


SECTIONS = {
    "": speed,
    "accuracy ": of_file("accuracy.json", tables.accuracy_tables),
    "zero-shot ": of_file("zero_shot.json", lambda report: [tables.zero_shot_table(report)]),
    "ablations ": of_file("ablations.json", lambda report: [tables.ablations_table(report)]),
}
"""What stands between <!-- figures: NAME begin --> and <!-- figures: NAME end -->."""


def fill(text: str, results: Path) -> str:
    """The text with every section's tables between its marks; sections without marks or without files stay."""
    for name, draw in SECTIONS.items():
        marks = re.compile(rf"(<!-- figures: {name}begin -->\n).*?(<!-- figures: {name}end -->)", re.DOTALL)
        parts = draw(results)
        if parts:
            content = "\n\n".join("\n".join(part) for part in parts)
            text = marks.sub(lambda match, content=content: f"{match[1]}\n{content}\n\n{match[2]}", text)
    return text


def main(argv=None) -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    readme = ROOT / "README.md"
    text = readme.read_text()
    if "<!-- figures: begin -->" not in text:
        sys.exit(f"{readme} has no figures markers")
    try:
        filled = fill(text, RESULTS)
        pages = {file: tables_speed.gemm_tables(lines_of(file), file.name) for file in RESULTS.glob("gemm*.jsonl")}
    except BadFile as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    readme.write_text(filled)
    for file, products in pages.items():
        text = "\n\n".join("\n".join(part) for part in products).replace("`results/", "`")
        page = file.with_name(file.stem.replace("gemm", "products") + ".md")
        page.write_text(f"# Products of every shape\n\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
