"""FP4 products against torch's linear layers, shape by shape: python benchmarks/gemm.py --help.

Each line of the result file is one measurement with the machine and commit that made it. Ratios are to torch fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "python_tests")]

from bench import Contender, compare, copies_for, read_bandwidth
from cases import LINEAR_SHAPES, random_packed
from machine import commit, machine
from rivals import GROUP, dequantize_int4, int4_mm, quantize_int4

from llmfp4_kernels import FP4Linear, reference
from llmfp4_kernels.formats import E2M1, E4M3
from llmfp4_kernels.ops import Multiplier

SCHEMES = {
    "llm-fp4 (W4A4)": dict(activation=E2M1, shift=True),
    "llm-fp4-a16": dict(),
    "nvfp4 (W4A16)": dict(scale=E4M3, group_size=16),
}


def _within(y, exact, magnitude, relative):
    error = ((y.double() - exact).abs() / magnitude.clamp_min(1e-30)).max().item()
    if not error <= relative:
        raise SystemExit(f"refusing to time a wrong kernel: off by {error:.2e} of Σ|x||w|, {relative:.2e} is rounding")


class Product:
    """check(x, y): y is x times a dense float64 weight within a share of Σ|x||w|. Expected values are kept per m."""

    def __init__(self, weight: torch.Tensor, relative: float):
        self.weight, self.relative, self.known = weight, relative, {}

    def __call__(self, x, y):
        if len(x) not in self.known:
            self.known[len(x)] = x.double() @ self.weight.T, x.double().abs() @ self.weight.abs().T
        _within(y, *self.known[len(x)], self.relative)


class Bits:
    """check(x, y): y has the bits of the reference."""

    def __init__(self, packed, name: str):
        self.packed, self.name, self.known = packed, name, {}

    def __call__(self, x, y):
        if len(x) not in self.known:
            self.known[len(x)] = reference.gemm(x, self.packed).to(y.dtype)
        if not torch.equal(y, self.known[len(x)]):
            raise SystemExit(f"refusing to time a wrong kernel: {self.name} is not bit-equal to the reference")


def dense(name: str, weight: torch.Tensor, dtype: torch.dtype) -> Contender:
    """torch's linear layer in fp32 or bf16."""
    weights = [weight.to(dtype).clone() for _ in range(copies_for(weight.numel() * dtype.itemsize))]
    relative = 2**-7 if dtype == torch.bfloat16 else weight.shape[1] * 2**-24
    calls = [lambda x, w=w: torch.nn.functional.linear(x, w) for w in weights]
    return Contender(name, calls, Product(weights[0].double(), relative), dtype, weight.numel() * dtype.itemsize)


def torch_int4(weight: torch.Tensor) -> Contender:
    """torch's INT4 weight-only kernel, bf16 activations, one scale and zero per 64."""
    codes, scales = quantize_int4(weight, GROUP)
    size = weight.numel() // 2 + scales.numel() * 2
    pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    packed = [pack(codes, 1).clone() for _ in range(copies_for(size))]
    calls = [lambda x, p=p: int4_mm(x, p, GROUP, scales) for p in packed]
    check = Product(dequantize_int4(codes, scales, GROUP), 2**-7)
    return Contender("torch-int4 g64", calls, check, torch.bfloat16, size)


def fp4(name: str, n: int, k: int, options: dict, x_dtype=torch.float32) -> Contender:
    """Our kernel: bit-equal to the reference where sums are integers, within the bound of fp32 sums otherwise."""
    packed = random_packed(n, k, E2M1, **options)
    layers = [FP4Linear.from_packed(packed.to("cpu")).multiplier() for _ in range(copies_for(packed.nbytes))]
    relative = k * 2**-24 + (2**-8 if x_dtype == torch.bfloat16 else 0)
    exact = packed.activation is not None
    check = Bits(packed, name) if exact else Product(reference.dequantize(packed, torch.float64), relative)
    suffix = " bf16" if x_dtype == torch.bfloat16 else ""
    return Contender(name + suffix, list(layers), check, x_dtype, packed.nbytes)


def kernel_name(contender: Contender, m: int) -> str | None:
    call = contender.calls[0]
    return call.choose(m, contender.x_dtype)[0].name if isinstance(call, Multiplier) else None


def measure(n: int, k: int, ms: list[int], threads: list[int], record) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) / k**0.5
    contenders = [dense("fp32", weight, torch.float32), dense("bf16", weight, torch.bfloat16)]
    if n % 16 or k % GROUP:
        print(f"torch-int4 is left out: it needs n in 16s and k in {GROUP}s, this is n = {n}, k = {k}")
    else:
        contenders.append(torch_int4(weight))
    contenders += [fp4(name, n, k, options) for name, options in SCHEMES.items()]
    contenders.append(fp4("llm-fp4-a16", n, k, {}, torch.bfloat16))
    for count in threads:
        torch.set_num_threads(count)
        bandwidth = read_bandwidth()
        for m in ms:
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
            for row, contender in zip(compare(contenders, x), contenders):
                gbps = contender.weight_bytes / row["seconds"] / 1e9
                row |= {"m": m, "n": n, "k": k, "threads": count, "kernel": kernel_name(contender, m)}
                row |= {"gflops": 2e-9 * m * n * k / row["seconds"], "weight_gbps": gbps, "read_gbps": bandwidth / 1e9}
                record(row)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--model", choices=LINEAR_SHAPES, help="the linear shapes of a model, in place of --n and --k")
    parser.add_argument("--m", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 512])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--out", type=Path, help="JSON lines to append to")
    options = parser.parse_args(arguments)
    where = {"machine": machine(), "commit": commit()}

    def record(row):
        print(
            f"{row['name']:16} m={row['m']:<4} n={row['n']} k={row['k']} threads={row['threads']} "
            f"{row['seconds'] * 1e6:10.1f} us {row['gflops']:8.1f} GFLOP/s {row['ratio']:6.2f}x fp32 "
            f"±{row['spread'] * 100:.0f}%  {row['kernel'] or ''}",
            flush=True,
        )
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a") as file:
                file.write(json.dumps(row | where) + "\n")

    for n, k in LINEAR_SHAPES[options.model] if options.model else [(options.n, options.k)]:
        measure(n, k, options.m, sorted(set(options.threads)), record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
