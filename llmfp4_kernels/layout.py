"""Row order on disk, tiles under the CPU kernels, units under the CUDA kernels, pairs under the Triton kernels.

csrc/core/layout.h and csrc/core/units.h have the pictures and the index formulas. In "pairs" a byte holds one input of
two outputs far apart, so that a kernel's two halves of a tile meet the same activations:

    byte p · padded k + i = code of output p, input i | code of output p + ceil(n/2), input i << 4
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap

import torch

from . import native
from .errors import BadInput
from .packed import PackedFP4, codes_shape, pack, padded_inputs, unpack

LAYOUT_OF_NDIM = {1: "pairs", 2: "row", 3: "tiled", 4: "units"}
"""The layout of codes by their number of dimensions."""
CHUNK_STRIPS = 64
"""Strips of 16 outputs that are repacked at a time: 64 outputs x 64 k x 7 bytes of scratch, at k = 4096 7 MB."""
HUGE_PAGE = 2 << 20


def _in_huge_pages(shape: list[int]) -> torch.Tensor:
    """Fresh uint8 memory for what is read from end to end: in huge pages, if it fills one and Linux grants them.

    On a virtual Xeon one row times 4096 x 4096 codes takes 0.94 of the time with E2M1 activations, 0.89 with 16 bits.
    """
    size = math.prod(shape)
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=torch.uint8, device="cpu")
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % HUGE_PAGE
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start).view(shape)


def shuffle_codes(codes: torch.Tensor, k: int) -> torch.Tensor:
    """Codes uint8 [n, ceil(k/2)] in row order → tiles [ceil(n/16), padded k / 8, 64], padded with code 0."""
    n, codes = codes.shape[0], codes.contiguous()  # a name keeps the copy alive while its address is in use
    tiles = _in_huge_pages(codes_shape(n, k, "tiled"))
    native.module().shuffle(codes.data_ptr(), tiles.data_ptr(), n, k)
    return tiles


def _units_of(codes: torch.Tensor, k: int) -> torch.Tensor:
    """Codes uint8 [16·s, ceil(k/2)] in row order → units [s, padded k / 64, 32, 16]: csrc/core/units.h in torch."""
    nibbles = torch.nn.functional.pad(unpack(codes, k), (0, -k % 64))
    # [strip, half, g, unit, t, q, i] → a lane's word q of unit: [strip, unit, g, t, q, half, i]
    nibbles = nibbles.view(-1, 2, 8, nibbles.shape[1] // 64, 4, 4, 4).permute(0, 3, 2, 4, 5, 1, 6)
    magnitude, sign = nibbles & 7, nibbles & 8
    # Byte b of a word: magnitudes of i = 2·(b % 2) and the next, of half b // 2; signs of i = b, half 1, half 0.
    pairs = magnitude[..., 0::2] | magnitude[..., 1::2] << 4
    return (pairs.flatten(-2) | sign[..., 1, :] | sign[..., 0, :] << 4).reshape(-1, nibbles.shape[1], 32, 16)


def shuffle_units(codes: torch.Tensor, k: int, in_place: bool = False) -> torch.Tensor:
    """Codes uint8 [n, ceil(k/2)] in row order → units [ceil(n/16), padded k / 64, 32, 16] on the same device.

    A few strips at a time. `in_place`: the units take the memory of the codes, which need n % 16 = k % 64 = 0.
    """
    n, shape = codes.shape[0], codes_shape(codes.shape[0], k, "units")
    if in_place and (n % 16 or k % 64 or not codes.is_contiguous()):
        raise BadInput(f"codes with n = {n}, k = {k} cannot become units in place: that needs n % 16 = k % 64 = 0")
    units = codes.view(shape) if in_place else torch.empty(shape, dtype=torch.uint8, device=codes.device)
    for strip in range(0, shape[0], CHUNK_STRIPS):
        rows = codes[16 * strip : 16 * (strip + CHUNK_STRIPS)]
        units[strip : strip + CHUNK_STRIPS] = _units_of(torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % 16)), k)
    return units


def shuffle_pairs(codes: torch.Tensor, k: int) -> torch.Tensor:
    """Codes uint8 [n, ceil(k/2)] in row order → pairs [ceil(n/2) · padded k], padded with code 0; the same device."""
    half, inputs = -(-codes.shape[0] // 2), padded_inputs(k)
    codes = torch.nn.functional.pad(codes, (0, inputs // 2 - codes.shape[1], 0, 2 * half - codes.shape[0]))
    low, high = codes[:half], codes[half:]
    pairs = torch.empty(half, inputs, dtype=torch.uint8, device=codes.device)
    pairs[:, 0::2] = low & 15 | high << 4
    pairs[:, 1::2] = low >> 4 | high & 240
    return pairs.flatten()


def unshuffle_codes(tiles: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Inverse of `shuffle_codes`, `shuffle_units` and `shuffle_pairs`, in new memory on the same device."""
    if list(tiles.shape) not in (codes_shape(n, k, layout) for layout in ("tiled", "units", "pairs")):
        raise BadInput(f"tiles of shape {list(tiles.shape)} do not hold {n} x {k} codes")
    if tiles.ndim != 3 or tiles.device.type != "cpu":
        step = 16 * CHUNK_STRIPS
        chunks = [torch.arange(row, min(row + step, n), device=tiles.device) for row in range(0, n, step)]
        return torch.cat([pack(code_rows(tiles, ids, k)) for ids in chunks])
    codes, tiles = torch.empty(codes_shape(n, k, "row"), dtype=torch.uint8, device="cpu"), tiles.contiguous()
    native.module().unshuffle(tiles.data_ptr(), codes.data_ptr(), n, k)
    return codes


