"""A real model in packed FP4: its quality on held-out text, its size, and its speed beside fp32, bf16 and INT4.

Writes build/demo/report.json and report.png. A second run reuses the quantized models if the quantizer's code, the
model and the calibration are the same, and measures everything again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import corpus
import draw
import machine
import rivals
from quantized import packed_layers, quantized

from llmfp4_kernels.errors import LLMFP4Error
from llmfp4_kernels.evaluate import compare_rates, load_ids, perplexity, windows

RECIPES = ("minmax-w4a4", "llm-fp4", "llm-fp4-a16")
TIMED = ("fp32", "bf16", "torch-int4", "llm-fp4", "llm-fp4-a16")
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write three sentences about a sailor who comes home.",
    "Why is the sky blue?",
)


@dataclass(frozen=True)
class Sizes(corpus.Tokens):
    """Of tokens, and how often a speed is measured."""

    prompt: int = 64
    prefill: int = 512
    decode: int = 32
    repeats: int = 3
    generate: int = 48


QUICK = Sizes(**corpus.QUICK, prompt=8, prefill=64, decode=4, repeats=1, generate=8)


def stated_bytes(model) -> int:
    """4 bits per weight, the scales (4 B per output, 1 B per shift, 4 B per x_scale), and what is dense."""
    total = sum(p.numel() * p.element_size() for p in model.parameters() if p.is_floating_point())
    for layer in packed_layers(model).values():
        n, k = layer.out_features, layer.in_features
        total += n * k // 2 + 4 * n + (k if layer.shift is not None else 0) + (4 if layer.x_scale is not None else 0)
    return total


def kernels(model, rows: tuple[int, ...]) -> dict[int, list[str]]:
    """Names of the kernels that run for each number of rows."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {m: sorted({layer.kernel(m, dtype) for layer in packed_layers(model).values()}) for m in rows}


def generate(model, tokenizer, prompt: str, tokens: int) -> str:
    """The greedy answer, without special tokens."""
    turn = [{"role": "user", "content": prompt}]
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0]
    return tokenizer.decode(out[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def run(dense, tokenizer, texts: tuple[str, str], build: Path, sizes: Sizes, names: dict) -> dict:
    """The whole demo on a dense float32 model; returns the report. texts are (calibration, evaluation)."""
    started, steps = time.perf_counter(), {}

    def step(name: str, since: float) -> float:
        steps[name] = round(time.perf_counter() - since, 1)
        print(f"[{name}: {steps[name]} s]", flush=True)
        return time.perf_counter()

    calibration = windows(load_ids(tokenizer, texts[0], sizes.calibration), sizes.window, batch=4)
    ids = load_ids(tokenizer, texts[1], sizes.evaluation)
    models, records, now = {}, {}, started
    for recipe in RECIPES:
        models[recipe], records[recipe] = quantized(dense, tokenizer, recipe, calibration, build)
        now = step(f"quantize {recipe}", now)
    models |= rivals.rivals(dense)
    now = step("prepare fp32, bf16 and torch-int4", now)
    ppl = {}
    for name in ("fp32", "bf16", *RECIPES):
        ppl[name] = perplexity(models[name], ids, sizes.window)
        now = step(f"perplexity {name}", now)
    generated = {
        prompt: {name: generate(models[name], tokenizer, prompt, sizes.generate) for name in ("llm-fp4", "llm-fp4-a16")}
        for prompt in PROMPTS
    }
    now = step("generate", now)
    rates = compare_rates(
        {n: models[n] for n in TIMED}, ids[: sizes.prefill], sizes.prompt, sizes.decode, sizes.repeats
    )
    step("speed", now)
    rows = (1, min(sizes.prefill, len(ids)), min(4 * sizes.window, len(ids)))
    ran = {name: kernels(models[name], rows) for name in RECIPES}
    files = {name: (build / name / "model.safetensors").stat().st_size for name in RECIPES}
    parameters = sum(p.numel() for p in dense.parameters())
    return names | {
        "tokens": len(ids),
        "calibration_tokens": sum(batch.numel() for batch in calibration),
        "parameters": parameters,
        "ppl": ppl,
        "bytes": {"fp32": 4 * parameters, "bf16": 2 * parameters, "packed": files["llm-fp4"]},
        "bytes_by_recipe": files,
        "bytes_stated": {name: stated_bytes(models[name]) for name in RECIPES},
        "tokens_per_s": rates,
        "kernels": sorted({name for by_rows in ran.values() for names in by_rows.values() for name in names}),
        "kernels_by_rows": ran,
        "generated": generated,
        "quantization": records,
        "sizes": dataclasses.asdict(sizes),
        "machine": machine.machine(),
        "commit": machine.commit(),
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_by_step": steps,
    }


def table(report: dict) -> str:
    """The result as text, one line per model."""
    size = {"fp32": report["bytes"]["fp32"], "bf16": report["bytes"]["bf16"]} | report["bytes_by_recipe"]
    decode, prefill = report["tokens_per_s"]["decode"], report["tokens_per_s"]["prefill"]

    def cell(values: dict, name: str, scale: float = 1.0) -> str:
        return f"{values[name] * scale:12.1f}" if name in values else f"{'–':>12}"

    lines = [f"{report['model']}, {report['tokens']} tokens of {report['text']}, {report['machine']['cpu']}"]
    lines.append(f"{'':14}{'perplexity':>12}{'MB':>12}{'decode tok/s':>14}{'prefill tok/s':>15}")
    for name in dict.fromkeys((*TIMED[:3], *RECIPES)):
        row = cell(report["ppl"], name) + cell(size, name, 1e-6)
        lines.append(f"{name:14}{row}  {cell(decode, name)}   {cell(prefill, name)}")
    return "\n".join([*lines, f"kernels: {', '.join(report['kernels'])}"])


def write(report: dict, build: Path) -> None:
    """report.json and report.png, each written beside and renamed."""
    beside = build / "report.json.part"
    beside.write_text(json.dumps(report, indent=1, ensure_ascii=False))
    os.replace(beside, build / "report.json")
    draw.demo(report, build / "report.png")


def sleep_when_idle() -> None:
    """Start again with idle OpenMP threads asleep instead of spinning, unless the caller has chosen.

    Beside one busy process on 2 cores a product [1536, 576] x [576, 32] ran 16 to 54 times a second with libgomp's
    default, 495 to 668 times with sleeping threads; single layers took 75 s to quantize instead of 1 s.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "passive"  # read once, when torch loads its OpenMP
        os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=machine.ROOT / "build" / "demo", help="downloads and results")
    parser.add_argument("--quick", action="store_true", help="few tokens: a check that everything runs, no measurement")
    args = parser.parse_args()
    started = time.perf_counter()
    try:
        texts = corpus.texts(args.build)
        dense, tokenizer = corpus.dense_model(args.build)
        names = {"model": corpus.MODEL_NAME, "text": corpus.TEXT_NAME}
        report = run(dense, tokenizer, texts, args.build, QUICK if args.quick else Sizes(), names)
    except LLMFP4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report["seconds"] = round(time.perf_counter() - started, 1)
    write(report, args.build)
    for prompt, answers in report["generated"].items():
        print(f"\n> {prompt}\n" + "\n".join(f"  {name}: {text.strip()}" for name, text in answers.items()))
    print(f"\n{table(report)}\n\n{report['seconds']:.0f} s; wrote {args.build}/report.json and report.png")
    return 0


if __name__ == "__main__":
    sleep_when_idle()
    sys.exit(main())
