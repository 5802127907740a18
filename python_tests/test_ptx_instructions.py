"""Each instruction of the PTX machine against numpy and torch, on random words. ptxas takes the same text."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from ptx import FAULTS, In, Out, Program, Refusal, build, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")
N = 256
rng = np.random.default_rng(5)
WORDS = [rng.integers(0, 2**64, N, dtype=np.uint64) for _ in range(3)]
U32 = [(w >> np.uint64(32)).astype(np.uint32) for w in WORDS]
SHIFTS = (U32[1] % 40).astype(np.uint32)
F32 = [rng.standard_normal(N).astype(np.float32).astype(np.float16).astype(np.float32) for _ in range(3)]
F32[0][:4] = [np.nan, np.inf, -0.0, 3e9]
with np.errstate(over="ignore"):
    F16 = [f.astype(np.float16) for f in F32]


def bf16(f):
    return torch.from_numpy(f).bfloat16()


def bits(t):
    return t.view(torch.int16).numpy().view(np.uint16)


def big(x):
    """Two's complement as Python integers."""
    return x.astype(object)


def s(x):
    return x.view(np.int32)


def bfe(a, p, n, signed):
    out = []
    for x, pos, length in zip(a.tolist(), (p & 255).tolist(), (n & 255).tolist()):
        whole = x - 2**32 if signed and x >> 31 else x
        field = whole >> pos
        if length < 32 and pos + length <= 32:
            field &= 2**length - 1
            field -= 2**length if signed and length and field >> (length - 1) else 0
        out.append((field if length else 0) % 2**32)
    return np.array(out, np.uint32)


def prmt(a, b, c):
    out = np.zeros(N, np.uint32)
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    for i in range(4):
        sel = (c >> np.uint32(4 * i)) & 15
        byte = (both >> (8 * (sel & 7)).astype(np.uint64)).astype(np.uint32) & 255
        byte = np.where(sel & 8, np.where(byte & 128, 255, 0), byte)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def f8(high, low, dtype):
    top = torch.finfo(dtype).max
    pack = [
        torch.from_numpy(np.clip(v, -top, top)).to(dtype).view(torch.uint8).numpy().astype(np.uint16)
        for v in (high, low)
    ]
    return pack[0] << 8 | pack[1]


