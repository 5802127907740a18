"""Block-scaled mma.sync of sm_120a on the PTX machine, against float64 on random matrices. ptxas takes the same text.

Where a matrix element lies, and which lane's which byte is a scale, is written here as the inverse of what
ptx/matrices.cpp says: from lane to row, after the fragments and the "Block Scaling" chapter of the PTX ISA 9.0.
"""

import itertools
import subprocess
from pathlib import Path

import pytest
import torch
from ptx import FAULTS, In, Program, Refusal, build, missing

from llmfp4_kernels.formats import E2M1, E4M3, E8M0

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")
HEADER = ".version 9.0\n.target sm_120a\n.address_size 64\n"
KINDS = {  # spelling, scales of 64 inputs, their format
    "mxf4": ("kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0", 2, E8M0),
    "mxf4nvf4": ("kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3", 4, E4M3),
}
SELECTORS = [  # kind, first byte and thread of A, first byte and thread of B
    (kind, *selectors)
    for kind, (_, blocks, _) in KINDS.items()
    for selectors in itertools.product(range(0, 4, blocks), range(2), range(0, 4, blocks), range(4))
]
LANE = torch.arange(32)
G, T = LANE // 4, LANE % 4


def kernel(name, kind, *selectors):
    """Each lane loads 4 words of A, 2 of B, 4 of C and one word of scales of each operand."""
    words = {"a": 4, "b": 2, "d": 4, "s": 1, "z": 1}
    lines = ["mov.u32 %t, %tid.x;"]
    for x, n in words.items():
        lines += [f"ld.param.u64 %p{x}, [p{x}]; mad.wide.u32 %p{x}, %t, {4 * n}, %p{x};"]
        lines += [f"ld.global.b32 %{x}{j}, [%p{x}+{4 * j}];" for j in range(n)]
    sets = {x: "{" + ", ".join(f"%{x}{j}" for j in range(n)) + "}" for x, n in words.items()}
    byte_a, thread_a, byte_b, thread_b = selectors
    operands = f"{sets['d']}, {sets['a']}, {sets['b']}, {sets['d']}"
    scales = f"%s0, {{{byte_a}, {thread_a}}}, %z0, {{{byte_b}, {thread_b}}}"
    lines += [f"mma.sync.aligned.m16n8k64.row.col.{KINDS[kind][0]} {operands}, {scales};"]
    lines += [f"st.global.b32 [%pd+{4 * j}], %d{j};" for j in range(4)]
    params = ", ".join(f".param .u64 p{x}" for x in words)
    declared = ".reg .b32 %a<4>, %b<2>, %d<4>, %s<1>, %z<1>, %t; .reg .b64 %pa, %pb, %pd, %ps, %pz;"
    return f".visible .entry {name}({params}) {{\n{declared}\n" + "\n".join(lines) + "\nret;\n}\n"


@pytest.fixture(scope="module")
def program():
    return Program(HEADER + "".join(kernel(f"mma_{i}", *s) for i, s in enumerate(SELECTORS)))


