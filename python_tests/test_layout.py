"""The tile layout: its index formula is a bijection, and shuffling follows it."""

import pytest
import torch
from cases import random_packed

from llmfp4_kernels import native
from llmfp4_kernels.errors import BadInput
from llmfp4_kernels.formats import E2M1, E4M3FN, FP4_ELEMENTS, SCALES
from llmfp4_kernels.layout import code_rows, shuffle_codes, shuffle_scales, to_layout, unshuffle_codes
from llmfp4_kernels.packed import unpack

SHAPES = [(1, 1), (16, 64), (17, 65), (40, 130), (5, 7)]


@pytest.mark.parametrize("shape", SHAPES)
def test_formula_is_a_bijection(shape):
    n, k = shape
    c = native.module()
    places = {c.tile_position(n, k, i, j) for i in range(n) for j in range(k)}
    assert len(places) == n * k
    assert max(byte for byte, _ in places) < c.tiled_bytes(n, k)
    assert {nibble for _, nibble in places} <= {0, 1}


@pytest.mark.parametrize("shape", SHAPES)
def test_shuffle_follows_the_formula_and_back(shape):
    n, k = shape
    codes = random_packed(n, k, E2M1).codes
    tiles = shuffle_codes(codes, k)
    flat, values = tiles.flatten(), unpack(codes, k)
    for i in range(n):
        for j in range(k):
            byte, nibble = native.module().tile_position(n, k, i, j)
            assert flat[byte] >> (4 * nibble) & 15 == values[i, j]
    assert torch.equal(unshuffle_codes(tiles, n, k), codes)
    padding = 2 * flat.numel() - n * k
    assert int((flat & 15 == 0).sum() + (flat >> 4 == 0).sum()) == padding + int((values == 0).sum())


def test_shuffle_takes_non_contiguous_codes():
    codes = random_packed(130, 128, E2M1).codes
    strided = codes.T.contiguous().T
    assert not strided.is_contiguous()
    assert torch.equal(shuffle_codes(strided, 128), shuffle_codes(codes, 128))


def test_scales_follow_their_rows():
    scales = torch.randint(0, 255, (37, 5), dtype=torch.uint8)
    tiles = shuffle_scales(scales, 37, 80)
    assert tiles.shape == (3, 5, 16)
    for n in range(37):
        assert torch.equal(tiles[n // 16, :, n % 16], scales[n])
    assert not tiles[2, :, 5:].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_from_both_layouts(shape):
    n, k = shape
    packed = random_packed(n, k, E2M1)
    ids = torch.randint(0, n, (2, 3))
    expected = unpack(packed.codes, k)[ids]
    assert torch.equal(code_rows(packed.codes, ids, k), expected)
    assert torch.equal(code_rows(to_layout(packed, "tiled").codes, ids, k), expected)


def test_wrong_tiles_are_refused():
    with pytest.raises(BadInput, match=r"\[2, 8, 64\]"):
        unshuffle_codes(torch.zeros(2, 8, 64, dtype=torch.uint8), 16, 64)


@pytest.mark.parametrize("element", [*FP4_ELEMENTS.values(), E4M3FN], ids=lambda e: e.name)
def test_cpp_elements_equal_python(element):
    cpp, python = torch.tensor(native.module().element_values(element.fields)), torch.tensor(element.values)
    assert torch.equal(cpp.isnan(), python.isnan()) and torch.equal(cpp.nan_to_num(), python.nan_to_num())
    assert torch.equal(cpp.signbit()[~cpp.isnan()], python.signbit()[~cpp.isnan()])


@pytest.mark.parametrize("scale", SCALES.values(), ids=lambda s: s.name)
def test_cpp_scales_equal_python(scale):
    cpp, python = torch.tensor(native.module().scale_values(scale.name)), torch.tensor(scale.values)
    assert torch.equal(cpp.isnan(), python.isnan())
    assert torch.equal(cpp[~cpp.isnan()], python[~cpp.isnan()])
