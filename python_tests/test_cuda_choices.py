"""Measured rows, tiles and splits of the CUDA kernels: what a table serves, and what it leads to."""

import dataclasses
import json

import pytest
import torch
from cases import random_packed, random_x, same_bits
from cuda_on_cpu import OnCpu, all_kernels
from ptx import missing

from llmfp4_kernels import native, reference, registry
from llmfp4_kernels.backends import cuda, cuda_choices, measured
from llmfp4_kernels.backends.cuda_choices import Form, Row, Tile, division
from llmfp4_kernels.formats import E2M1, E3M0, E4M3, E8M0, element
from llmfp4_kernels.problem import Problem

NO_CUDA = native.problem_with_cuda()
pytestmark = pytest.mark.skipif(NO_CUDA is not None, reason=NO_CUDA or "")
needs_ptx = pytest.mark.skipif(missing() is not None, reason=missing() or "")
FORM = Form("int8", 1, "none", 0, 150, 2100)
HERE = torch.device("cpu")
HOPPER = dict(multiprocessors=132, capability=(9, 0))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv(measured.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "SHIPPED", tmp_path / "package")
    measured.forget()
    yield tmp_path / "cache"
    measured.forget()


def row(kernel="cuda.sm80", tile=1, size="128x64", splits=2, form=FORM, m=16, seconds=2e-5):
    config = Tile(kernel, tile, size, splits)
    return Row(form, m, config, seconds, 3e-5, 5, 6, "gpu_choices.jsonl", "0" * 10, "2000-01-01")


def put(*rows, folder=None):
    return cuda_choices.put(list(rows), cuda.machine, HERE, folder or measured.cache_folder())


def test_divisions_are_those_of_the_launch():
    """What is counted, and what may be forced: csrc/cuda/linear.h's choose_tile and choose_splits."""
    gemv = division("cuda.gemv", FORM, 4, 132)
    assert (gemv.tile, gemv.tiles, gemv.tile_size, gemv.splits, gemv.most_splits) == (1, (0, 5), "32x8", 2, 33)
    assert [division("cuda.gemv", FORM, 9, 132, tile).tile_size for tile in (3, 4, 5)] == ["16x16", "32x16", "64x16"]
    sm80 = division("cuda.sm80", FORM, 100, 132, 0, 9)
    assert (sm80.tile, sm80.tiles, sm80.tile_size, sm80.splits, sm80.most_splits) == (0, (0, 2), "64x32", 9, 33)
    for grouped, last in ((FORM, 3), (dataclasses.replace(FORM, operand="e4m3"), 2)):
        assert division("cuda.sm90", grouped, 300, 132).tiles == (0, last)
    for kernel, m, tile, splits, sentence in (
        ("cuda.gemv", 9, 2, 0, "tile 2 is none of 3 to 5, which 9 rows of such operands have"),
        ("cuda.gemv", 17, -1, 0, "gemv takes up to 16 rows, not 17"),
        ("cuda.sm80", 1, 3, 0, "tile 3 is none of 0 to 2"),
        ("cuda.sm80", 1, -2, 0, "tile -2 is none of"),
        ("cuda.sm80", 1, 0, 34, "splits = 34 are not 1 to 33: the sum has 33 units of k, and 132 multiprocessors 3"),
        ("cuda.sm80", 4096, 0, 3, "splits = 3 are not 1 to 2: .* 132 multiprocessors 384 tiles"),
        ("cuda.sm80", 1, 0, -1, "splits = -1 are not 1 to"),
        ("cuda.sm90", 0, -1, 0, "^0 rows of operands by"),
        ("cuda.sm80", 2**30 + 1, -1, 0, "1073741825 rows of operands by 150 outputs on 132 .* more than 2.30 rows"),
    ):
        with pytest.raises(ValueError, match=sentence):
            division(kernel, FORM, m, 132, tile, splits)


def test_products_beyond_what_is_counted_are_refused():
    """Rows of operands, not tokens: fp32 has four of each."""
    problem = Problem(2**28 + 1, 64, 64, E2M1, device="cuda")
    with OnCpu([], **HOPPER):
        for name in ("sm80", "sm90"):
            assert "1073741828 rows of operands by 64 outputs" in cuda.refusal(name, problem)
            assert cuda.refusal(name, dataclasses.replace(problem, m=2**28)) is None
            assert "2^40 sums" in cuda.refusal(name, dataclasses.replace(problem, m=2**27, n=4096))
        prepared = cuda.Prepared(random_packed(16, 64, E2M1), None)
        for m in (2**28 + 1, 2**29, 2**31 - 1):
            with pytest.raises(ValueError, match="rows of operands by 16 outputs"):
                prepared.plan("sm90", m, torch.float32, 132)


