"""`make gpu-check`: build for the GPU that is here, run the GPU tests, a memory checker, single instructions for
python_tests/vectors, choose CUDA rows and tiles for a shape, tune Triton's, and run the benchmarks, offline.

Runs from a copy of the tracked files, with the Python that has torch. cmake, ninja, pybind11 and pytest may be missing
there: carry their wheels in .whl/ (or in the folder that WHEELS names). Nothing is downloaded. Without a build nothing
follows; else every stage runs, in its time, and the failures of all are said at the end. What is left out is said, too.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu-check"
MINUTES = 8
"""That all of it may take."""
TUNING, TUNED_TOKENS = 60, ("1", "16", "64")
"""Seconds for Triton's tiles of two recipes, where the model's are left, too."""
CHOICES, CHOSEN_TOKENS = 60, ("1", "16", "64", "1024")
"""Seconds for the CUDA rows' of the same."""
MODEL_SECONDS = 75
"""After which llama.py builds no further model."""
STARTED = time.perf_counter()
TESTS, CHECKER, VECTORS = 150, 60, 60
"""Seconds that one file of tests, the memory checker and the instruction forms may take."""
BENCHMARKS, LAST = 90, 30
"""Seconds that the benchmarks have at least, and that they take for the last product and the pictures."""
WRITTEN = (
    "benchmarks/results/gpu*", "benchmarks/results/llama*", "python_tests/vectors/gpu*",
    "llmfp4_kernels/backends/*.json",
)  # fmt: skip
failures: list[str] = []


def elapsed() -> float:
    return time.perf_counter() - STARTED


def left() -> float:
    """Seconds that the benchmarks do not need."""
    return MINUTES * 60 - BENCHMARKS - LAST - elapsed()


def say(text: str) -> None:
    print(f"gpu-check {elapsed():6.1f} s: {text}", flush=True)


def run(*command, limit: float = MINUTES * 60, env: dict | None = None) -> bool:
    """Whether a command succeeds within `limit` seconds; if not, why stands in `failures`."""
    text = " ".join(map(str, command))
    say(text)
    started = time.perf_counter()
    # `timeout` ends what the command has started, too.
    limited = ["timeout", "-k", "5", str(round(limit)), *map(str, command)]
    code = subprocess.run(limited, cwd=ROOT, check=False, env=env).returncode
    took = time.perf_counter() - started
    if code:
        why = f"not done within {limit:.0f} s" if code in (124, 137) else f"exit status {code}"
        failures.append(f"{text} ({why})")
    say(f"{took:.0f} s, {'failed' if code else 'done'}")
    return code == 0


def run_in(seconds: float, *command, env: dict) -> None:
    """A stage that may take so many seconds; left out where less than half of them are left."""
    if left() < seconds / 2:
        return say(f"left out: {' '.join(map(str, command))}; {left():.0f} s are left, it may take {seconds}")
    run(*command, limit=min(seconds, left()), env=env)


