"""Tokens per second of whole models, prefill and decode: python benchmarks/model.py --help.

Weights are random: speed depends on shapes and formats only. Every model is the same transformers LLaMA, whose linear
layers but lm_head are replaced. `make demo` measures the real model.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable

import arguments
import ours
import rivals
import torch
from operands import Weight
from result_file import recorder
from shared_cases import random_x

from llmfp4_kernels import FP4Linear
from llmfp4_kernels.errors import BadInput, LLMFP4Error
from llmfp4_kernels.evaluate import compare_rates

SHAPES = {
    "smollm2-135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                         num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    "llama-7b, 2 layers": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32,
                               num_key_value_heads=32, vocab_size=2048, tie_word_embeddings=False),
}  # fmt: skip
RECIPES = ("llm-fp4", "gptq-fp4-a4", "gptq-fp4-a8", "llm-fp4-a16", "nvfp4")


def dense_model(name: str):
    """A random LLaMA in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPES[name], max_position_embeddings=2048)).eval()


def packed_model(model, recipe: str, tokens: tuple[int, ...]):
    """A bfloat16 copy whose linear layers hold random packed weights of the recipe; lm_head stays bfloat16.

    Raises NoKernel where the first layer of a shape is wrong for so many tokens.
    """
    model, checked = copy.deepcopy(model).to(torch.bfloat16), set()
    linears = [(name, part) for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    for name, linear in linears:
        if name != "lm_head":
            weight = Weight(linear.out_features, linear.in_features)
            probe, packed = ours.packed_weight(weight, recipe)
            layer = FP4Linear.from_packed(packed.to("cpu"))
            model.set_submodule(name, layer)
            if linear.weight.shape not in checked:
                require_right(layer, ours.check_of(recipe, weight, probe, torch.bfloat16), tokens)
                checked.add(linear.weight.shape)
    return model


def require_right(layer: FP4Linear, check: Callable, tokens: tuple[int, ...]) -> None:
    for m in tokens:
        x = random_x(m, layer.in_features, torch.bfloat16)
        with torch.inference_mode():
            check(x, layer(x))


def measure(name: str, options, record: Callable[[dict], None]) -> None:
    """All formats and thread counts of one model."""
    dense = dense_model(name)
    models = {"fp32": dense, "bf16": copy.deepcopy(dense).to(torch.bfloat16)}
    try:
        models["torch-int4"] = rivals.torch_int4(dense)
    except BadInput as error:
        print(f"torch-int4 is left out: {error}", flush=True)
    models |= {recipe: packed_model(dense, recipe, (1, options.prefill)) for recipe in options.recipes}
    ids = torch.arange(options.prefill) * 37 % SHAPES[name]["vocab_size"]
    for threads in options.threads:
        torch.set_num_threads(threads)
        rates = compare_rates(models, ids, options.prompt, options.decode, options.repeats)
        for kind in models:
            about = {"model": name, "name": kind, "threads": threads, "prompt": options.prompt}
            about |= {"prefill_tokens": options.prefill, "decode_tokens": options.decode}
            record(about | {phase: rates[phase][kind] for phase in ("decode", "prefill")})


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--recipes", type=arguments.recipe, nargs="*", default=RECIPES)
    parser.add_argument("--threads", type=arguments.count, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--prefill", type=arguments.count, default=512, help="tokens")
    parser.add_argument("--prompt", type=arguments.count, default=64, help="tokens before those that are decoded")
    parser.add_argument("--decode", type=arguments.count, default=16, help="tokens")
    parser.add_argument("--repeats", type=arguments.count, default=3)
    parser.add_argument("--out", type=arguments.result_file, help="JSON lines to append to")
    options = parser.parse_args(argv)
    record = recorder(options.out, lambda row: f"{row['model']:20} {row['name']:14} t={row['threads']} "
                      f"decode {row['decode']:8.2f} tokens/s, prefill {row['prefill']:8.1f} tokens/s")  # fmt: skip
    if options.prompt > options.prefill:
        parser.error(f"argument --prompt: {options.prompt} tokens are no part of --prefill's {options.prefill}")
    try:
        for name in options.models:
            measure(name, options, record)
    except LLMFP4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