def test_ptxas_accepts_the_same_text(program, tmp_path):
    ptxas = Path(build.nvcc()).resolve().parent / "ptxas"
    if not ptxas.exists():
        pytest.skip("no ptxas beside nvcc")
    (tmp_path / "mma.ptx").write_text(program.ptx)
    command = [ptxas, "-arch=sm_120a", tmp_path / "mma.ptx", "-o", tmp_path / "mma.cubin"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def values(codes, table):
    return torch.tensor(table, dtype=torch.float64)[codes.long()]


def packed(codes):
    """Codes [..., 8] → words [...]: the first one in the lowest bits."""
    return (codes.long() << 4 * torch.arange(8)).sum(-1).to(torch.uint32).view(torch.int32)


def fragments(a, b):
    """Codes A [16, 64] and B [64, 8] → words [32, 4] and [32, 2]."""
    inputs = 8 * T[:, None] + torch.arange(8)
    fa = [packed(a[(G + rows)[:, None], half + inputs]) for half in (0, 32) for rows in (0, 8)]
    fb = [packed(b[half + inputs, G[:, None]]) for half in (0, 32)]
    return torch.stack(fa, 1), torch.stack(fb, 1)


def scale_words(scales, noise, holds, row, byte):
    """Scales [rows, blocks] in the lanes that hold them, from a byte on; `noise` in all other bytes."""
    words = noise.clone()
    words[holds, byte : byte + scales.shape[1]] = scales[row[holds]]
    return words.contiguous().view(torch.int32)


def run(program, i, a, b, c, scales_a, scales_b):
    _, byte_a, thread_a, byte_b, thread_b = SELECTORS[i]
    noise = torch.randint(0, 256, (2, 32, 4), dtype=torch.uint8)
    word_a = scale_words(scales_a, noise[0], thread_a == T // 2, G + 8 * (T % 2), byte_a)
    word_b = scale_words(scales_b, noise[1], thread_b == T, G, byte_b)
    rows, columns = torch.stack([G, G, G + 8, G + 8], 1), torch.stack([2 * T, 2 * T + 1] * 2, 1)
    d = c[rows, columns].contiguous()
    fa, fb = fragments(a, b)
    program.run(f"mma_{i}", 1, 32, [In(fa), In(fb), d, In(word_a), In(word_b)])
    result = torch.empty(16, 8)
    result[rows, columns] = d
    return result


@pytest.mark.parametrize("i", range(len(SELECTORS)), ids=["-".join(map(str, s)) for s in SELECTORS])
def test_every_selector(program, i):
    """Sums of at most 24 bits, exact in any order. All other bytes are noise, NaN codes among them."""
    _, blocks, scale = KINDS[SELECTORS[i][0]]
    torch.manual_seed(i)
    a, b = torch.randint(0, 16, (16, 64)), torch.randint(0, 16, (64, 8))
    c = torch.randint(-99, 100, (16, 8)).float()
    low, high = (125, 130) if scale == E8M0 else (0x30, 0x40)
    scales_a, scales_b = (torch.randint(low, high, (n, blocks), dtype=torch.uint8) for n in (16, 8))
    sa, sb = (values(s, scale.values).repeat_interleave(64 // blocks, 1) for s in (scales_a, scales_b))
    exact = (values(a, E2M1.values) * sa) @ (values(b, E2M1.values) * sb.T) + c
    assert torch.equal(run(program, i, a, b, c, scales_a, scales_b).double(), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_of_a_scale_and_of_an_element(program, kind):
    """Row i of A is one element times a scale byte, B is 1: NaN codes give NaN."""
    i = next(j for j, s in enumerate(SELECTORS) if s[0] == kind)
    _, blocks, scale = KINDS[kind]
    one = 127 if scale == E8M0 else 0x38
    b = torch.zeros(64, 8, dtype=torch.long)
    b[0] = E2M1.values.index(1.0)
    for start in range(0, 256 if scale == E8M0 else 128, 16):
        a = torch.zeros(16, 64, dtype=torch.long)
        a[:, 0] = torch.arange(16)
        bytes = torch.full((16, blocks), one, dtype=torch.uint8)
        bytes[:, 0] = torch.arange(start, start + 16)
        y = run(program, i, a, b, torch.zeros(16, 8), bytes, torch.full((8, blocks), one, dtype=torch.uint8))
        want = (values(a[:, 0], E2M1.values) * values(bytes[:, 0], scale.values)).float()
        assert torch.equal(y.isnan(), want.isnan()[:, None].expand(16, 8)), start
        assert torch.equal(y.nan_to_num(0.0), want.nan_to_num(0.0)[:, None].expand(16, 8)), start


def test_an_unsigned_scale_with_a_sign_is_a_fault(program):
    i = next(j for j, s in enumerate(SELECTORS) if s[0] == "mxf4nvf4")
    codes, c = torch.zeros(16, 64, dtype=torch.long), torch.zeros(16, 8)
    scales = [torch.full((n, 4), 0x38, dtype=torch.uint8) for n in (16, 8)]
    scales[0][5, 2] = 0xB8
    with pytest.raises(FAULTS["Misuse"], match="ue4m3 scale 0xb8"):
        run(program, i, codes, codes.T[:, :8], c, *scales)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("%s0, {0, 0}", "%s0, {1, 0}", r"bytes are 2 from 0 on"),
        ("%s0, {0, 0}", "%s0, {0, 2}", r"threads 0\.\.1"),
        ("%z0, {0, 0}", "%z0, {0, 4}", r"threads 0\.\.3"),
        ("scale_vec::2X", "scale_vec::4X", "scale_vec::4X of ue8m0 is not modelled"),
    ],
)
def test_what_is_not_modelled_is_refused(old, new, why):
    with pytest.raises(Refusal, match=why):
        Program(HEADER + kernel("k", "mxf4", 0, 0, 0, 0).replace(old, new))