def install_wheels(environment: dict) -> None:
    wheels = sorted(Path(environment.get("WHEELS", ROOT / ".whl")).glob("*.whl"))
    command = (sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade")
    if wheels and not run(*command, "--target", SITE, *wheels):
        sys.exit(f"gpu-check failed: {failures[0]}")


def build(environment: dict) -> None:
    """setup.py's own build, in place: cmake, ninja, nvcc, for this GPU alone."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    own = f";{major}{minor}a-real" if (major, minor) in ((9, 0), (12, 0)) else ""
    environment["LLMFP4_CUDA_ARCHITECTURES"] = f"{major}{minor}-real{own}"
    lacking = [tool for tool in ("cmake", "ninja") if shutil.which(tool, path=environment["PATH"]) is None]
    sys.path.insert(0, str(SITE))
    lacking += [module for module in ("pybind11", "pytest", "numpy") if importlib.util.find_spec(module) is None]
    if lacking:
        sys.exit(f"gpu-check needs {', '.join(lacking)}: carry the wheels in .whl/")
    # A module without CUDA kernels would let every test be skipped.
    loads = "import sys; from llmfp4_kernels import native; sys.exit(native.problem_with_cuda())"
    for command in (("setup.py", "-q", "build_ext", "--inplace"), ("-c", loads)):
        if not run(sys.executable, *command, env=environment):
            sys.exit(f"gpu-check failed: {failures[0]}")


def sanitize(environment: dict) -> None:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return say("left out: there is no compute-sanitizer")
    probe = ["timeout", str(CHECKER), tool, sys.executable, "-c", "import torch; torch.ones(1).cuda()"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return say("left out: compute-sanitizer does not work on this machine")
    tests = ["-m", "pytest", "-q", "python_tests/test_gpu.py", "-k", "small_problems or moves"]
    # Each tensor is an allocation of its own: torch's cache would hide where one ends.
    environment = environment | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run_in(CHECKER, tool, "--error-exitcode", "1", sys.executable, *tests, env=environment)


def choose(environment: dict) -> None:
    """The CUDA rows' tiles for the benchmarks' first shape, kept in the package; what follows uses them."""
    what = ["--shapes", "4096x4096", "--schemes", "llm-fp4", "llm-fp4-a16", "--m", *CHOSEN_TOKENS]
    command = ("benchmarks/choices.py", *what, "--limit", CHOICES)
    run_in(CHOICES + LAST, sys.executable, *command, env=environment)


def tune(environment: dict) -> None:
    """Triton's tiles for the benchmarks' first shape, kept in a folder of this check; left out where time is short."""
    there = importlib.util.find_spec("triton") is not None
    if left() < 2 * TUNING + MODEL_SECONDS or not there:
        return say(
            f"left out: tuning Triton's tiles; {left():.0f} s are left, Triton is {'' if there else 'not '}there"
        )
    environment["LLMFP4_CACHE"] = str(SITE / "tiles")
    share = ("--seconds", str(TUNING // (2 * len(TUNED_TOKENS))), "--m", *TUNED_TOKENS)
    for recipe in ("llm-fp4", "llm-fp4-a16"):
        shape = ["--backend", "triton", "--shape", "4096x4096", "--recipe", recipe, *share]
        run(sys.executable, "-m", "llmfp4_kernels", "tune", *shape, limit=TUNING, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-benchmarks", action="store_true", help="stop after the tests")
    parser.add_argument("--copy-to", type=Path, help="a folder for copies of the results, where the tree does not last")
    arguments = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        sys.exit("gpu-check needs a Python with torch")
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu-check: there is no GPU that torch can use")
    environment = os.environ | {
        "PYTHONPATH": f"{SITE}:{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "PATH": f"{SITE}/bin:{os.environ['PATH']}:/usr/local/cuda/bin",
        "PYTHONUNBUFFERED": "1",
    }
    install_wheels(environment)
    build(environment)
    # Without this setting torch refuses deterministic products of cuBLAS, which the fallback to the reference takes.
    tested = environment | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    for tests in ("python_tests/test_gpu.py", "python_tests/test_gpu_triton.py"):
        run_in(TESTS, sys.executable, "-m", "pytest", "-q", "-rs", tests, env=tested)
    run_in(VECTORS, sys.executable, "benchmarks/golden.py", env=environment)
    sanitize(tested)
    if arguments.no_benchmarks:
        say("left out: the benchmarks")
    else:
        choose(environment)
        tune(environment)
        if importlib.util.find_spec("transformers") is None:
            say("left out: a whole model, for there is no transformers")
        else:
            model = ("benchmarks/llama.py", "--limit", MODEL_SECONDS)
            run_in(MODEL_SECONDS + LAST, sys.executable, *model, env=environment)
        rest = BENCHMARKS + max(left(), 0)
        run(sys.executable, "benchmarks/gpu.py", "--limit", round(rest), limit=rest + 2 * LAST, env=environment)
    if arguments.copy_to:
        arguments.copy_to.mkdir(parents=True, exist_ok=True)
        for path in (path for pattern in WRITTEN for path in sorted(ROOT.glob(pattern))):
            shutil.copy2(path, arguments.copy_to)
    if failures:
        sys.exit("gpu-check failed:\n" + "\n".join(failures))
    say("done")


if __name__ == "__main__":
    main()
