"""Every code and scale byte against the formats' definitions, written down independently of the package's formula."""

from fractions import Fraction

import pytest
import torch

from llmfp4_kernels.encode import decode, encode, snap
from llmfp4_kernels.errors import BadInput
from llmfp4_kernels.formats import E4M3FN, E8M0, FP4_ELEMENTS, RECIPES, SCALES, element, recipe, searched_elements

MAGNITUDES = {
    "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],  # OCP MX spec 1.0 table 5
    "e1m2": [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5],  # uniform: INT4 without -8
    "e3m0": [0, 0.25, 0.5, 1, 2, 4, 8, 16],
}


@pytest.mark.parametrize("name", FP4_ELEMENTS)
def test_4bit_codes(name):
    e = FP4_ELEMENTS[name]
    assert e.values == MAGNITUDES[name] + [-m for m in MAGNITUDES[name]]
    assert str(e.values[8]) == "-0.0"
    assert e.max == MAGNITUDES[name][-1]
    integers = [Fraction(m) * e.integer_scale for m in MAGNITUDES[name]]
    assert all(i.denominator == 1 for i in integers)
    assert any(i.numerator % 2 for i in integers), "a smaller integer_scale would do"


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_every_code_is_a_scaled_binary_number(bits):
    for e in searched_elements(bits):
        for code, value in enumerate(e.values):
            text = format(code, f"0{bits}b")
            p, f = int(text[1 : 1 + e.exponent_bits], 2), int(text[1 + e.exponent_bits :] or "0", 2)
            significand = Fraction(f, 2**e.mantissa_bits) + (p > 0)
            expected = (-1) ** int(text[0]) * significand * Fraction(2) ** (max(p, 1) - e.bias)
            assert Fraction(value) == expected


def test_e4m3_element_is_ocp_e4m3_where_both_are_finite():
    ocp = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ours = torch.tensor(element("e4m3").values)
    finite = ocp.isfinite()
    assert finite.sum() == 254
    assert torch.equal(ours[finite], ocp[finite])
    assert element("e4m3").max == 480


def test_e4m3fn_is_ocp_e4m3():
    ocp = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ours = torch.tensor(E4M3FN.values)
    assert torch.equal(ours.isnan(), ocp.isnan()) and torch.equal(ours.nan_to_num(), ocp.nan_to_num())
    assert E4M3FN.max == 448 and E4M3FN.max_integer == 448 * 512 and element("e4m3fn") is E4M3FN


def test_every_fp16_number_becomes_what_torch_makes_of_it():
    """Nearest, ties to even, saturated (torch makes NaN beyond 448); -0.0 is +0 here, as in every element."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    x = x[x.isfinite() & ((x != 0) | ~x.signbit())]
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(encode(x, E4M3FN), expected.view(torch.uint8))
    assert torch.equal(snap(x.clone(), E4M3FN), expected.float())
    assert torch.equal(decode(encode(x, E4M3FN), E4M3FN), expected.float())


@pytest.mark.parametrize("name", SCALES)
def test_all_256_scale_bytes(name):
    dtype = torch.float8_e8m0fnu if name == "e8m0" else torch.float8_e4m3fn
    expected = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    assert torch.equal(torch.tensor(SCALES[name].values).double().nan_to_num(nan=-1e9), expected.nan_to_num(nan=-1e9))


def test_e8m0_ends():
    assert (E8M0.values[0], E8M0.values[127], E8M0.values[254]) == (2.0**-127, 1.0, 2.0**127)


@pytest.mark.parametrize("name", ["e2m2", "e0m3", "e5m2fn", "e4m3fnuz", "E2M1", "int4", "", "e2m1 "])
def test_unknown_element(name):
    with pytest.raises(BadInput, match="unknown element"):
        element(name)


def test_unknown_recipe_names_the_known_ones():
    with pytest.raises(BadInput, match="mxfp4"):
        recipe("fp4")


def test_unknown_bits():
    with pytest.raises(BadInput, match="5 bits"):
        searched_elements(5)


def test_shift_range_is_two_to_the_exponent_bits():
    assert {name: e.max_shift for name, e in FP4_ELEMENTS.items()} == {"e2m1": 3, "e1m2": 1, "e3m0": 7}


def test_calibration_is_needed_exactly_by_searched_and_static_recipes():
    without = {name for name, r in RECIPES.items() if not r.needs_calibration}
    assert without == {
        *("minmax-w4a16", "minmax-int-w4a16"),
        *(f"{weights}{activations}" for weights in ("mxfp4", "nvfp4", "int4") for activations in ("", "-a4", "-a8")),
        *("mxfp4-a8-int", "nvfp4-a8-int", "mxfp4-a8-fp8"),
    }
