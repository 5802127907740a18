"""The benchmark refuses to time wrong kernels, and writes complete result lines."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def gemm():
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("gemm", BENCHMARKS / "gemm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("name", ["llm-fp4 (W4A4)", "llm-fp4-a16"])
def test_a_wrong_copy_is_refused(gemm, name):
    contender = gemm.fp4(name, 48, 64, gemm.SCHEMES[name])
    x = torch.randn(3, 64)
    right = contender.calls[-1]
    gemm.compare([contender], x, rounds=2, budget=0)
    contender.calls[-1] = lambda x: right(x) * (1 + 2**-12)
    with pytest.raises(SystemExit, match="refusing to time a wrong kernel"):
        gemm.compare([contender], x, rounds=2, budget=0)


def test_result_lines_carry_machine_and_commit(gemm, tmp_path, threads):
    out = tmp_path / "r.jsonl"
    gemm.main(["--n", "48", "--k", "64", "--m", "1", "--threads", "1", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["name"] == "fp32" and rows[0]["ratio"] == 1
    assert len(rows) == 7 and all({"machine", "commit", "seconds", "spread", "kernel"} <= set(row) for row in rows)