def shuffle_scales(group_scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Group scales uint8 [n, groups] → [ceil(n/16), groups, 16], padded with byte 0."""
    groups, group_scale = group_scale.shape[1], group_scale.contiguous()
    tiles = torch.empty(-(-n // 16), groups, 16, dtype=torch.uint8, device="cpu")
    native.module().shuffle_scales(group_scale.data_ptr(), tiles.data_ptr(), n, k, groups)
    return tiles


def convert_codes(codes: torch.Tensor, n: int, k: int, layout: str) -> torch.Tensor:
    """Codes of an [n, k] weight in any layout → in `layout`; themselves if they are in it, else new memory."""
    if LAYOUT_OF_NDIM[codes.ndim] == layout:
        return codes
    rows = codes if codes.ndim == 2 else unshuffle_codes(codes, n, k)
    if layout == "row":
        return rows
    return {"tiled": shuffle_codes, "units": shuffle_units, "pairs": shuffle_pairs}[layout](rows, k)


def to_layout(packed: PackedFP4, layout: str) -> PackedFP4:
    """The same weight with its codes in layout "row", "tiled", "units" or "pairs"; group scales stay in row order."""
    if packed.layout == layout:
        return packed
    return dataclasses.replace(packed, codes=convert_codes(packed.codes, *packed.shape, layout), layout=layout)


def code_rows(codes: torch.Tensor, ids: torch.Tensor, k: int) -> torch.Tensor:
    """Codes (one a byte) [..., k] of the rows `ids` [...], from any layout."""
    if codes.ndim == 2:
        return unpack(codes[ids], k)
    if codes.ndim == 1:
        pairs = codes.view(-1, padded_inputs(k))
        rows, upper = pairs[ids % len(pairs)], (ids >= len(pairs))[..., None]
        return torch.where(upper, rows >> 4, rows & 15)[..., :k]
    if codes.ndim == 4:
        words = codes.view(*codes.shape[:2], 8, 4, 4, 4)[ids // 16, :, ids % 8]  # [..., unit, t, q, byte]
        upper = (ids % 16 >= 8)[..., None, None, None, None]
        pairs = torch.where(upper, words[..., 2:], words[..., :2])
        magnitudes = torch.stack([pairs & 7, pairs >> 4 & 7], -1).flatten(-2)
        return (magnitudes | torch.where(upper, words, words >> 4) & 8).flatten(-4)[..., :k]
    rows = codes.view(codes.shape[0], -1, 16, 4)[ids // 16, :, ids % 16]
    return torch.cat([rows & 15, rows >> 4], dim=-1).flatten(-2)[..., :k]
