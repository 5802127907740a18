"""Decode and prefill of a LLaMA-7B-shaped model with random weights on a GPU: python benchmarks/llama.py --help.

transformers' static cache, batch 1, every step a replayed CUDA graph, for bf16, torch's INT4 and packed FP4 alike. Each
model is built on the GPU layer by layer, judged layer by layer and by its logits, and timed in turn with the others.
Writes JSON lines and a table.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import sys
import time

import arguments
import torch
from bench import ratio_quartiles
from judge import dequantized, judged_layers, require_logits
from llama_models import BASE, FUSED, INT4, Entrant, bf16_entrant, fp4_entrant, int4_entrant, largest_inputs
from llama_table import line, table
from machine import ROOT
from result_file import lines_of, recorder
from static_cache import StaticSession

from llmfp4_kernels import FP4Linear
from llmfp4_kernels.errors import BadInput, NoKernel
from llmfp4_kernels.packed import write_beside

SHAPES = {
    "llama-7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                     num_key_value_heads=32, vocab_size=32000, tie_word_embeddings=False),
}  # fmt: skip
SCHEMES = (
    "llm-fp4",
    f"llm-fp4+{FUSED}",
    "gptq-fp4-a4",
    "gptq-fp4-a8",
    "minmax-w4a8",
    "llm-fp4-a16",
    f"llm-fp4-a16+{FUSED}",
)
"""W4A4 static and dynamic, W4A8 in INT8 and E4M3, W4A16."""
RESULTS = ROOT / "benchmarks" / "results" / "llama.jsonl"


def kernels_of(model, m: int, device: str) -> list[str]:
    """Names of the kernels that run for m rows; raises NoKernel if one is not of this device."""
    names = sorted({layer.kernel(m, torch.bfloat16) for layer in model.modules() if isinstance(layer, FP4Linear)})
    strangers = [name for name in names if not name.startswith((f"{device}.", "triton."))]
    if strangers:
        raise NoKernel(f"for m = {m} the registry chose {', '.join(strangers)}")
    return names


class Memory:
    """Bytes of the GPU that a model takes, from the creation of this on."""

    def __init__(self, device: str):
        self.on_gpu = device == "cuda"
        self.before = torch.cuda.memory_allocated() if self.on_gpu else 0

    def most(self, call) -> int | None:
        """While it is called: weights, cache and what a step allocates. None on a CPU."""
        if not self.on_gpu:
            return None
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - self.before


def judge(entrant: Entrant, session: StaticSession) -> dict:
    """{"prefill", "decode"}: (expected logits, the token that decode starts from). Raises NoKernel if wrong."""
    model, judges = entrant.model, entrant.judges
    with judged_layers(model, judges) as calls:
        found = {"prefill": session.prefill().clone()}
        token = session.token.clone()
        found["decode"] = session.decode().clone()
    if sorted(calls) != sorted(2 * list(judges)):
        raise NoKernel(f"refusing to time it: {len(calls)} calls of {len(judges)} packed layers, expected two of each")
    with dequantized(model, judges):
        expected = {"prefill": session.prefill().clone()}
        session.token.copy_(token)
        expected["decode"] = session.decode().clone()
    for phase in found:
        entrant.about[f"{phase}_error"] = require_logits(phase, found[phase], expected[phase])
    return {phase: (logits, token) for phase, logits in expected.items()}


def ready(entrant: Entrant, options, ids: torch.Tensor, memory: Memory) -> dict:
    """{"prefill", "decode"}: calls that time a model, which was judged, and its graphs too. Raises NoKernel."""
    model, device = entrant.model, ids.device.type
    rows = {"prefill": ids.shape[1], "decode": 1}
    entrant.about["kernels"] = {phase: kernels_of(model, m, device) for phase, m in rows.items()}
    entrant.about["weight_bytes"] = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    session = StaticSession(model, ids, options.decode)
    expected = judge(entrant, session)
    entrant.about["most_bytes"] = memory.most(session.prefill)
    turns = session.turns()
    if device == "cuda":
        for phase, (logits, token) in expected.items():
            session.seek(session.tokens)
            session.token.copy_(token)
            require_logits(f"the graph of {phase}", turns[phase].once(), logits)
    return {"prefill": lambda: turns["prefill"].replayed(1), "decode": functools.partial(_decode, session, turns)}


def _decode(session: StaticSession, turns: dict) -> float:
    """Seconds of a token, over all that the cache has room for."""
    room = len(session.slots) - session.tokens
    session.seek(session.tokens)
    return turns["decode"].replayed(room) / room


def prepared(options, shape: dict, device: str, out_of_time, failures: list[str]) -> list[tuple[Entrant, dict]]:
    """(entrant, what times it), bf16 first. Who is wrong, or has no kernel, is left out with a sentence."""
    ids = (torch.arange(options.prefill, device=device) * 37 % shape["vocab_size"])[None]
    entered, largest = [], {}
    builders = {BASE: lambda: bf16_entrant(shape, device), INT4: lambda: int4_entrant(shape, device)}
    builders |= {scheme: functools.partial(fp4_entrant, scheme, shape, device, largest) for scheme in options.schemes}
    for name, build in builders.items():
        if out_of_time():
            print(f"{name} is left out: {options.limit} s have passed", flush=True)
            continue
        memory = Memory(device)
        try:
            entrant = build()
            if name == BASE:
                largest |= largest_inputs(entrant.model, ids)
            entered.append((entrant, ready(entrant, options, ids, memory)))
        except (BadInput, RuntimeError) as error:  # NoKernel is one, and so is memory that does not suffice
            failures.append(f"{name} is left out: {error}")
            print(failures[-1], flush=True)
    return entered


def measure(entered: list[tuple[Entrant, dict]], rounds: int) -> list[dict]:
    """A row for each: median seconds of a prefill and of a decoded token, and ratios to the first, pair by pair."""
    times = [{"prefill": [], "decode": []} for _ in entered]
    for _ in range(rounds):
        for (_, turns), found in zip(entered, times):
            for phase, turn in turns.items():
                found[phase].append(turn())
    rows = []
    for (entrant, _), found in zip(entered, times):
        row = {"name": entrant.name, **entrant.about}
        for phase, each in found.items():
            row[f"{phase}_times"], row[f"{phase}_seconds"] = each, statistics.median(each)
            row[f"{phase}_ratio"] = ratio_quartiles({"times": times[0][phase]}, {"times": each})[1]
        rows.append(row)
    return rows


def scheme(text: str) -> str:
    """RECIPE or RECIPE+FUSED."""
    recipe, separator, fused = text.partition("+")
    if separator and fused != FUSED:
        raise argparse.ArgumentTypeError(f"{text!r} ends in no +{FUSED}")
    return arguments.recipe(recipe) + separator + fused


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="llama-7b")
    parser.add_argument("--schemes", type=scheme, nargs="*", default=SCHEMES, metavar=f"RECIPE[+{FUSED}]")
    parser.add_argument("--layers", type=arguments.count, help="fewer than the model has; every row says so")
    parser.add_argument("--prefill", type=arguments.count, default=512, help="tokens of the prompt")
    parser.add_argument("--decode", type=arguments.count, default=64, help="tokens after it")
    parser.add_argument("--rounds", type=arguments.rounds, default=5)
    parser.add_argument("--limit", type=arguments.seconds, default=600, help="after which no model is built")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, without graphs")
    parser.add_argument(
        "--out", type=arguments.result_file, default=RESULTS, help="JSON lines, written anew; a table beside"
    )
    options = parser.parse_args(argv)
    if not (options.cpu or torch.cuda.is_available()):
        sys.exit("llama.py times a model on a GPU: there is none that torch can use (--cpu runs it without graphs)")
    device, started, failures = "cpu" if options.cpu else "cuda", time.perf_counter(), []
    whole = SHAPES[options.model]["num_hidden_layers"]
    shape = SHAPES[options.model] | {"num_hidden_layers": min(options.layers or whole, whole)}
    about = {"model": options.model, "shape": shape, "layers_of_model": whole, "prefill_tokens": options.prefill,
             "decode_tokens": options.decode, "graphs": device == "cuda", "device": device}  # fmt: skip
    options.out.unlink(missing_ok=True)
    record = recorder(options.out, line, **about)
    with torch.inference_mode():
        out_of_time = lambda: time.perf_counter() - started > options.limit  # noqa: E731
        for row in measure(prepared(options, shape, device, out_of_time, failures), options.rounds):
            record(row)
    rows, path = lines_of(options.out), options.out.with_suffix(".md")
    if rows:
        write_beside(path, lambda beside: beside.write_text("\n".join(table(rows)) + "\n"))
        print(f"wrote {path}")
    if failures or not rows:
        sys.exit("wrong or missing: " + ("; ".join(failures) or "nothing was measured"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
