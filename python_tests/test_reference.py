"""The judge itself, against the authors' numbers (python_tests/vectors) and exact arithmetic."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from llmfp4_kernels.errors import BadInput
from llmfp4_kernels.formats import E1M2, E2M1, E3M0, FP4_ELEMENTS, Element, element
from llmfp4_kernels.packed import PackedFP4, pack, unpack
from llmfp4_kernels.quantizer.preshift import SHIFT_RULES, Activation, channel_shift, exponent_bias
from llmfp4_kernels.reference import (
    decode,
    dequantize,
    dequantize_activation,
    encode,
    gemm,
    integer_activation,
    integer_scale,
    quantize_activation,
)

VECTORS = Path(__file__).parent / "vectors"
A, B = (np.load(VECTORS / name) for name in ("A_elementwise.npz", "B_preshift.npz"))
A_CASES = sorted(key[: -len("_code")] for key in A if key.endswith("_code"))
B_CASES = sorted(key[: -len("_shift")] for key in B if key.endswith("_shift"))


def named(case: str) -> Element:
    return element(case.split("_")[0].lower())


def units(e: Element) -> float:
    """The vectors count in 2^-b~ without a bias: an element is 2^bias of them."""
    return 2.0**e.bias


@pytest.mark.parametrize("case", [c for c in A_CASES if c.endswith("_0")])
def test_elementwise_exact_at_bias_zero(case):
    e = named(case)
    x, search, code = (torch.from_numpy(A[f"{case}_{name}"]) for name in ("x", "search", "code"))
    codes = encode(x / units(e), e)
    assert torch.equal(decode(codes, e) * units(e), search)
    # The authors have no codes, the vectors' are -0 for -0.0 inputs too.
    assert torch.equal(codes[x != 0], code[x != 0])


@pytest.mark.parametrize("case", [c for c in A_CASES if not c.endswith("_0")])
def test_elementwise_at_real_biases(case):
    e = named(case)
    scale = units(e) * 2.0 ** -float(A[f"{case}_b"])
    x, search = (torch.from_numpy(A[f"{case}_{name}"]).double() for name in ("x", "search"))
    grid = torch.tensor(e.magnitudes, dtype=torch.float64) * scale
    ties = (grid[1:] + grid[:-1]) / 2
    away = ((x.abs()[:, None] - ties).abs() / ties > 1e-6).all(1)
    assert away.sum() > len(x) / 4
    ours = decode(encode(x / scale, e), e, torch.float64) * scale
    assert (ours - search)[away].abs().max() <= 1e-6 * e.max * scale


@pytest.mark.parametrize("case", B_CASES)
def test_preshift_release_rule_and_output(case):
    e = named(case)
    rho = float(B[f"{case}_rho"])
    bj, x = torch.from_numpy(B[f"{case}_bj"]), torch.from_numpy(B[f"{case}_x"])
    shift = channel_shift(bj, rho, e, "release")
    assert torch.equal(shift, torch.from_numpy(B[f"{case}_shift"]))
    scale = torch.tensor(2.0 ** (e.bias - rho)).float()
    ours, theirs = Activation(e, scale, shift).dequantize(x), torch.from_numpy(B[f"{case}_search"])
    off = (ours - theirs).abs() > 1e-6 * x.abs().max()
    assert off.float().mean() < 1e-3, "more than the ties differ"


@pytest.mark.parametrize("case", B_CASES)
def test_preshift_other_rules(case):
    e, rho, bj = named(case), float(B[f"{case}_rho"]), B[f"{case}_bj"].astype(np.float64)
    top = 2**e.exponent_bits - 1
    expected = {
        "paper": np.clip(np.rint(bj - rho), 0, top),
        "floor": np.clip(np.floor(bj - rho), 0, top),
        "phase": np.clip(np.floor(bj - rho + 0.3), 0, top),
    }
    for rule, shift in expected.items():
        ours = channel_shift(torch.from_numpy(bj), rho, e, rule, 0.3)
        assert ours.dtype == torch.int8 and np.array_equal(ours.numpy(), shift), rule


def test_paper_and_release_rules_differ_by_one_in_244_of_2112_channels():
    differing = 0
    for case in B_CASES:
        bj, rho = torch.from_numpy(B[f"{case}_bj"]), float(B[f"{case}_rho"])
        gap = channel_shift(bj, rho, named(case), "paper") - channel_shift(bj, rho, named(case), "release")
        assert gap.abs().max() <= 1
        differing += int((gap != 0).sum())
    assert differing == 244 and 48 * len(B_CASES) == 2112


def test_channel_bias_of_the_vectors():
    for case in B_CASES:
        x = torch.from_numpy(B[f"{case}_x"])
        bias = exponent_bias(x.flatten(0, 1).abs().amax(0), named(case))
        assert torch.allclose(bias.float(), torch.from_numpy(B[f"{case}_bj"]), atol=1e-5)


def test_unknown_shift_rule():
    with pytest.raises(BadInput, match="nearest"):
        channel_shift(torch.zeros(2), 0.0, E2M1, "nearest")
    assert len(SHIFT_RULES) == 4


@pytest.mark.parametrize(
    ("e", "x", "nearest"),
    [
        (E2M1, [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.1, 1e30], [0, 1, 1, 2, 2, 4, 4, 6, 6]),
        (E1M2, [0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25], [0, 1, 1, 2, 2, 3, 3]),
        (E3M0, [0.125, 0.375, 0.75, 1.5, 3, 6, 12], [0, 0.5, 1, 2, 4, 8, 16]),
    ],
)
def test_ties_and_saturation(e, x, nearest):
    x, nearest = torch.tensor(x), torch.tensor(nearest, dtype=torch.float32)
    assert torch.equal(decode(encode(x, e), e), nearest)
    assert torch.equal(decode(encode(-x, e), e), -nearest)


def test_signed_zeros():
    assert encode(torch.tensor([0.0, -0.0, -0.01, 0.01]), E2M1).tolist() == [0, 0, 8, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_encode_refuses(bad):
    with pytest.raises(BadInput, match="holds 1 values"):
        encode(torch.tensor([1.0, bad]), E2M1)


def random_packed(weight: Element, activation: Element | None, n=5, k=37, shift=True, seed=0) -> PackedFP4:
    g = torch.Generator().manual_seed(seed)
    static = {}
    if activation:
        static = {"activation": activation, "x_scale": torch.tensor(0.37)}
        if shift:
            static["shift"] = torch.randint(0, activation.max_shift + 1, (k,), generator=g).to(torch.uint8)
    codes = pack(torch.randint(0, 16, (n, k), generator=g).to(torch.uint8))
    return PackedFP4(codes, torch.rand(n, generator=g) + 0.1, k, weight, **static)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("activation", FP4_ELEMENTS.values(), ids=FP4_ELEMENTS)
@pytest.mark.parametrize("weight", FP4_ELEMENTS.values(), ids=FP4_ELEMENTS)
def test_w4a4_against_fractions(weight, activation, shift):
    packed = random_packed(weight, activation, shift=shift)
    x = torch.randn(3, packed.k, generator=torch.Generator().manual_seed(1))
    x_codes, w_codes = quantize_activation(x, packed), unpack(packed.codes, packed.k)
    shifts = packed.shift.tolist() if shift else [0] * packed.k
    unit = np.float32(integer_scale(packed))
    y = gemm(x, packed)
    for i in range(3):
        for j in range(5):
            total = sum(
                Fraction(activation.values[a]) * Fraction(weight.values[w]) / 2**s
                for a, w, s in zip(x_codes[i].tolist(), w_codes[j].tolist(), shifts)
            )
            integer = total / Fraction(float(unit))
            assert integer.denominator == 1
            scale = np.float32(packed.x_scale.item()) * unit
            assert y[i, j].item() == float(np.float32(int(integer)) * scale * np.float32(packed.row_scale[j].item()))


def test_the_shift_may_stand_on_either_operand():
    packed = random_packed(E2M1, E2M1)
    codes = quantize_activation(torch.randn(4, packed.k, generator=torch.Generator().manual_seed(2)), packed)
    weight = dequantize(packed, torch.float64)
    on_activation = dequantize_activation(codes, packed, torch.float64) @ weight.T
    plain = decode(codes, E2M1, torch.float64) * packed.x_scale.double()
    on_weight = plain @ torch.ldexp(weight, -packed.shift.int()).T
    assert torch.allclose(on_activation, on_weight, rtol=1e-14, atol=1e-14)
    assert integer_activation(codes, packed).abs().max() <= 96


def test_gemm_rows_with_nan_and_bias():
    packed = random_packed(E2M1, E2M1)
    x = torch.randn(3, packed.k, generator=torch.Generator().manual_seed(3))
    clean = gemm(x, packed)
    x[1, 4] = float("inf")
    y = gemm(x, packed, torch.arange(5.0))
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]] + torch.arange(5.0))


def test_gemm_refuses_a_wrong_k():
    with pytest.raises(BadInput, match="k = 37"):
        gemm(torch.zeros(2, 36), random_packed(E2M1, None))
