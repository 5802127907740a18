"""cuda.sm120: Blackwell's FP4 tensor cores (csrc/cuda/gemm_sm120.h). It has never run on hardware: force it by name.

Both sides are E2M1 with a scale for every block of inputs, of one kind: powers of two for 32 inputs (E8M0), or E4M3 for
16. What each recipe asks of a side:

    E8M0    mxfp4's weights and activations; LLM-FP4's shift: inputs are sorted by it, so that a block has one, 2^-shift
    E4M3    nvfp4's weights and activations; integer group scales of activations (gptq-fp4-a4)
    either  one scale per row of weights; one scale per token or in all of activations

Sums are fp32. Where weights have one scale per row they are the integers of the other kernels, and up to 2^24 exact in
fp32 arithmetic; what the hardware keeps of a sum is not specified.
"""

from __future__ import annotations

import os

import torch

from .. import native
from ..formats import E2M1, E4M3, E8M0, INTEGER, Scale
from ..layout import CHUNK_STRIPS, to_layout
from ..packed import PackedFP4, pack, unpack
from ..problem import FORCE, Kernel, Problem
from . import cuda
from .gpu import refusal_without, sm

NAME = "cuda.sm120"
CAPABILITY = (12, 0)
"""Block-scaled products are in the machine code of sm_120a, which runs on this one alone."""
BLOCK = {E8M0: 32, E4M3: 16}
ONE = {E8M0: 127, E4M3: 0x38}
STEP = 128
"""Inputs of a step of the kernel."""


def _wanted(problem: Problem) -> dict[Scale, str]:
    """The kinds of block scales that the two sides ask for, and who does."""
    wanted = {problem.scale: "weights"} if problem.scale else {}
    group = problem.dynamic.group_scale if problem.dynamic else None
    if group:
        wanted[E4M3 if group == INTEGER else group] = f"{group.name} groups of activations"
    return wanted | ({E8M0: "the shift of inputs"} if problem.shift else {})


def block_scale(problem: Problem) -> Scale:
    """The kind of both sides' block scales, for a problem whose sides agree."""
    return next(iter(_wanted(problem)), E8M0)


def _refusal_of_format(problem: Problem) -> str | None:
    if problem.element != E2M1 or problem.activation != E2M1:
        activation = problem.activation.name if problem.activation else problem.dtype
        return f"multiplies e2m1 by e2m1, these are {problem.element.name} weights and {activation} activations"
    wanted = _wanted(problem)
    if len(wanted) > 1:
        return "block scales are of one kind: " + ", ".join(f"{who} need {s.name}" for s, who in wanted.items())
    if problem.scale and problem.shift:
        return "inputs are sorted by shift, which takes them out of their weight groups"
    scale = block_scale(problem)
    block, dynamic = BLOCK[scale], problem.dynamic
    if problem.group_size % block:
        return f"groups of {problem.group_size} weights are no multiple of {block}, the block of {scale.name} scales"
    if dynamic and dynamic.group_size not in (0, block):
        return f"groups of {dynamic.group_size} activations are not {block}, the block of {scale.name} scales"
    return None


def refusal(problem: Problem) -> str | None:
    """None, or why the row does not take a problem; last, that nobody asked for what has never run on hardware."""
    unusable = cuda._unusable(problem)
    if unusable:
        return unusable
    capability = cuda.machine.capability(problem.device_index)
    if capability != CAPABILITY:
        return f"this GPU is {sm(capability)}, the FP4 products are those of sm_120 (Blackwell)"
    if not_built := refusal_without("120a", native.module().cuda_architectures):
        return not_built
    if problem.dtype not in cuda.DTYPES:
        return f"activations are {problem.dtype}, expected one of {', '.join(map(str, cuda.DTYPES))}"
    if problem.n > 128 * cuda.GRID_LIMIT:
        return f"n = {problem.n} is more than {128 * cuda.GRID_LIMIT}, which a grid holds"
    why = _refusal_of_format(problem)
    if why is None and os.environ.get(FORCE) != NAME:
        return f"has never run on hardware, only emulated: {FORCE}={NAME} runs it"
    return why


