"""Which CUDA row multiplies, in which tile and in how many splits of k, where that was measured (measured.py).

Without a measurement the registry's order and csrc/cuda's plan_* functions decide, by counting. With one, for a product
of the same operands: the measured shape next to n x k, by factors of two along either side and at most REACH of them in
all; of that shape, the measured number of tokens next to m that serves it (measured.serves); of the rows of the
registry measured there, the fastest that takes the product. Tile and splits are then the measured ones, or the nearest
that the product has: the native module says which it has (cuda_division). For another number of tokens they are the
counted ones where the measured tile pads m to more rows than the counted one.
"""

from __future__ import annotations

import functools
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .. import native
from ..problem import Problem
from . import cuda_sm90, measured
from .gpu import Machine
from .measured import Conditions, Kind, Known

NAMES = ("cuda.gemv", "cuda.sm90", "cuda.sm80")
"""The rows that are measured, in the order of the registry."""
REACH = 2
"""4096 x 11008 is 1.43 from 4096 x 4096, 1024 x 8192 is 3."""
PLANES = {"int8": (1, 2), "e4m3": (1,), "float16": (1,), "bfloat16": (1, 2, 4)}
"""Of each kind of operand: how many a row of activations may become."""


def planes(problem: Problem) -> int:
    """Rows of operands that a row of activations becomes: csrc/cuda/linear.h has the same."""
    activation = problem.activation
    if activation:  # int8; E3M0 with a shift takes two
        return 2 if problem.shift and activation.max_integer << activation.max_shift > 127 else 1
    # bf16 parts
    return 4 if problem.dtype == torch.float32 else 2 if problem.x_factor or problem.shift else 1


@dataclass(frozen=True)
class Form:
    """A product to the CUDA rows, as strings and numbers that JSON holds. How activations become operands is none of
    it, nor are the elements: their codes are looked up alike."""

    operand: str
    planes: int
    scale: str
    """Of the weight's groups; "none" without."""
    group_size: int
    n: int
    k: int

    @staticmethod
    def of(problem: Problem) -> Form:
        """Of a problem that a CUDA row takes."""
        if problem.activation:
            operand = "e4m3" if cuda_sm90.multiplies_fp8(problem) else "int8"
        else:
            operand = "float16" if problem.dtype == torch.float16 and planes(problem) == 1 else "bfloat16"
        scale = problem.scale.name if problem.scale else "none"
        return Form(operand, planes(problem), scale, problem.group_size, problem.n, problem.k)


@dataclass(frozen=True)
class Tile:
    """How a row of the registry multiplies."""

    kernel: str
    """The row's name."""
    tile: int
    """Its place among the tiles of csrc/cuda/KERNEL.cu."""
    size: str
    """Outputs x rows of operands of that tile."""
    splits: int
    """Blocks that share a sum over k."""


@dataclass(frozen=True)
class Row:
    """The fastest tile and splits found for m tokens on one row of the registry."""

    form: Form
    m: int
    config: Tile
    seconds: float
    """Of a call, quantization of activations included."""
    counted_seconds: float
    """In the same rounds, of the row and the tile that counting chooses."""
    timed: int
    """Of all rows of the registry, before time was up, of `candidates`."""
    candidates: int
    results: str
    """The file that holds all that was timed."""
    commit: str
    date: str


def division(kernel: str, form: Form, m: int, multiprocessors: int, tile: int = -1, splits: int = 0):
    """The native module's CudaPlan of a product; raises ValueError for a tile or splits that it does not have."""
    return native.module().cuda_division(
        kernel.removeprefix("cuda."), form.n, form.k, form.scale, m * form.planes, form.operand == "int8",
        multiprocessors, tile, splits,
    )  # fmt: skip


def tile_of(kernel: str, plan) -> Tile:
    return Tile(kernel, plan.tile, plan.tile_size, plan.splits)


def refusal_of_size(rows: int, n: int) -> str | None:
    """Why a product is beyond what csrc/cuda counts in 32 bits, or None."""
    if rows <= 1 << 30 and rows * n <= 1 << 40:
        return None
    return f"{rows} rows of operands by {n} outputs are more than 2^30 rows or 2^40 sums"


