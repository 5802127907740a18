"""The same contenders under pytest-benchmark: pytest benchmarks --benchmark-json=speed.json.

A few shapes and m, one contender at a time, each checked first. gemm.py is the measurement to quote: it interleaves.
"""

import gemm
import pytest
import torch
from adapters import adapters
from operands import Weight
from ours import fp4

from llmfp4_kernels.errors import BadInput, NoKernel

SHAPE, MS = (4096, 4096), (1, 16, 128)


@pytest.fixture(scope="module")
def weight():
    return Weight(*SHAPE)


def run(benchmark, make, m: int) -> None:
    """Times one contender on m tokens, with copies of the weight in turn."""
    try:
        contender = make()
    except (ImportError, NoKernel, BadInput) as reason:
        pytest.skip(str(reason))
    if contender.device != "cpu":
        pytest.skip("pytest-benchmark's clock is the CPU's")
    x = torch.randn(m, SHAPE[1], generator=torch.Generator().manual_seed(m)).to(contender.x_dtype)
    kernel, calls = contender.kernel(m), contender.calls
    with torch.inference_mode():
        contender.check(x, calls[-1](x))
        turns = iter(range(1 << 62))
        benchmark(lambda: calls[next(turns) % len(calls)](x))
    benchmark.extra_info.update(name=contender.name, kernel=kernel, m=m, n=SHAPE[0], k=SHAPE[1], note=contender.note)


@pytest.mark.parametrize("m", MS)
@pytest.mark.parametrize("name", adapters())
def test_rival(benchmark, weight, name, m):
    run(benchmark, lambda: adapters()[name](weight), m)


@pytest.mark.parametrize("m", MS)
@pytest.mark.parametrize("scheme", gemm.SCHEMES)
def test_ours(benchmark, weight, scheme, m):
    recipe, _, dtype = scheme.partition(":")
    run(benchmark, lambda: fp4(weight, recipe, dtype or "fp32"), m)
