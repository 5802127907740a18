"""Planted bugs in the Triton kernels: each is caught, by name, on the PTX machine through the real Python path."""

import dataclasses

import pytest
import torch
from cases import random_packed, random_x, same_bits
from mutants import RIGHT, WRONG, assert_caught
from test_dynamic import dynamic_packed, wild_x
from test_triton_fp8 import ADA, cancelling, small_integers
from triton_mutants import CANCELLING, FP8, GROUPED, GROUPS, INTEGER, MUTANTS, PARTS, PLANES, SHARED_K, mutant
from triton_on_cpu import SMALL, WHY_NOT, OnCpu

from llmfp4_kernels import formats, reference
from llmfp4_kernels.formats import E2M1, E3M0, E4M3, Dynamic

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
WIDE = dataclasses.replace(SMALL, block_k=128)  # a step that does not divide padded k
PROBLEMS = list(dict.fromkeys(name for name, *_ in MUTANTS))
KERNELS = ("product", "add_splits", "quantize", "split", "lookup")


def problem(name):
    """(packed, x, multiprocessors)"""
    return {
        INTEGER: lambda: (random_packed(75, 190, E2M1, E2M1, True), random_x(5, 190), 1),
        PLANES: lambda: (random_packed(75, 190, E2M1, E3M0, True), random_x(5, 190), 1),
        SHARED_K: lambda: (random_packed(75, 1150, E2M1, E2M1), random_x(5, 1150), 64),
        GROUPED: lambda: (random_packed(75, 600, E2M1, scale=E4M3, group_size=256), random_x(5, 600), 1),
        PARTS: lambda: (random_packed(75, 190, E2M1), random_x(5, 190), 1),
        GROUPS: lambda: (dynamic_packed(75, 190, E2M1, E2M1, Dynamic(16, formats.INTEGER)), wild_x(5, 190), 1),
        FP8: lambda: (*small_integers(16, 192), 1),
        CANCELLING: lambda: (*cancelling(), 1),
    }[name]()


def waiting(name, instead, monkeypatch):
    """The machine with the launches of a problem, and what it says of y; kernels in `instead` take others' places."""
    from llmfp4_kernels.backends.triton import prepared

    packed, x, multiprocessors = problem(name)
    expected, found = reference.gemm(x, packed), []
    for kernel, other in instead.items():
        monkeypatch.setattr(prepared, kernel, other)

    def judge(y):
        close = torch.allclose(y, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        found.append(RIGHT if (same_bits(y, expected) if packed.integer else close) else WRONG)

    capability = ADA if name in (FP8, CANCELLING) else (8, 0)
    with OnCpu(capability, multiprocessors=multiprocessors, config=WIDE, limit_s=20) as gpu:
        gpu.later(prepared.Prepared(packed, None), "triton.gemm", x, judge)
        rest, gpu.waiting, judges, gpu.judges = gpu.waiting, [], gpu.judges, []
    monkeypatch.undo()
    gpu.waiting, gpu.judges = rest, judges
    return gpu, found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of every mutant, and of every problem without a bug: compiled side by side."""
    folder, patch, all = tmp_path_factory.mktemp("mutants"), pytest.MonkeyPatch(), {}
    for name in PROBLEMS:
        all[name] = waiting(name, {}, patch)
    for i, (name, *_) in enumerate(MUTANTS):
        module = mutant(i, folder)
        own = {kernel: getattr(module, kernel) for kernel in KERNELS if defines(module, kernel)}
        all[i] = waiting(name, own, patch)
    return all


def defines(module, kernel):
    """Whether a module defines a kernel, rather than imports it."""
    return getattr(getattr(module, kernel, None), "__module__", None) == module.__name__


def outcome(run):
    gpu, found = run
    try:
        gpu.flush()
    except AssertionError:
        return "unwritten"
    return found[0]


@pytest.mark.parametrize("name", PROBLEMS)
def test_without_a_bug_the_values_are_right(name, runs):
    assert outcome(runs[name]) == RIGHT


@pytest.mark.parametrize("i", range(len(MUTANTS)), ids=[f"{m[1]}: {m[2]}" for m in MUTANTS])
def test_planted_bug_is_caught_by_name(i, runs):
    assert_caught(lambda: outcome(runs[i]), MUTANTS[i][-1])
