"""`make gpu-check` without a GPU: its stages, their time, and what it says of those that fail."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu_check


class Stages:
    """What gpu_check runs: [limit, *command]. Commands with a word of `failing` end in its exit status."""

    def __init__(self):
        self.ran, self.failing = [], {}

    def run(self, command, env=None, **_):
        assert command[:3] == ["timeout", "-k", "5"]
        self.ran.append([int(command[3]), *command[5:]])
        return SimpleNamespace(returncode=sum(code for word, code in self.failing.items() if word in command))


@pytest.fixture
def stages(monkeypatch):
    made = Stages()
    for name in ("install_wheels", "build", "sanitize"):
        monkeypatch.setattr(gpu_check, name, lambda environment, name=name: made.ran.append(name))
    monkeypatch.setattr(gpu_check.subprocess, "run", made.run)
    monkeypatch.setattr(gpu_check, "failures", [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return made


def gpu_check_after(seconds, arguments, monkeypatch):
    monkeypatch.setattr(gpu_check, "STARTED", gpu_check.time.perf_counter() - seconds)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    gpu_check.main()


@pytest.mark.parametrize("passed", [0, 200, 290, 320, 470])
def test_gpu_check_runs_what_there_is_time_for(passed, stages, monkeypatch):
    """Of 8 minutes the benchmarks have 90 s and 30 for their end; nothing starts that could not use half its time."""
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: name)
    gpu_check_after(passed, [], monkeypatch)
    left = 480 - 90 - 30 - passed
    tune = [min(60, left), "-m", "llmfp4_kernels", "tune", "--backend", "triton", "--shape", "4096x4096", "--recipe"]
    ends = ["--seconds", "10", "--m", "1", "16", "64"]
    few = ["--shapes", "4096x4096", "--schemes", "llm-fp4", "llm-fp4-a16", "--m", "1", "16", "64", "1024"]
    stages_of = {name: (seconds, [min(seconds, left), *command]) for name, seconds, command in (
        ("test_gpu", 150, ["-m", "pytest", "-q", "-rs", "python_tests/test_gpu.py"]),
        ("test_gpu_triton", 150, ["-m", "pytest", "-q", "-rs", "python_tests/test_gpu_triton.py"]),
        ("golden", 60, ["benchmarks/golden.py"]),
        ("choices", 90, ["benchmarks/choices.py", *few, "--limit", "60"]),
        ("llama", 105, ["benchmarks/llama.py", "--limit", "75"]),
    )}  # fmt: skip
    fit = {name: [command] if left >= seconds / 2 else [] for name, (seconds, command) in stages_of.items()}
    rest = 90 + max(left, 0)
    expected = [
        *fit["test_gpu"], *fit["test_gpu_triton"], *fit["golden"], "sanitize", *fit["choices"],
        *([*tune, recipe, *ends] for recipe in ("llm-fp4", "llm-fp4-a16") if left >= 195),
        *fit["llama"], [rest + 60, "benchmarks/gpu.py", "--limit", str(rest)],
    ]  # fmt: skip
    assert stages.ran == ["install_wheels", "build", *expected]
    assert all(
        (gpu_check.ROOT / command[-1 if "-m" in command else 1]).is_file()
        for command in expected
        if command != "sanitize" and "tune" not in command
    )


def test_gpu_check_goes_on_after_a_failure_and_tells_all(stages, monkeypatch, tmp_path):
    stages.failing = {"python_tests/test_gpu.py": 1, "benchmarks/golden.py": 124}
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "gpu.jsonl").write_text("{}")
    (results / "gemm.jsonl").write_text("{}")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    with pytest.raises(SystemExit) as end:
        gpu_check_after(0, ["--copy-to", str(tmp_path / "out")], monkeypatch)
    sentences = str(end.value).splitlines()
    assert len(sentences) == 3 and sentences[0] == "gpu-check failed:"
    assert "test_gpu.py (exit status 1)" in sentences[1] and "golden.py (not done within 60 s)" in sentences[2]
    assert "benchmarks/gpu.py" in stages.ran[-1] and [p.name for p in (tmp_path / "out").iterdir()] == ["gpu.jsonl"]


def test_gpu_check_without_benchmarks(stages, monkeypatch):
    gpu_check_after(0, ["--no-benchmarks"], monkeypatch)
    assert stages.ran[-1] == "sanitize"


def test_gpu_check_ends_where_the_module_has_no_cuda_kernels(monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        return SimpleNamespace(returncode=len(commands) - 1)

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    monkeypatch.setattr(gpu_check, "failures", [])
    monkeypatch.setattr(gpu_check.shutil, "which", lambda tool, path: tool)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(SystemExit, match=r"native.problem_with_cuda\(\)\) \(exit status 1"):
        gpu_check.build({"PATH": ""})
    assert commands[0][5:] == ["setup.py", "-q", "build_ext", "--inplace"]


def test_gpu_check_names_all_that_is_lacking(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None if name == "pytest" else name)
    environment = {"PATH": "/nowhere"}
    with pytest.raises(SystemExit, match="needs cmake, ninja, pytest: carry the wheels"):
        gpu_check.build(environment)
    assert environment["LLMFP4_CUDA_ARCHITECTURES"] == "90-real;90a-real"
