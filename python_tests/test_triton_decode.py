"""The lookups of the Triton kernels, written twice: PTX, and what the interpreter takes, agree with the elements."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import random_packed
from triton_on_cpu import WHY_NOT, OnCpu

from llmfp4_kernels.formats import E1M2, E2M1, E3M0, E4M3, E8M0

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")


def multiplied(packed, x, ptx):
    from llmfp4_kernels.backends.triton.prepared import Prepared

    with OnCpu(ptx=ptx) as gpu:
        y = gpu.run(Prepared(packed, None), "triton.gemm", x)
        assert (".reg .b32 codes, upper" in gpu.launched[-1].ptx) == ptx
        return y


@pytest.mark.parametrize(
    ("element", "kind"),
    [(E1M2, "int8"), (E2M1, "int8"), (E2M1, "fp16"), (E2M1, "bf16"), (E3M0, "bf16")],
    ids=lambda v: getattr(v, "name", v),
)
def test_every_code_reaches_the_product(element, kind):
    """x picks the weights of 16 inputs one by one: every code in either nibble."""
    packed = random_packed(32, 16, element, E2M1 if kind == "int8" else None)
    packed.codes = (torch.arange(8) * 34 + 16).to(torch.uint8).repeat(32, 1)
    packed.codes[16:] = packed.codes[16:].flip(1)
    packed.row_scale = torch.ones(32)
    x = torch.eye(16)
    if kind == "int8":
        packed.x_scale = torch.tensor(1.0)
    else:
        x = x.to(torch.float16 if kind == "fp16" else torch.bfloat16)
    codes = torch.stack([packed.codes & 15, packed.codes >> 4], -1).flatten(1)
    assert set(codes[:16].flatten().tolist()) == set(codes[16:].flatten().tolist()) == set(range(16))
    expected = torch.tensor(element.values)[codes.long()].T.contiguous()
    for ptx in (True, False) if element == E2M1 else (True,):
        assert torch.equal(multiplied(packed, x, ptx).float(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [E8M0, E4M3], ids=lambda s: s.name)
def test_every_scale_byte(scale, dtype):
    """One group a row, every byte that is no NaN; x picks the first weight, 1.0."""
    values = torch.tensor(scale.values)
    bytes = torch.arange(256)[values.isfinite()].to(torch.uint8)
    packed = random_packed(len(bytes), 32, E2M1, scale=scale, group_size=32)
    packed.group_scale, packed.row_scale = bytes[:, None].clone(), torch.ones(len(bytes))
    packed.codes = torch.full_like(packed.codes, E2M1.values.index(1.0) * 17)
    x = torch.zeros(1, 32, dtype=dtype)
    x[0, 0] = 1
    expected = values[bytes.long()].to(dtype)
    assert torch.equal(multiplied(packed, x, True)[0], expected)


INTERPRETED = """
import contextlib, sys
sys.path.insert(0, {folder!r})
import torch
from cases import random_packed, random_x, same_bits
from test_dynamic import INT8, dynamic_packed
from llmfp4_kernels import reference
from llmfp4_kernels.backends.triton import machine
from llmfp4_kernels.backends.triton.prepared import Prepared
from llmfp4_kernels.formats import E1M2, E2M1, E3M0, INTEGER, Dynamic
from llmfp4_kernels.problem import Kernel

class Interpreter(machine.Machine):
    device_type, ptx = "cpu", False
    capability = lambda self, index: (8, 0)
    multiprocessors = lambda self, device: 2
    on = lambda self, device: contextlib.nullcontext()

machine.here = Interpreter()
from triton.runtime import interpreter
before = interpreter._patch_lang_tensor

def patched(tensor, scope):
    # Triton 3.6 counts loops by int() of an array, which numpy 2.4 refuses.
    before(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

interpreter._patch_lang_tensor = patched
cases = [(random_packed(70, 200, e, E2M1, True), random_x(5, 200)) for e in (E2M1, E1M2, E3M0)]
cases += [(random_packed(70, 200, E2M1, E3M0, True), random_x(5, 200))]
cases += [(dynamic_packed(70, 200, E2M1, E2M1, Dynamic(16, INTEGER)), random_x(5, 200))]
cases += [(dynamic_packed(70, 200, E2M1, INT8, Dynamic()), random_x(5, 200, torch.float16))]
for packed, x in cases:
    y = Prepared(packed, torch.ones(70)).run(Kernel("triton.gemm", "pairs", None, None), x)
    assert same_bits(y, reference.gemm(x, packed, torch.ones(70)).to(x.dtype)), packed.element
packed, x = random_packed(70, 200, E1M2), random_x(5, 200, torch.float16) / 64
y = Prepared(packed, None).run(Kernel("triton.gemm", "pairs", None, None), x)
assert torch.allclose(y.float(), reference.gemm(x, packed), rtol=1e-3, atol=1e-3)
print("interpreted", len(cases) + 1)
"""


def test_the_interpreter_runs_the_kernels_of_integers_and_fp16():
    """TRITON_INTERPRET is read when Triton is imported: another process. bf16 it gets wrong, so nothing of that."""
    code = INTERPRETED.format(folder=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
    assert done.stdout.strip() == "interpreted 7", done.stderr[-2000:]
