"""cuda.sm120, as PTX of sm_120a on the CPU, through the real Python path.

Never run on hardware: what is shown is that, if block-scaled mma.sync does what the PTX ISA says, the values are right.
"""

import dataclasses
import itertools

import pytest
import torch
from cases import ODD_SHAPES, random_packed, random_x, same_bits
from cuda_on_cpu import OnCpu, all_kernels
from ptx import missing
from test_cuda_float import after_rounding
from test_dynamic import dynamic_packed, wild_x

from llmfp4_kernels import native, reference
from llmfp4_kernels.backends import cuda_sm120
from llmfp4_kernels.backends.cuda_sm120 import NAME
from llmfp4_kernels.errors import NoKernel
from llmfp4_kernels.formats import E1M2, E2M1, E3M0, E4M3, E8M0, INTEGER, RECIPES, Dynamic, element
from llmfp4_kernels.packed import pack, unpack
from llmfp4_kernels.problem import Problem
from llmfp4_kernels.registry import choose, explain

BUILT = ["120a" in a for a in native.module().cuda_architectures] if not native.problem_with_cuda() else [False]
WHY_NOT = missing() or (None if any(BUILT) else "the native module was built without 120a")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
BLACKWELL = {"capability": (12, 0)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
(KERNEL,) = cuda_sm120.KERNELS


@pytest.fixture(scope="module")
def programs():
    return all_kernels("sm_120a")


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("LLMFP4_KERNEL", NAME)


def run(gpu, packed, x, bias=None):
    assert KERNEL.refusal(dataclasses.replace(Problem.of(packed, len(x), x.dtype), device="cuda")) is None
    y = gpu.run(KERNEL.prepare(packed, bias), NAME, x)
    assert y.dtype == x.dtype and gpu.launched[0] == "quantize_sm120_activations"
    return y


def check_bits(gpu, packed, x, bias=None):
    y = run(gpu, packed, x, bias)
    assert same_bits(y, reference.gemm(x, packed, bias).to(x.dtype)), (list(x.shape), packed.shape, x.dtype)


def exact_and_bound(packed, x, bias=None):
    """The float64 product of the rounded operands, and how far fp32 sums may be from it, in any order.

    Products of two elements and two scales have at most 2·2 + 2·4 = 12 significant bits: exact. k sums, the scales of
    token and row, and the bias round once each: (k + 8) · 2^-24 · Σ|x·w|. Then the output's dtype.
    """
    rounded, w = reference.round_activation(x, packed, torch.float64), reference.stored_weight(packed)
    exact = rounded @ w.T + (0 if bias is None else bias.double())
    bound = (packed.k + 8) * 2.0**-24 * (rounded.abs() @ w.abs().T)
    bound += 0 if bias is None else 2.0**-23 * bias.double().abs()
    return exact, after_rounding(exact, bound, x.dtype)


def check(gpu, packed, x, bias=None):
    y, (exact, bound) = run(gpu, packed, x, bias), exact_and_bound(packed, x, bias)
    assert ((y.double() - exact).abs() <= bound).all(), (list(x.shape), packed.shape, x.dtype)


@pytest.mark.parametrize("shift", [False, True], ids=["plain", "shift"])
def test_llm_fp4_has_the_bits_of_the_integer_kernels(shift, programs):
    """Static activations. Sums in units of the integer product stay below 2^24: exact in fp32, in any order."""
    with OnCpu(programs, multiprocessors=8, **BLACKWELL) as gpu:
        for i, (m, n, k) in enumerate(ODD_SHAPES):
            packed = random_packed(n, k, E2M1, E2M1, shift, seed=i)
            check_bits(gpu, packed, random_x(m, k, DTYPES[i % 3]), torch.randn(n) if i % 4 else None)


@pytest.mark.parametrize("dynamic", [Dynamic(), Dynamic(16, INTEGER)], ids=["tokens", "integer groups"])
def test_dynamic_integers_have_the_bits_of_the_integer_kernels(dynamic, programs):
    with OnCpu(programs, multiprocessors=4, **BLACKWELL) as gpu:
        for dtype, (m, n, k) in zip(DTYPES, [(1, 24, 66), (7, 33, 40), (70, 130, 1031)]):
            packed = dynamic_packed(n, k, E2M1, E2M1, dynamic, smooth=m != 7)
            check_bits(gpu, packed, wild_x(m, k, dtype), random_x(1, n, seed=5)[0])


def scaled(n, k, scale, group_size, dynamic, seed=0):
    packed = random_packed(n, k, E2M1, scale=scale, group_size=group_size, seed=seed)
    static = {"x_scale": torch.tensor(0.37)} if dynamic is None else {"dynamic": dynamic}
    return dataclasses.replace(packed, activation=E2M1, **static)


@pytest.mark.parametrize(
    ("scale", "group_size", "dynamic"),
    [
        (E8M0, 32, Dynamic(32, E8M0)),
        (E4M3, 16, Dynamic(16, E4M3)),
        (E8M0, 64, Dynamic()),
        (E4M3, 128, Dynamic(16, INTEGER)),
        (E4M3, 16, None),
        (None, 0, Dynamic(32, E8M0)),
        (None, 0, Dynamic(16, E4M3)),
    ],
    ids=["mxfp4", "nvfp4", "e8m0 x tokens", "e4m3 x integers", "e4m3 x static", "rows x e8m0", "rows x e4m3"],
)
def test_block_scales(scale, group_size, dynamic, programs):
    with OnCpu(programs, multiprocessors=8, **BLACKWELL) as gpu:
        for i, (m, n, k) in enumerate([(1, 1, 1), (3, 17, 65), (9, 70, 515), (66, 130, 200), (2, 20, 1700)]):
            packed = scaled(n, k, scale, group_size, dynamic, seed=i)
            x = wild_x(m, k, DTYPES[i % 2]) if m > 1 else random_x(m, k)
            check(gpu, packed, x, torch.randn(n) if i % 2 else None)


def test_e4m3_scales_of_weights_may_be_negative(programs):
    """The hardware's are not: the codes of such a group change their sign."""
    packed = scaled(20, 100, E4M3, 16, Dynamic(16, E4M3))
    packed.group_scale[:, ::2] |= 128
    with OnCpu(programs, **BLACKWELL) as gpu:
        check(gpu, packed, random_x(3, 100))


def test_extremes_of_e8m0(programs):
    """Tokens of zeros, of fp32's subnormals and near its largest; weights with scales 2^-127 to 2^127."""
    packed = scaled(16, 64, E8M0, 32, Dynamic(32, E8M0))
    packed.group_scale[0, 0], packed.group_scale[1, 0], packed.group_scale[1, 1] = 0, 254, 0
    packed.row_scale[1] = 2.0**-120
    x = random_x(4, 64)
    x[0], x[1], x[2] = 0, x[1] * 2.0**-130, x[2] * 2.0**100
    with OnCpu(programs, **BLACKWELL) as gpu:
        check(gpu, packed, x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_poisons_its_row_only(bad, programs):
    x = random_x(5, 70)
    x[3, 69] = bad
    kinds = [random_packed(20, 70, E2M1, E2M1, True), scaled(20, 70, E8M0, 32, Dynamic(32, E8M0))]
    with OnCpu(programs, **BLACKWELL) as gpu:
        for packed in [*kinds, scaled(20, 70, E4M3, 16, Dynamic(16, E4M3))]:
            y = run(gpu, packed, x)
            assert not y[3].isfinite().any() and y[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("seed", range(1, 4))
def test_any_schedule_of_threads_and_more_steps_than_stages(seed, programs):
    """Several tiles of rows and outputs; with many multiprocessors blocks share a sum over k."""
    packed = random_packed(150, 1100, E2M1, E2M1, True)
    with OnCpu(programs, (1, 16, 48)[seed - 1], seed, **BLACKWELL) as gpu:
        check_bits(gpu, packed, random_x((3, 70, 5)[seed - 1], 1100, DTYPES[seed - 1]), torch.randn(150))


def test_no_rows():
    with OnCpu([], **BLACKWELL) as gpu:
        y = KERNEL.prepare(random_packed(20, 70, E2M1, E2M1, True), None).run(KERNEL, torch.empty(2, 0, 70))
    assert list(y.shape) == [2, 0, 20] and gpu.launched == []


@pytest.mark.parametrize("k", [1, 32, 100, 515])
def test_sorted_channels(k):
    """Every input has one place, in a block of its shift."""
    shift = torch.randint(0, 4, (k,), dtype=torch.uint8)
    channel, of_block = cuda_sm120.sorted_channels(shift)
    places = (channel >= 0).nonzero()[:, 0]
    assert sorted(channel[places].tolist()) == list(range(k)) and len(channel) % 128 == 0
    assert torch.equal(of_block[places // 32], shift[channel[places].long()])
    assert len(channel) <= k + 3 * 31 + 31 + 127


def test_codes_lie_as_lanes_hold_them():
    """Against the fragments of m16n8k64: word h + 2·q of lane 4·g + t is row g + 8·h, inputs 32·q + 8·t .. ."""
    packed = random_packed(20, 200, E2M1)
    lanes = cuda_sm120.lane_codes(packed, None, None).view(2, 2, 2, 32, 4, 4)  # strip, step, half, lane, word, byte
    codes = torch.nn.functional.pad(unpack(packed.codes, 200), (0, 56, 0, 12))
    for strip, step, half, g, t, h, q in itertools.product(
        range(2), range(2), range(2), range(8), range(4), range(2), range(2)
    ):
        first = 128 * step + 64 * half + 32 * q + 8 * t
        eight = codes[16 * strip + g + 8 * h, first : first + 8]
        assert torch.equal(lanes[strip, step, half, 4 * g + t, h + 2 * q], pack(eight))


def test_recipes_it_takes(monkeypatch):
    monkeypatch.setattr(cuda_sm120.cuda.machine, "capability", lambda index=None: (12, 0), raising=False)
    taken = {
        name
        for name, recipe in RECIPES.items()
        if KERNEL.refusal(Problem.of_recipe(recipe, 64, 64, 64, device="cuda")) is None
    }
    assert taken == {"llm-fp4", "llm-fp4-baseline", "gptq-fp4-a4", "minmax-w4a4", "mxfp4-a4", "nvfp4-a4"}


def test_refusals_and_order(monkeypatch):
    problem = Problem(64, 64, 64, E2M1, E2M1, device="cuda")
    capability = {"value": (12, 0)}
    monkeypatch.setattr(cuda_sm120.cuda.machine, "capability", lambda index=None: capability["value"], raising=False)
    assert choose(problem) == KERNEL
    monkeypatch.delenv("LLMFP4_KERNEL")
    assert choose(problem).name == "cuda.sm80"
    assert "has never run on hardware" in dict(explain(problem))[NAME]
    monkeypatch.setenv("LLMFP4_KERNEL", NAME)
    for other, why in (
        ({"element": E1M2}, "these are e1m2 weights and e2m1 activations"),
        ({"activation": E3M0}, "e3m0 activations"),
        ({"activation": None}, "torch.float32 activations"),
        ({"activation": element("e4m3"), "dynamic": Dynamic(32, E8M0)}, "e4m3 activations"),
        ({"scale": E8M0, "group_size": 32, "dynamic": Dynamic(16, E4M3)}, "weights need e8m0, e4m3 groups"),
        ({"scale": E4M3, "group_size": 16, "shift": True}, "the shift of inputs need e8m0"),
        ({"scale": E8M0, "group_size": 32, "shift": True}, "sorted by shift"),
        ({"scale": E8M0, "group_size": 16}, "groups of 16 weights are no multiple of 32"),
        ({"dynamic": Dynamic(32, INTEGER)}, "groups of 32 activations are not 16"),
        ({"n": 2**23 + 1}, "which a grid holds"),
        ({"dtype": torch.float64}, "expected one of"),
    ):
        with pytest.raises(NoKernel, match=f"refuses .*{why}"):
            choose(dataclasses.replace(problem, **other))
    for other in ((9, 0), (10, 0), (12, 1)):
        capability["value"] = other
        assert f"this GPU is sm_{other[0]}{other[1]}" in KERNEL.refusal(problem)
    capability["value"] = (12, 0)

    class Module:
        cuda_architectures = ("80-real", "90")

    monkeypatch.setattr(native, "problem_with_cuda", lambda: None)
    monkeypatch.setattr(cuda_sm120.native, "module", Module)
    assert KERNEL.refusal(problem).endswith("was built for 80-real, 90, without 120a-real")
