"""How the PTX machine adds products of 8-bit floats: as Hopper's and Ada's tensor cores do, says MMA-Sim, written here
in torch."""

import pytest
import torch
from cuda_on_cpu import CSRC, headers_key
from ptx import In, Out, compile_cuda, missing
from ptx_mutants import KERNELS

from llmfp4_kernels.encode import snap
from llmfp4_kernels.formats import E2M1, E4M3FN

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@pytest.fixture(scope="module", params=["sm_90a", "sm_89"])
def arch(request):
    return request.param


@pytest.fixture(scope="module")
def products(arch):
    options = ("-I", str(CSRC / "cuda"), f"-DHEADERS={headers_key()}")
    name, grid, block = ("fp8_sums", 1, 128) if arch == "sm_90a" else ("fp8_sums_sm89", (4, 4), 32)
    program = compile_cuda((KERNELS / f"{name}.cu").read_text(), arch, options)

    def run(a, b, c=0.0):
        """c + Σ a [64, k] · b [32, k]ᵀ, 32 inputs at a time."""
        in_order = lambda x: x.view(len(x), -1, 32).transpose(0, 1).to(torch.float8_e4m3fn).view(torch.uint8)  # noqa: E731
        a, b = (in_order(x).contiguous().view(torch.int32) for x in (a, b))
        d = torch.empty(64, 32)
        program.run(name, grid, block, [In(a), In(b), In(torch.full((64, 32), float(c))), Out(d), len(a)])
        return d

    return run


def exponent(x):
    """floor(log2|x|); far below all others for 0."""
    return torch.where(x == 0, -500, torch.frexp(x).exponent - 1)


def cut(x, at):
    """x toward zero to a multiple of 2^(at - 13)."""
    return torch.ldexp(torch.ldexp(x, 13 - at).trunc(), at - 13)


def expected(a, b, c, arch):
    step = 32 if arch == "sm_90a" else 16
    a, b, c = a.double(), b.double(), torch.full((64, 32), float(c), dtype=torch.float64)
    for k in range(0, a.shape[1], step):
        x, y = a[:, None, k : k + step], b[None, :, k : k + step]
        exponents = torch.where(x * y == 0, -500, exponent(x) + exponent(y))
        largest = torch.maximum(exponents.amax(2), exponent(c))
        c = cut(x * y, largest[..., None]).sum(2) + cut(c, largest)
        c = cut(c, exponent(c))
    return c.float()


@pytest.mark.parametrize("c", [0.0, 3.14159, -70000.0])
def test_random_sums(products, c, arch):
    a, b = (torch.randn(rows, 160) * torch.logspace(-2, 1.5, 160) for rows in (64, 32))
    a, b = (x.to(torch.float8_e4m3fn).float() for x in (a, b))
    got = products(a, b, c)
    assert torch.equal(got, expected(a, b, c, arch))
    exact = c + a.double() @ b.double().T
    assert (got != exact.float()).any() and (
        (got - exact).abs() <= 5 * 36 * 2.0**-13 * (abs(c) + a.abs() @ b.abs().T)
    ).all()


def test_known_values(products):
    """128 products, all 36 but one of 0.25; a sum that is cut though nothing is added to it."""
    a, b = torch.full((64, 128), 6.0), torch.full((32, 128), 6.0)
    a[:, 70], b[:, 70] = 0.5, 0.5
    assert (products(a, b) == 4572.0).all()  # 4572.25
    assert (products(torch.zeros(64, 32), torch.zeros(32, 32), 1 + 2.0**-14) == 1).all()


def test_ones_no_longer_count_beyond_2_to_the_14(products):
    ones = lambda rows, k: torch.ones(rows, k)  # noqa: E731
    assert (products(ones(64, 64), ones(32, 64), 16320) == 16384).all()
    assert (products(ones(64, 64), ones(32, 64), 16384) == 16384).all()


@pytest.mark.parametrize(("positive", "promoted", "fast"), [(False, 6e-5, 6e-4), (True, 1.1e-4, 5e-2)])
def test_what_sums_in_fp32_every_128_inputs_save(positive, promoted, fast, products, arch):
    """The error of 4096 products of random E2M1 and E4M3, relative to the result: cuda_sm90.py quotes Hopper's."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 4096, generator=generator) for rows in (64, 32))
    a, b = (x / x.abs().amax(1, keepdim=True) for x in ((a.abs(), b.abs()) if positive else (a, b)))
    a, b = snap(a * E2M1.max, E2M1), snap(b * E4M3FN.max, E4M3FN)
    exact = a.double() @ b.double().T
    error = lambda y: ((y - exact).norm() / exact.norm()).item()  # noqa: E731
    parts = [products(a[:, k : k + 128], b[:, k : k + 128]) for k in range(0, 4096, 128)]
    most = promoted * (1 if arch == "sm_90a" else 1.2)
    assert 0.8 * promoted < error(sum(parts)) < most and 0.8 * fast < error(products(a, b)) < fast


def test_nan(products):
    a = torch.ones(64, 32)
    a[5, 7] = float("nan")
    y = products(a, torch.ones(32, 32))
    assert y[5].isnan().all() and (y[:5] == 32).all() and (y[6:] == 32).all()
