"""Tile sizes by kernel, operand and number of tokens, where no measured ones are known (tuned.py). They are guesses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ...packed import padded_inputs
from ..gpu import sm
from . import fp8
from .form import Form
from .machine import FENCED

GEMV_TOKENS = 16
ROWS, TOKENS, BLOCKS_K, WARPS, STAGES = (32, 64, 128, 256), (8, 16, 32, 64, 128, 256), (64, 128, 256), (1, 2, 4, 8), 8
"""What a tile may have; stages up to this. From 64 inputs on, a step has whole lines of codes and of int8 operands."""
SPLIT_LIMIT = 65535
REGISTERS = 255
"""Of a thread."""
SHARED_KB = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (12, 0): 99, (12, 1): 99}
"""Shared memory of a block by compute capability, 227 of others from 9.0 on. CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability"."""


@dataclass(frozen=True)
class Config:
    rows: int
    """Of codes: outputs are twice as many. Warps share them: two products side by side make Triton put all warps along
    this side, and fewer than 16 rows a warp would be multiplied twice."""
    tokens: int
    block_k: int
    warps: int
    stages: int
    splits: int = 0
    """Blocks that share a sum over k; 0 in tables, where a product's size decides."""


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


def adds_fence(config: Config, capability: tuple[int, int], version: tuple[int, int]) -> bool:
    """Whether product.py brings the fence before wgmma that Triton forgets. It stands where Triton 3.9 has its own:
    behind the wait for cp.async and the barrier, in every thread that is about to multiply."""
    return config.warps % 4 == 0 and capability == (9, 0) and version < FENCED


def unfenced(capability: tuple[int, int], version: tuple[int, int]) -> bool:
    """Whether tcgen05 is without one: Triton takes it for four warps, and mma.sync for two."""
    return capability >= (10, 0) and version < FENCED


def choose(form: Form, m: int, capability: tuple[int, int], version: tuple[int, int], multiprocessors: int) -> Config:
    """The first row of the table that holds m tokens, with its splits; where Triton forgets the fence, of 2 warps."""
    config = next(config for limit, config in TABLE[form.kernel, form.bits] if m <= limit)
    if unfenced(capability, version):
        config = dataclasses.replace(config, rows=32, tokens=min(config.tokens, 64), warps=2)
    return dataclasses.replace(config, splits=splits(config, form, m, multiprocessors))


def steps(config: Config, k: int) -> int:
    """Of block_k inputs, in a whole sum."""
    return -(-padded_inputs(k) // config.block_k)


def splits(config: Config, form: Form, m: int, multiprocessors: int) -> int:
    """Blocks that share a sum over k: enough to give each multiprocessor two, as long as each keeps four steps."""
    half = -(-form.n // 2)
    blocks = -(-m // config.tokens) * -(-half // config.rows)
    return max(1, min(steps(config, form.k) // 4, 2 * multiprocessors // blocks))


def sums(config: Config, form: Form) -> int:
    """That the threads of a block hold; of 8-bit floats, those of a step beside all steps'."""
    return 2 * (2 if form.fp8 else form.planes) * config.rows * config.tokens


def refusal(config: Config, form: Form, capability: tuple[int, int], version: tuple[int, int]) -> str | None:
    """None, or why the kernel does not run in such tiles, or not right."""
    for name, allowed in (("rows", ROWS), ("tokens", TOKENS), ("block_k", BLOCKS_K), ("warps", WARPS)):
        value = getattr(config, name)
        if value not in allowed:
            return f"{name} = {value} is none of {', '.join(map(str, allowed))}"
    if not 1 <= config.stages <= STAGES:
        return f"stages = {config.stages} are not 1 to {STAGES}"
    held, threads = sums(config, form), 32 * config.warps
    if held > REGISTERS * threads:
        return f"{held} sums are {held // threads} of each of {threads} threads, which have {REGISTERS} registers"
    # Triton keeps what all stages but one load, and scales, or what wgmma asks for, beside it.
    tokens = config.tokens * form.bits // 8 * form.planes * form.parts
    shared = (config.stages - 1) * config.block_k * (config.rows + tokens)
    most = SHARED_KB.get(capability, 227) << 10
    if shared > most:
        return f"{config.stages} stages take {shared} bytes of shared memory or more, {sm(capability)} has {most}"
    if config.rows < 16 * config.warps:
        return f"{config.warps} warps would multiply some of {config.rows} rows twice, each needs 16 of its own"
    if unfenced(capability, version) and config.warps % 4 == 0:
        return f"{config.warps} warps use tcgen05, before which Triton {version[0]}.{version[1]} forgets a fence"
    if form.fp8 and (why := _refusal_of_fp8(config, capability)):
        return why
    most = min(steps(config, form.k), SPLIT_LIMIT)
    if not 1 <= config.splits <= most:
        return f"splits = {config.splits} of k = {form.k} are not 1 to {most}, its steps"
    return None


def _refusal_of_fp8(config: Config, capability: tuple[int, int]) -> str | None:
    if config.block_k > fp8.MOST_SUMMED:
        return (
            f"block_k = {config.block_k}: sums of 8-bit floats go to fp32 every {fp8.MOST_SUMMED} inputs at the latest"
        )
    if capability in fp8.WARPGROUP and (config.warps % 4 or config.tokens < fp8.LEAST_TOKENS):
        return (
            f"{config.warps} warps and {config.tokens} tokens: Triton would convert 8-bit floats to fp16, "
            f"{sm(capability)} multiplies them by 4 or 8 warps and at least {fp8.LEAST_TOKENS} tokens"
        )
    return None
