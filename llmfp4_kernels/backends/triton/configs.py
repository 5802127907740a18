"""Tile sizes by kernel, operand and number of tokens. None was measured: this project has not met a GPU yet.

Nothing is tuned at run time: the first call of a shape costs its compilation, which Triton keeps on disk.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

GEMV_TOKENS = 16
FENCED = (3, 9)
"""Triton from this version on puts fence.proxy.async between cp.async and the tensor cores that read shared memory by
themselves (sm_90 and later). 3.6.0 does not, and they may read before the copy is visible."""


@dataclass(frozen=True)
class Config:
    rows: int
    """Of codes: outputs are twice as many. Warps share them: two products side by side make Triton put all warps along
    this side, and fewer than 16 rows a warp would be multiplied twice."""
    tokens: int
    block_k: int
    warps: int
    stages: int


TABLE = {
    # (kernel, bits of an operand): (up to so many tokens, config), ...
    ("gemv", 8): ((GEMV_TOKENS, Config(64, 16, 128, 4, 4)),),
    ("gemv", 16): ((GEMV_TOKENS, Config(64, 16, 128, 4, 4)),),
    ("gemm", 8): (
        (32, Config(64, 32, 128, 4, 4)),
        (64, Config(64, 64, 128, 4, 4)),
        (1 << 31, Config(128, 64, 64, 8, 4)),
    ),
    ("gemm", 16): (
        (32, Config(64, 32, 64, 4, 4)),
        (64, Config(64, 64, 64, 4, 4)),
        (1 << 31, Config(128, 64, 64, 8, 4)),
    ),
}


def choose(
    kernel: str, operands: torch.Tensor, m: int, capability: tuple[int, int], version: tuple[int, int]
) -> Config:
    """The first row of the table that holds m tokens; where Triton forgets the fence, one of 2 warps, with which it
    keeps to mma.sync (wgmma takes four warps)."""
    config = next(config for limit, config in TABLE[kernel, 8 * operands.element_size()] if m <= limit)
    if capability >= (9, 0) and version < FENCED:
        return dataclasses.replace(config, rows=32, tokens=min(config.tokens, 64), warps=2)
    return config


def splits(config: Config, m: int, half: int, padded_k: int, multiprocessors: int) -> int:
    """Blocks that share a sum over k: enough to give each multiprocessor two, as long as each keeps four steps."""
    blocks = -(-m // config.tokens) * -(-half // config.rows)
    steps = -(-padded_k // config.block_k)
    return max(1, min(steps // 4, 2 * multiprocessors // blocks))