U0, U1, U2 = U32
A8, B8 = (u.view(np.int8).reshape(N, 4).astype(np.int64) for u in (U0, U1))
FIN = [np.nan_to_num(f, nan=1.5, posinf=2.5) for f in F32]
LENGTHS = (U2 % 36).astype(np.uint32)
POSITIONS = (U1 % 32).astype(np.uint32)
E4M3_BYTES = (U0 & 0xBEBE).astype(np.uint16)  # no NaN
E4M3 = (
    torch.from_numpy(E4M3_BYTES.view(np.uint8).copy())
    .view(torch.float8_e4m3fn)
    .half()
    .view(torch.int16)
    .numpy()
    .view(np.uint32)
)
CASES = [  # text, inputs, result
    ("add.s32 {d}, {a}, {b}", (U0, U1), lambda: U0 + U1),
    ("sub.s64 {d}, {a}, {b}", WORDS[:2], lambda: WORDS[0] - WORDS[1]),
    ("mul.lo.s32 {d}, {a}, {b}", (U0, U1), lambda: U0 * U1),
    ("mul.hi.s32 {d}, {a}, {b}", (U0, U1), lambda: (s(U0).astype(np.int64) * s(U1) >> 32).astype(np.uint32)),
    ("mul.hi.u32 {d}, {a}, {b}", (U0, U1), lambda: (U0.astype(np.uint64) * U1 >> np.uint64(32)).astype(np.uint32)),
    ("mul.wide.s32 {d}, {a}, {b}", (U0, U1), lambda: (s(U0).astype(np.int64) * s(U1)).view(np.uint64)),
    ("mad.lo.u32 {d}, {a}, {b}, {c}", U32, lambda: U0 * U1 + U2),
    ("mad.wide.u32 {d}, {a}, {b}, {c}", (U0, U1, WORDS[2]), lambda: U0.astype(np.uint64) * U1 + WORDS[2]),
    ("min.s32 {d}, {a}, {b}", (U0, U1), lambda: np.minimum(s(U0), s(U1)).view(np.uint32)),
    ("max.u32 {d}, {a}, {b}", (U0, U1), lambda: np.maximum(U0, U1)),
    ("div.u32 {d}, {a}, {b}", (U0, U1 | 1), lambda: U0 // (U1 | 1)),
    ("rem.s32 {d}, {a}, {b}", (U0, U1 | 1), lambda: np.fmod(s(U0), s(U1 | 1)).view(np.uint32)),
    ("abs.s32 {d}, {a}", (U0,), lambda: np.abs(s(U0)).view(np.uint32)),
    (
        "shl.b32 {d}, {a}, {b}",
        (U0, SHIFTS),
        lambda: (U0.astype(np.uint64) << SHIFTS.astype(np.uint64)).astype(np.uint32),
    ),
    (
        "shr.u32 {d}, {a}, {b}",
        (U0, SHIFTS),
        lambda: (U0.astype(np.uint64) >> SHIFTS.astype(np.uint64)).astype(np.uint32),
    ),
    (
        "shr.s32 {d}, {a}, {b}",
        (U0, SHIFTS),
        lambda: (s(U0).astype(np.int64) >> SHIFTS.astype(np.int64)).astype(np.uint32),
    ),
    (
        "shf.l.wrap.b32 {d}, {a}, {b}, {c}",
        U32,
        lambda: ((WORD(U0, U1) << (U2 & 31).astype(np.uint64)) >> np.uint64(32)).astype(np.uint32),
    ),
    ("shf.r.wrap.b32 {d}, {a}, {b}, {c}", U32, lambda: (WORD(U0, U1) >> (U2 & 31).astype(np.uint64)).astype(np.uint32)),
    ("prmt.b32 {d}, {a}, {b}, {c}", U32, lambda: prmt(*U32)),
    ("lop3.b32 {d}, {a}, {b}, {c}, 0xEA", U32, lambda: (U0 & U1) | U2),
    ("lop3.b32 {d}, {a}, {b}, {c}, 0x96", U32, lambda: U0 ^ U1 ^ U2),
    ("bfe.u32 {d}, {a}, {b}, {c}", (U0, POSITIONS, LENGTHS), lambda: bfe(U0, POSITIONS, LENGTHS, False)),
    ("bfe.s32 {d}, {a}, {b}, {c}", (U0, POSITIONS, LENGTHS), lambda: bfe(U0, POSITIONS, LENGTHS, True)),
    ("bfi.b32 {d}, {a}, {b}, 5, 9", (U0, U1), lambda: (U1 & ~np.uint32(511 << 5)) | ((U0 & 511) << 5)),
    ("popc.b32 {d}, {a}", (U0,), lambda: np.array([x.bit_count() for x in U0.tolist()], np.uint32)),
    ("clz.b32 {d}, {a}", (U0,), lambda: np.array([32 - x.bit_length() for x in U0.tolist()], np.uint32)),
    ("brev.b32 {d}, {a}", (U0,), lambda: np.array([int(f"{x:032b}"[::-1], 2) for x in U0.tolist()], np.uint32)),
    ("dp4a.s32.s32 {d}, {a}, {b}, {c}", U32, lambda: ((A8 * B8).sum(1) + U2).astype(np.uint32)),
    ("add.f32 {d}, {a}, {b}", F32[:2], lambda: F32[0] + F32[1]),
    ("mul.rn.f32 {d}, {a}, {b}", F32[:2], lambda: F32[0] * F32[1]),
    ("fma.rn.f32 {d}, {a}, {b}, {c}", F32, lambda: (F32[0].astype(float) * F32[1] + F32[2]).astype(np.float32)),
    ("min.f32 {d}, {a}, {b}", F32[:2], lambda: np.fmin(F32[0], F32[1])),
    ("div.rn.f32 {d}, {a}, {b}", F32[:2], lambda: F32[0] / F32[1]),
    ("neg.f32 {d}, {a}", F32[1:2], lambda: -F32[1]),
    ("add.f16 {d}, {a}, {b}", F16[:2], lambda: F16[0] + F16[1]),
    ("fma.rn.f16 {d}, {a}, {b}, {c}", F16, lambda: (F16[0].astype(float) * F16[1] + F16[2]).astype(np.float16)),
    ("mul.f16x2 {d}, {a}, {b}", (U0 & 0x3FFF3FFF, U1 & 0x3FFF3FFF), lambda: HALVES(np.multiply)),
    (
        "fma.rn.bf16 {d}, {a}, {b}, {c}",
        [bits(bf16(f)) for f in FIN],
        lambda: bits((bf16(FIN[0]).double() * bf16(FIN[1]).double() + bf16(FIN[2]).double()).bfloat16()),
    ),
    ("cvt.rn.f16.f32 {d}, {a}", F32[:1], lambda: F32[0].astype(np.float16)),
    ("cvt.f32.f16 {d}, {a}", F16[:1], lambda: F16[0].astype(np.float32)),
    (
        "cvt.rn.bf16x2.f32 {d}, {a}, {b}",
        F32[1:],
        lambda: bits(bf16(F32[1])).astype(np.uint32) << 16 | bits(bf16(F32[2])),
    ),
    (
        "cvt.rni.s32.f32 {d}, {a}",
        [FIN[0] * 1e9],
        lambda: np.clip(np.rint((FIN[0] * 1e9).astype(float)), -(2**31), 2**31 - 1).astype(np.int32).view(np.uint32),
    ),
    ("cvt.rzi.s32.f32 {d}, {a}", [FIN[1] * 9], lambda: np.trunc(FIN[1] * 9).astype(np.int32).view(np.uint32)),
    ("cvt.rn.f32.s32 {d}, {a}", (U0,), lambda: s(U0).astype(np.float32)),
    ("cvt.sat.s8.s32 {d}, {a}", (U0 >> 23,), lambda: np.minimum(U0 >> 23, 127)),
    ("cvt.s32.s8 {d}, {a}", (U0,), lambda: U0.astype(np.int8).astype(np.int32).view(np.uint32)),
    (
        "cvt.rn.satfinite.e4m3x2.f32 {d}, {a}, {b}",
        (FIN[1] * 300, FIN[2]),
        lambda: f8(FIN[1] * 300, FIN[2], torch.float8_e4m3fn),
    ),
    (
        "cvt.rn.satfinite.e5m2x2.f32 {d}, {a}, {b}",
        (FIN[1] * 300, FIN[2]),
        lambda: f8(FIN[1] * 300, FIN[2], torch.float8_e5m2),
    ),
    ("cvt.rn.f16x2.e4m3x2 {d}, {a}", (E4M3_BYTES,), lambda: E4M3),
    (
        "{{ .reg .pred q; setp.ltu.f32 q, {a}, {b}; selp.b32 {d}, 1, 2, q; }}",
        (F32[0], F32[1], U0),
        lambda: np.where(~(F32[0] >= F32[1]), 1, 2).astype(np.uint32),
    ),
    ("shfl.sync.bfly.b32 {d}, {a}, 5, 31, -1", (U0,), lambda: U0[np.arange(N) ^ 5]),
    ("shfl.sync.down.b32 {d}, {a}, 3, 0x1807, -1", (U0,), lambda: U0[[i + 3 if i % 8 < 5 else i for i in range(N)]]),
    ("shfl.sync.up.b32 {d}, {a}, 2, 0, -1", (U0,), lambda: U0[[i - 2 if i % 32 > 1 else i for i in range(N)]]),
    ("shfl.sync.idx.b32 {d}, {a}, 9, 31, -1", (U0,), lambda: U0[np.arange(N) // 32 * 32 + 9]),
    ("redux.sync.max.s32 {d}, {a}, -1", (U0,), lambda: np.repeat(s(U0).reshape(-1, 32).max(1), 32).view(np.uint32)),
    (
        "{{ .reg .pred q; setp.gt.s32 q, {a}, 0; vote.sync.ballot.b32 {d}, q, -1; }}",
        (U0,),
        lambda: np.repeat(np.packbits(s(U0) > 0, bitorder="little").view(np.uint32), 32),
    ),
]


def WORD(lo, hi):
    return lo.astype(np.uint64) | hi.astype(np.uint64) << np.uint64(32)


def HALVES(f):
    return f((U0 & 0x3FFF3FFF).view(np.float16), (U1 & 0x3FFF3FFF).view(np.float16)).view(np.uint32)


def quiet(f):
    with np.errstate(all="ignore"):
        return f()


def kernel(i, text, inputs, result):
    """Thread t applies the instruction to element t of each input."""
    names = {"d": result, **dict(zip("abc", inputs))}
    lines, kinds = [], {2: "%h", 4: "%r", 8: "%l"}
    params = ", ".join(f".param .u64 p{x}" for x in names)
    registers = {x: f"{kinds[v.dtype.itemsize]}{'dabc'.index(x)}" for x, v in names.items()}
    for x, v in names.items():
        lines.append(f"ld.param.u64 %q{x}, [p{x}]; mad.wide.u32 %q{x}, %t, {v.dtype.itemsize}, %q{x};")
        if x != "d":
            lines.append(f"ld.global.b{8 * v.dtype.itemsize} {registers[x]}, [%q{x}];")
    lines.append(text.format(**registers) + ("" if text.endswith("}}") else ";"))
    lines.append(f"st.global.b{8 * result.dtype.itemsize} [%qd], {registers['d']}; ret;")
    declared = ".reg .b16 %h<4>; .reg .b32 %r<4>; .reg .b64 %l<4>; .reg .b64 %qd, %qa, %qb, %qc; .reg .b32 %t;"
    return f".visible .entry op_{i}({params}) {{\n{declared}\nmov.u32 %t, %tid.x;\n" + "\n".join(lines) + "\n}\n"


HEADER = ".version 8.1\n.target sm_89\n.address_size 64\n"


@pytest.fixture(scope="module")
def scalar():
    return Program(
        HEADER + "".join(kernel(i, text, inputs, quiet(result)) for i, (text, inputs, result) in enumerate(CASES))
    )


def test_ptxas_accepts_the_same_text(scalar, tmp_path):
    (tmp_path / "ops.ptx").write_text(scalar.ptx)
    command = [
        str(Path(build.nvcc()).resolve().parent / "ptxas"),
        "-arch=sm_89",
        str(tmp_path / "ops.ptx"),
        "-o",
        str(tmp_path / "ops.cubin"),
    ]
    if not Path(command[0]).exists():
        pytest.skip("no ptxas beside nvcc")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("i", range(len(CASES)), ids=[text.replace("{", "").replace("}", "") for text, _, _ in CASES])
def test_scalar_and_warp_instructions(scalar, i):
    want = quiet(CASES[i][2])
    inputs = [np.ascontiguousarray(x) for x in CASES[i][1]]
    signed = {2: np.int16, 4: np.int32, 8: np.int64}
    got = torch.empty(want.nbytes, dtype=torch.uint8)
    scalar.run(f"op_{i}", 1, N, [Out(got), *(In(torch.from_numpy(x.view(signed[x.itemsize]))) for x in inputs)])
    got = got.numpy().view(want.dtype)
    if want.dtype.kind == "f":
        np.testing.assert_array_equal(got, want)
    else:
        assert np.array_equal(got, want), np.flatnonzero(got != want)[:5]


# types of a and b, type of d, k
FORMS = [
    ("s8", "s32", 32),
    ("u8", "s32", 32),
    ("s8", "s32", 16),
    ("s4", "s32", 64),
    ("f16", "f32", 16),
    ("f16", "f16", 16),
    ("bf16", "f32", 16),
    ("tf32", "f32", 8),
    ("e4m3", "f32", 32),
]
WIDTH = {"s8": 8, "u8": 8, "s4": 4, "f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8}


def mma_kernel(i, form):
    t, d, k = form
    na, nb, nd = 16 * k * WIDTH[t] // 1024, 8 * k * WIDTH[t] // 1024, 2 if d == "f16" else 4
    sets = {x: "{" + ", ".join(f"%{x}{j}" for j in range(n)) + "}" for x, n in (("a", na), ("b", nb), ("d", nd))}
    lines = [f"mad.wide.u32 %p{x}, %t, {4 * n}, %p{x};" for x, n in (("a", na), ("b", nb), ("d", nd))]
    loads = [f"ld.global.b32 %{x}{j}, [%p{x}+{4 * j}];" for x, n in (("a", na), ("b", nb)) for j in range(n)]
    zero = [f"mov.b32 %d{j}, 0;" for j in range(nd)]
    stores = [f"st.global.b32 [%pd+{4 * j}], %d{j};" for j in range(nd)]
    op = f"mma.sync.aligned.m16n8k{k}.row.col.{d}.{t}.{t}.{d} {sets['d']}, {sets['a']}, {sets['b']}, {sets['d']};"
    params = [f"ld.param.u64 %p{x}, [p{x}];" for x in "dab"]
    head = f".visible .entry mma_{i}(.param .u64 pd, .param .u64 pa, .param .u64 pb) {{\n"
    head += ".reg .b32 %a<4>, %b<4>, %d<4>, %t; .reg .b64 %pa, %pb, %pd;\n"
    return head + "\n".join(["mov.u32 %t, %tid.x;", *params, *lines, *loads, *zero, op, *stores, "ret;"]) + "\n}\n"


def encoded(x, t):
    """Rows of numbers as rows of 32-bit words."""
    if t == "s4":
        nibbles = x.to(torch.int64) & 15
        raw = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
    else:
        types = {
            "s8": torch.int8,
            "u8": torch.uint8,
            "f16": torch.half,
            "bf16": torch.bfloat16,
            "tf32": torch.float,
            "e4m3": torch.float8_e4m3fn,
        }
        raw = x.to(types[t]).view(torch.uint8)
    return raw.contiguous().view(torch.int32)


@pytest.fixture(scope="module")
def products():
    return Program(HEADER + "".join(mma_kernel(i, f) for i, f in enumerate(FORMS)))


@pytest.mark.parametrize("i", range(len(FORMS)), ids=["-".join(map(str, f)) for f in FORMS])
def test_mma(products, i):
    t, d, k = FORMS[i]
    low, high = {"s8": (-128, 128), "u8": (0, 256)}.get(t, (-8, 8))
    a, b = (torch.randint(low, high, (r, k)).float() for r in (16, 8))
    lane = torch.arange(32)
    g, q = lane // 4, lane % 4
    wa, wb = encoded(a, t), encoded(b, t)
    half = 8 if wa.shape[1] == 8 else wa.shape[1]
    fa = torch.stack([wa[g + 8 * r, q + 4 * h] for h in range(half // 4) for r in range(2)], 1).contiguous()
    fb = torch.stack([wb[g, q + 4 * h] for h in range(half // 4)], 1).contiguous()
    out = torch.empty(32, 4, dtype={"s32": torch.int32, "f32": torch.float32, "f16": torch.half}[d])
    products.run(f"mma_{i}", 1, 32, [Out(out), In(fa), In(fb)])
    rows, columns = torch.stack([g, g, g + 8, g + 8], 1), torch.stack([2 * q, 2 * q + 1] * 2, 1)
    assert torch.equal(out.double(), (a.double() @ b.double().T)[rows, columns])


REGISTERS = ".reg .b64 %q; .reg .b32 %r<9>;"


def one(body, params=".param .u64 out", declared=""):
    return Program(
        f"{HEADER}.visible .entry k({params}) {{\n{REGISTERS}\n{declared}\nld.param.u64 %q, [out];\n{body}\nret;\n}}"
    )


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(trans):
    body = f"""mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 4; mov.u32 %r2, tile; add.s32 %r2, %r2, %r1;
        shl.b32 %r3, %r0, 3; mul.lo.s32 %r3, %r3, 65537; add.s32 %r3, %r3, 65536;
        st.shared.b32 [%r2], %r3; add.s32 %r3, %r3, 131074; st.shared.b32 [%r2+4], %r3; add.s32 %r3, %r3, 131074;
        st.shared.b32 [%r2+8], %r3; add.s32 %r3, %r3, 131074; st.shared.b32 [%r2+12], %r3; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r4, %r5, %r6, %r7}}, [%r2];
        mad.wide.u32 %q, %r0, 16, %q; st.global.v4.b32 [%q], {{%r4, %r5, %r6, %r7}};"""
    out = torch.empty(32, 4, 2, dtype=torch.int16)
    one(body, declared=".shared .align 16 .b8 tile[512];").run("k", 1, 32, [Out(out)])
    tiles = torch.arange(256).view(4, 8, 8).transpose(1, 2 if trans else 1)
    assert torch.equal(out.long(), tiles.reshape(4, 32, 2).transpose(0, 1))


@pytest.mark.parametrize(
    "text",
    [
        "tex.1d.v4.f32.s32 {%r0, %r1, %r2, %r3}, [%q, {%r4}];",
        "add.rz.f32 %r0, %r1, %r2;",
        "cvt.rz.f16.f32 %r0, %r1;",
        "add.cc.u32 %r0, %r1, %r2;",
        "frobnicate.b32 %r0, %r1;",
    ],
)
def test_unknown_instruction_is_refused_by_name_and_line(text):
    with pytest.raises(Refusal, match=rf"kernel k, PTX line 8: .*{text.split()[0]}.*not modelled"):
        one(text)


def test_faults_name_addresses():
    program = one("mov.u32 %r0, %tid.x; mad.wide.u32 %q, %r0, 4, %q; st.global.b32 [%q], %r0;")
    with pytest.raises(
        FAULTS["OutOfBounds"],
        match=r"thread \(7,0,0\), PTX line 8 .*at byte 28 of argument 0, which has 28",
    ):
        program.run("k", 1, 8, [Out(torch.empty(7, dtype=torch.int32))])
    with pytest.raises(FAULTS["BadLaunch"], match="no kernel other"):
        program.run("other", 1, 8, [])