def test_a_form_is_that_of_the_launch():
    """Rows and kind of operands that Python counts are those of the C++ plan."""
    e4m3 = element("e4m3")
    for activation, shift, scale, dtype, operand, planes in (
        (E2M1, True, None, torch.bfloat16, "int8", 1),
        (E3M0, True, None, torch.bfloat16, "int8", 2),
        (e4m3, False, None, torch.float32, "e4m3", 1),
        (None, False, (E4M3, 16), torch.float16, "float16", 1),
        (None, False, (E8M0, 32), torch.bfloat16, "bfloat16", 1),
        (None, True, None, torch.float16, "bfloat16", 2),
        (None, False, None, torch.float32, "bfloat16", 4),
    ):
        scale, size = scale or (None, 0)
        packed = random_packed(70, 330, E2M1, activation, shift, scale, size)
        form = Form.of(Problem.of(packed, 5, dtype))
        assert (form.operand, form.planes, form.scale) == (operand, planes, scale.name if scale else "none")
        with OnCpu([], **HOPPER):
            plan = cuda.Prepared(packed, None).plan("sm90", 5, dtype, 132)
        rows, bytes_each = 5 * form.planes, 1 if operand in ("int8", "e4m3") else 2
        tile_rows = cuda_choices.rows_of_tile(plan)
        assert plan.parts[0] == -(-rows // tile_rows) * tile_rows * 384 * bytes_each
        assert plan.tile == division("cuda.sm90", form, 5, 132).tile


def grid_of(kernel, plan, tiles):
    """Of few rows, which are one tile."""
    if kernel == "cuda.sm90":
        return (plan.sharers or tiles, 1, 1)
    return (tiles, plan.splits, 1) if kernel == "cuda.gemv" else (1, tiles, plan.splits)


@needs_ptx
@pytest.mark.parametrize("kernel", cuda_choices.NAMES)
def test_a_table_leads_to_its_launch(kernel, cache):
    """Every tile of the row, with other splits each: exactly that kernel and grid, the same bits."""
    hopper = kernel == "cuda.sm90"
    packed, m = random_packed(70, 330, E2M1, E2M1, True), 5
    form, x = dataclasses.replace(FORM, n=70, k=330), random_x(5, 330, torch.bfloat16)
    expected, multiprocessors = reference.gemm(x, packed).to(x.dtype), 8
    with OnCpu(
        all_kernels("sm_90a" if hopper else "sm_80"), multiprocessors, capability=(9, 0) if hopper else (8, 0)
    ) as gpu:
        first, last = division(kernel, form, m, multiprocessors).tiles
        for tile in range(first, last + 1):
            plan = division(kernel, form, m, multiprocessors, tile)
            splits = (1, plan.most_splits, 2)[tile % 3]
            put(row(kernel, tile, plan.tile_size, splits, form, m))
            y = gpu.run(cuda.Prepared(packed, None), kernel, x)
            outs, rows = map(int, plan.tile_size.split("x"))
            tiles = -(-70 // outs)
            assert gpu.grids[-1] == grid_of(kernel, division(kernel, form, m, multiprocessors, tile, splits), tiles)
            assert splits == 1 or splits in gpu.grids[-1] or splits * tiles in gpu.grids[-1]
            sizes = {"cuda.gemv": rows, "cuda.sm80": plan.tile_size, "cuda.sm90": 32 << tile}  # sm90's: at most
            assert gpu.launched[-1].endswith(f"_{sizes[kernel]}")
            assert same_bits(y, expected), (tile, splits)
        (cache / cuda_choices.KIND.file(measured.Conditions.of(cuda.machine, HERE))).unlink()
        measured.forget()
        gpu.run(cuda.Prepared(packed, None), kernel, x)
        counted = division(kernel, form, m, multiprocessors)
        outs = int(counted.tile_size.split("x")[0])
        assert gpu.grids[-1] == grid_of(kernel, counted, -(-70 // outs))


def test_a_layer_reads_the_table_once(monkeypatch):
    """At its preparation: a call opens no file, whatever its m."""
    with OnCpu([], **HOPPER):
        put(row("cuda.gemv", 0, "16x8", 3, m=1), row("cuda.gemv", 3, "16x16", 2))
        prepared = cuda.Prepared(random_packed(150, 2100, E2M1, E2M1), None)
        for module, name in ((measured, "known"), (json, "loads"), (measured.Path, "read_text")):
            monkeypatch.setattr(module, name, lambda *_: pytest.fail("a file is read"))
        assert [prepared.plan("gemv", m, torch.float16, 132).splits for m in (1, 2, 16)] == [3, 1, 2]
        assert prepared.plan("gemv", 1, torch.float16, 132, (2, 7)).tile_size == "64x8"


def choice(problem):
    return registry.choose(problem).name, cuda.tile(registry.choose(problem).name, problem)


def test_the_fastest_row_runs(monkeypatch):
    """Of those that take the problem, or that are forced; without a measurement the registry's first."""
    problem = Problem(16, 150, 2100, E2M1, E2M1, device="cuda")
    with OnCpu([], **HOPPER):
        name, tile = choice(problem)
        nothing = f"counted: there is no cuda-*.json in {measured.cache_folder()} or {measured.SHIPPED}"
        assert (name, tile) == ("cuda.gemv", measured.Choice(Tile("cuda.gemv", 5, "64x16", 4), nothing))
        slow, fast = row("cuda.gemv", 3, "16x16", 2, seconds=9e-5), row()
        path = put(slow, fast, row("cuda.sm90", 0, "128x16", 4, seconds=3e-5))
        name, tile = choice(problem)
        assert (name, tile.config) == ("cuda.sm80", fast.config)
        assert tile.source == f"measured at m = 16, n = 150, k = 2100, 2000-01-01, commit 0000000000, in {path}"
        assert choice(dataclasses.replace(problem, dtype=torch.float16, activation=None))[0] == "cuda.gemv"
        monkeypatch.setenv("LLMFP4_KERNEL", "cuda.gemv")
        assert choice(problem)[1].config == slow.config
        monkeypatch.setenv("LLMFP4_KERNEL", "cuda")
        assert choice(problem)[0] == "cuda.sm80" and registry.layout_for(problem) == "units"
        monkeypatch.setenv("LLMFP4_KERNEL", "cuda.sm80-packed")
        assert choice(problem) == ("cuda.sm80-packed", None)
        monkeypatch.delenv("LLMFP4_KERNEL")
        put(row(seconds=1e-3))
        assert choice(problem)[0] == "cuda.sm90"


def test_what_lies_next_to_a_measurement():
    """Shapes by factors of two along either side, at most two of them; then tokens; then seconds."""
    square, wide = (dataclasses.replace(FORM, n=n, k=k) for n, k in ((4096, 4096), (11008, 4096)))
    rows = tuple(row(form=form, m=m) for form in (square, wide) for m in (1, 16, 64, 1024, 4096))

    def found(n, k, m, **changes):
        form = dataclasses.replace(FORM, n=n, k=k, **changes)
        near = cuda_choices.nearest(rows, form, m, cuda_choices.NAMES)
        return near and (near.form.n, near.m)

    assert [found(4096, 4096, m) for m in (1, 2, 16, 17, 64, 65, 257, 1024, 1025, 9999)] == [
        (4096, m) if m else None for m in (1, 16, 16, 64, 64, None, 1024, 1024, 4096, 4096)
    ]
    assert found(4096, 11008, 1) == found(5120, 5120, 1) == (4096, 1)
    assert found(13824, 5120, 1) == found(8192, 4096, 1) == (11008, 1)
    assert found(1024, 8192, 1) is found(4096, 4096, 1, planes=2) is found(4096, 4096, 1, operand="e4m3") is None
    assert found(4096, 4096, 1, scale="e4m3", group_size=16) is None
    assert cuda_choices.nearest(rows, square, 1, ("cuda.gemv",)) is None


def test_a_choice_keeps_to_what_the_product_has():
    """Measured with 16 rows and 2100 inputs; 9 rows and 1050 inputs have other tiles, fewer rows fewer splits."""
    with OnCpu([], **HOPPER):
        put(row("cuda.gemv", 1, "32x8", 30, m=8), row("cuda.sm80", 2, "128x128", 6, m=4096))
        known = cuda_choices.known(cuda.machine, HERE)
        small = dataclasses.replace(FORM, k=1050)
        assert cuda_choices.choose(known, small, 5, ("cuda.gemv",), 132)[0] == Tile("cuda.gemv", 1, "32x8", 17)
        narrow = dataclasses.replace(FORM, n=600)
        assert cuda_choices.choose(known, narrow, 4096, ("cuda.sm80",), 132)[0].splits == 6
        assert cuda_choices.choose(known, narrow, 8192, ("cuda.sm80",), 132)[0].splits == 3
        assert cuda_choices.choose(known, FORM, 9, ("cuda.gemv",), 132) is None


def test_a_measured_tile_pads_no_more_rows_than_the_counted_one():
    """But for the number of tokens that it was measured with."""
    with OnCpu([], **HOPPER):
        put(row("cuda.sm90", 3, "128x256", 1, m=256), row("cuda.sm90", 1, "128x48", 1, m=40))
        known = cuda_choices.known(cuda.machine, HERE)
        sizes = [cuda_choices.choose(known, FORM, m, ("cuda.sm90",), 132)[0].size for m in (256, 200, 97, 65, 40, 20)]
    assert sizes == ["128x256", "128x224", "128x112", "128x80", "128x48", "128x24"]
