"""Row order on disk, tiles under the CPU kernels (csrc/core/layout.h has the picture and the index formula)."""

from __future__ import annotations

import dataclasses

import torch

from . import native
from .errors import BadInput
from .packed import PackedFP4, codes_shape, unpack


def shuffle_codes(codes: torch.Tensor, k: int) -> torch.Tensor:
    """Codes uint8 [n, ceil(k/2)] in row order → tiles [ceil(n/16), padded k / 8, 64], padded with code 0."""
    n, codes = codes.shape[0], codes.contiguous()  # a name keeps the copy alive while its address is in use
    tiles = torch.empty(codes_shape(n, k, "tiled"), dtype=torch.uint8)
    native.module().shuffle(codes.data_ptr(), tiles.data_ptr(), n, k)
    return tiles


def unshuffle_codes(tiles: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Inverse of `shuffle_codes`."""
    if list(tiles.shape) != codes_shape(n, k, "tiled"):
        raise BadInput(f"tiles of shape {list(tiles.shape)} do not hold {n} x {k} codes")
    codes, tiles = torch.empty(codes_shape(n, k, "row"), dtype=torch.uint8), tiles.contiguous()
    native.module().unshuffle(tiles.data_ptr(), codes.data_ptr(), n, k)
    return codes


def shuffle_scales(group_scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Group scales uint8 [n, groups] → [ceil(n/16), groups, 16], padded with byte 0."""
    groups, group_scale = group_scale.shape[1], group_scale.contiguous()
    tiles = torch.empty(-(-n // 16), groups, 16, dtype=torch.uint8)
    native.module().shuffle_scales(group_scale.data_ptr(), tiles.data_ptr(), n, k, groups)
    return tiles


def to_layout(packed: PackedFP4, layout: str) -> PackedFP4:
    """The same weight with its codes in layout "row" or "tiled"; group scales stay in row order."""
    if packed.layout == layout:
        return packed
    n, k = packed.shape
    codes = shuffle_codes(packed.codes, k) if layout == "tiled" else unshuffle_codes(packed.codes, n, k)
    return dataclasses.replace(packed, codes=codes, layout=layout)


def code_rows(codes: torch.Tensor, ids: torch.Tensor, k: int) -> torch.Tensor:
    """Codes (one a byte) [..., k] of the rows `ids` [...], from row order or from tiles."""
    if codes.ndim == 2:
        return unpack(codes[ids], k)
    rows = codes.view(codes.shape[0], -1, 16, 4)[ids // 16, :, ids % 16]
    return torch.cat([rows & 15, rows >> 4], dim=-1).flatten(-2)[..., :k]