def _refusal(row: Row, here: Conditions) -> str | None:
    form, config = row.form, row.config
    if config.kernel not in NAMES:
        return f"{config.kernel!r} is none of {', '.join(NAMES)}"
    if form.planes not in PLANES.get(form.operand, ()) or form.scale not in ("none", "e8m0", "e4m3"):
        return f"there are no {form.planes} planes of {form.operand} with {form.scale} scales"
    if (form.scale == "none") != (form.group_size == 0):
        return f"there are no groups of {form.group_size} inputs with {form.scale} scales"
    rows = row.m * form.planes
    if refusal_of_size(rows, form.n) or max(form.n, form.k, config.tile, config.splits) >= 1 << 30:
        return f"{rows} rows of operands, tile {config.tile} and splits = {config.splits} are beyond all products"
    if config.tile < 0 or config.splits < 1:
        return f"tile {config.tile} and splits = {config.splits} are none"
    if config.kernel == "cuda.sm90" and form.operand == "int8" and form.scale != "none":
        return f"cuda.sm90 multiplies no int8 by {form.scale} groups"
    if config.kernel != "cuda.sm90" and form.operand == "e4m3":
        return f"{config.kernel} does not multiply e4m3"
    try:
        plan = division(config.kernel, form, row.m, here.multiprocessors, config.tile, config.splits)
    except ValueError as error:
        return f"{config.kernel}: {error}"
    if plan.tile_size != config.size:
        return f"tile {config.tile} of {config.kernel} is {plan.tile_size}, not {config.size}"
    return None


KIND = Kind("cuda", "llmfp4 cuda tiles", 2, Conditions, Row, _refusal, "counted")


def known(machine: Machine, device: torch.device) -> Known:
    """What was measured on this GPU; the files are read once."""
    return measured.known(KIND, functools.partial(Conditions.of, machine, device))


def put(rows: list[Row], machine: Machine, device: torch.device, folder: Path) -> Path:
    """Rows in this GPU's file in a folder, in place of those of the same form, m and row of the registry."""
    identity = lambda row: (row.form, row.m, row.config.kernel)  # noqa: E731
    return measured.put(KIND, rows, Conditions.of(machine, device), folder, identity)


def nearest(rows: tuple[Row, ...], form: Form, m: int, kernels: Container[str]) -> Row | None:
    """The row that the rule at the top chooses for these rows of the registry."""

    def distance(row: Row) -> tuple[float, float, float]:
        shape = measured.apart(row.form.n, form.n) + measured.apart(row.form.k, form.k)
        return shape, measured.apart(row.m, m), row.seconds

    serving = [
        row
        for row in rows
        if row.config.kernel in kernels
        and replace(row.form, n=form.n, k=form.k) == form
        and measured.serves(row.m, m)
        and distance(row)[0] <= REACH
    ]
    return min(serving, key=distance, default=None)


def rows_of_tile(plan) -> int:
    return int(plan.tile_size.split("x")[1])


def _padded(plan, rows: int) -> int:
    """Rows of all tiles."""
    return -(-rows // rows_of_tile(plan)) * rows_of_tile(plan)


def choose(known: Known, form: Form, m: int, kernels: Container[str], multiprocessors: int) -> tuple[Tile, str] | None:
    """(the measured row of the registry, its tile and splits, as far as the product has them; where it is from)."""
    row, path = known.find(lambda rows: nearest(rows, form, m, kernels))
    if row is None:
        return None
    kernel, config = row.config.kernel, row.config
    first, last = division(kernel, form, m, multiprocessors).tiles
    plan = division(kernel, form, m, multiprocessors, min(max(config.tile, first), last))
    counted = division(kernel, form, m, multiprocessors)
    rows = m * form.planes
    if row.m == m or _padded(plan, rows) <= _padded(counted, rows):
        plan = division(kernel, form, m, multiprocessors, plan.tile, min(config.splits, plan.most_splits))
    else:
        plan = counted
    source = f"measured at m = {row.m}, n = {row.form.n}, k = {row.form.k}, {row.date}, commit {row.commit}, in {path}"
    return tile_of(kernel, plan), source