def sorted_channels(shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shifts uint8 [k] → (input at each place int32 [p], shift of each block of 32 places uint8 [p/32]), p % 128 = 0.

    Inputs are sorted by shift; each shift's are padded with -1 to whole blocks.
    """
    channel, of_block = [], []
    for value in shift.unique():
        mine = (shift == value).nonzero()[:, 0].int()
        channel.append(torch.nn.functional.pad(mine, (0, -len(mine) % BLOCK[E8M0]), value=-1))
        of_block.append(value.repeat(len(channel[-1]) // BLOCK[E8M0]))
    channel, of_block = torch.cat(channel), torch.cat(of_block)
    padding = -len(channel) % STEP
    return (
        torch.nn.functional.pad(channel, (0, padding), value=-1),
        torch.nn.functional.pad(of_block, (0, padding // BLOCK[E8M0])),
    )


def _lanes_of(nibbles: torch.Tensor) -> torch.Tensor:
    """Codes, one a byte, [16·s, padded k] → [s, padded k / 128, 1024] bytes as lanes hold them (gemm_sm120.h)."""
    # [strip, rows' half, g, unit, inputs' half, t, i] → [strip, unit, g, t, inputs' half, rows' half, i]
    lanes = nibbles.view(-1, 2, 8, nibbles.shape[1] // 64, 2, 4, 8).permute(0, 3, 2, 5, 4, 1, 6)
    return pack(lanes.reshape(lanes.shape[0], nibbles.shape[1] // STEP, 2048))


def lane_codes(packed: PackedFP4, negative: torch.Tensor | None, channel: torch.Tensor | None) -> torch.Tensor:
    """Codes in row order → uint8 [ceil(n/16), padded k / 128, 1024], of the places of `channel`, padded with code 0.

    `negative` bool [n, groups]: groups whose scale is negative; their codes are negated. A few strips at a time.
    """
    (n, k), steps = packed.shape, []
    padded_k = -(-k // STEP) * STEP if channel is None else len(channel)
    for row in range(0, n, 16 * CHUNK_STRIPS):
        rows = slice(row, row + 16 * CHUNK_STRIPS)
        codes = unpack(packed.codes[rows], k)
        if negative is not None:
            signs = negative[rows].to(torch.uint8) * E2M1.sign_code
            codes = codes ^ signs.repeat_interleave(packed.group_size, 1)[:, :k]
        if channel is not None:
            codes = torch.nn.functional.pad(codes, (0, 1))[:, channel.long()]  # -1 is the padding's
        steps.append(_lanes_of(torch.nn.functional.pad(codes, (0, padded_k - codes.shape[1], 0, -len(codes) % 16))))
    return torch.cat(steps)


def lane_scales(scales: torch.Tensor, padded_k: int, block: int) -> torch.Tensor:
    """Bytes [n, blocks] → [ceil(n/16), padded k / 128, 16, 128 / block], padded with byte 0."""
    scales = torch.nn.functional.pad(scales, (0, padded_k // block - scales.shape[1], 0, -len(scales) % 16))
    return scales.view(-1, 16, padded_k // STEP, STEP // block).transpose(1, 2).contiguous()


class Prepared(cuda.Prepared):
    """Codes and scales in the order of the kernel's lanes, beside the layer's own codes: memory twice."""

    def __init__(self, packed: PackedFP4, bias: torch.Tensor | None):
        packed = to_layout(packed, "row")
        self.n, self.k = packed.shape
        self.device, self.plans = packed.codes.device, {}
        problem = Problem.of(packed, 1, torch.float32)
        kind, dynamic, channel, negative = block_scale(problem), packed.dynamic, None, None
        if packed.shift is not None:
            channel, shift = sorted_channels(packed.shift)
            self.tensors = {"channel": channel, "shift": shift}
        else:
            self.tensors = {}
        padded_k = -(-self.k // STEP) * STEP if channel is None else len(channel)
        scales, row_scale = cuda.relative_scales(packed)
        if scales is None:
            scales = torch.full((self.n, padded_k // BLOCK[kind]), ONE[kind], dtype=torch.uint8, device=self.device)
        else:
            negative = scales >= 128 if kind == E4M3 else None
            scales = scales & 127 if kind == E4M3 else scales
            scales = scales.repeat_interleave(packed.group_size // BLOCK[kind], 1)
        self.tensors |= {
            "codes": lane_codes(packed, negative, channel),
            "group_scale": lane_scales(scales[:, : padded_k // BLOCK[kind]], padded_k, BLOCK[kind]),
            "row_scale": row_scale.contiguous(),
        }
        if packed.x_factor is not None:
            self.tensors["x_factor"] = torch.nn.functional.pad(packed.x_factor, (0, padded_k - self.k))
        if bias is not None:
            self.tensors["bias"] = bias.detach().float().contiguous()
        groups = {None: "none", INTEGER: "integers"}.get(dynamic.group_scale if dynamic else None, "blocks")
        self._check_devices()
        self._linear = native.module().CudaBlockScaled(
            n=self.n, k=self.k, padded_k=padded_k, scale=kind.name, x_groups=groups,
            x_scale=0.0 if dynamic else packed.x_scale.item(),
            **{name: tensor.data_ptr() for name, tensor in self.tensors.items()},
        )  # fmt: skip


KERNELS = (Kernel(NAME, "row", refusal, Prepared),)
