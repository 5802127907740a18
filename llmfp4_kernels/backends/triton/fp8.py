"""Operands of 8-bit floats: OCP's E4M3 activations with one scale per token or in all, by weights decoded to E4M3.

Which products have them is cuda_sm90.multiplies_fp8's rule, for OCP's E4M3 alone (a code of LLM-FP4's, 480, is a NaN
there: it goes on as bf16, as does what this file refuses). Weights with E8M0 scales of groups are element · 2^exponent,
the largest that E4M3 holds; a scale, at most its row's largest, lowers the exponent of each that is not 0.

What Triton 3.6.0 and 3.9.0 make of `tl.dot` on float8e4nv, seen in their PTX:

    sm_80         they refuse the type
    sm_89, sm_120 mma.sync.m16n8k32.f32.e4m3.e4m3.f32
    sm_90         wgmma.mma_async.m64nNk32.f32.e4m3.e4m3, weights in registers, of 4 or 8 warps and at least 16 tokens;
                  else cvt.rn.f16x2.e4m3x2 and mma.sync.m16n8k16 of fp16
    sm_100        tcgen05.mma.kind::f8f6f4; of 2 warps cvt and mma.sync of fp16 as above

Ada's and Hopper's tensor cores add in 14 bits (say those who probed them, see cuda_sm90.multiplies_fp8; Ada's 16
products at a time), so a tile's step is a product of its own, added to fp32 sums by add.f32: 128 inputs at most.
`tl.dot`'s max_num_imprecise_acc does not do that. It is read for sm_90 alone: of a product that is given the sums, a
limit of its whole step of 128 changes nothing in the PTX, a lower one does not compile where weights are in registers.
A limit of 0 makes Triton fold the addition into the product on all of them, and take mma.sync of fp16 on sm_90. So
each product has its step as limit: not 0, and not passed.
"""

from __future__ import annotations

from ...formats import E4M3FN
from ...packed import PackedFP4
from ...problem import Problem
from .. import cuda_sm90
from . import machine
from .machine import FENCED
from .machine import LEAST_VERSION as LEAST

MOST_SUMMED = 128
"""Inputs whose products tensor cores add before fp32 does."""
SINCE = {(8, 9): LEAST, (9, 0): LEAST, (10, 0): FENCED, (12, 0): LEAST}
"""Compute capabilities whose tensor cores multiply 8-bit floats, and from which Triton on that is used."""
WARPGROUP = ((9, 0), (10, 0))
"""Where 4 warps multiply together, or Triton converts to fp16."""
LEAST_TOKENS = 16
"""There."""


def multiplies(problem: Problem) -> bool:
    """Whether a product has such operands on the GPU that holds it; the same of all its tiles."""
    if problem.activation != E4M3FN or not cuda_sm90.multiplies_fp8(problem) or not machine.here.ptx:
        return False
    since = SINCE.get(machine.here.capability(problem.device_index))
    return (
        since is not None
        and machine.version() >= since
        and problem.scale_span <= cuda_sm90.most_binades(problem.element)
    )


def exponent(packed: PackedFP4) -> int:
    """Operands are elements times 2^exponent and the group's scale, relative to its row's largest."""
    return cuda_sm90.exponent(packed.element) if packed.scale else 0
