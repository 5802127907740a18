"""The CUDA kernels' layout: its index formula is a bijection, torch repacks by it, there and back."""

import dataclasses

import pytest
import torch
from cases import random_packed

from llmfp4_kernels import layout, native
from llmfp4_kernels.errors import BadInput
from llmfp4_kernels.formats import E2M1
from llmfp4_kernels.packed import codes_shape, unpack

SHAPES = [(1, 1), (16, 64), (17, 65), (40, 130), (5, 7)]
with_cuda = pytest.mark.skipif(native.problem_with_cuda() is not None, reason=native.problem_with_cuda() or "")


@with_cuda
@pytest.mark.parametrize("shape", SHAPES)
def test_formula_is_a_bijection_of_bits(shape):
    n, k = shape
    place = native.module().unit_place
    bits = set()
    for i in range(n):
        for j in range(k):
            word, magnitude, sign = place(n, k, i, j)
            bits |= {(word, magnitude + b) for b in range(3)} | {(word, sign)}
    assert len(bits) == 4 * n * k
    assert {bit for _, bit in bits} <= set(range(32)) and 4 * max(bits)[0] < native.module().unit_bytes(n, k)


@with_cuda
@pytest.mark.parametrize("shape", SHAPES)
def test_shuffle_follows_the_formula(shape):
    n, k = shape
    codes = random_packed(n, k, E2M1).codes
    units = layout.shuffle_units(codes, k)
    assert list(units.shape) == codes_shape(n, k, "units") and units.numel() == native.module().unit_bytes(n, k)
    words, values = units.flatten().view(torch.int32).tolist(), unpack(codes, k).tolist()
    for i in range(n):
        for j in range(k):
            word, magnitude, sign = native.module().unit_place(n, k, i, j)
            assert (words[word] >> magnitude & 7) | (words[word] >> sign & 1) << 3 == values[i][j]


@pytest.mark.parametrize("shape", [*SHAPES, (1100, 70)])
def test_there_and_back(shape):
    n, k = shape
    packed = random_packed(n, k, E2M1)
    units = layout.to_layout(packed, "units")
    assert torch.equal(layout.to_layout(units, "row").codes, packed.codes)
    tiles = layout.to_layout(units, "tiled")
    assert torch.equal(tiles.codes, layout.to_layout(packed, "tiled").codes)
    assert torch.equal(layout.to_layout(tiles, "units").codes, units.codes)
    padding = layout.code_rows(units.codes, torch.arange(units.codes.shape[0] * 16), units.codes.shape[1] * 64)
    assert not padding[n:].any() and not padding[:, k:].any()


def test_in_place_needs_whole_units_and_takes_no_second_copy():
    packed = random_packed(2080, 128, E2M1)
    codes, expected = packed.codes.clone(), layout.shuffle_units(packed.codes, 128)
    units = layout.shuffle_units(codes, 128, in_place=True)
    assert units.data_ptr() == codes.data_ptr() and torch.equal(units, expected)
    with pytest.raises(BadInput, match="n = 17, k = 64"):
        layout.shuffle_units(random_packed(17, 64, E2M1).codes, 64, in_place=True)


def test_rows_by_index():
    packed = random_packed(40, 130, E2M1)
    ids = torch.randint(0, 40, (3, 5))
    assert torch.equal(
        layout.code_rows(layout.to_layout(packed, "units").codes, ids, 130), unpack(packed.codes, 130)[ids]
    )


def test_a_packed_tensor_says_its_layout():
    packed = layout.to_layout(random_packed(20, 70, E2M1), "units")
    assert packed.shape == (20, 70)
    with pytest.raises(BadInput, match="codes must be"):
        dataclasses.replace(packed, layout="row")
    with pytest.raises(BadInput, match="only row order is saved"):
        packed.save("nowhere.safetensors")
