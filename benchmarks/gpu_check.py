"""`make gpu-check`: build for the GPU that is here, run the GPU tests, a memory checker, single instructions for
python_tests/vectors, and the benchmarks, offline.

Runs from a copy of the tracked files, with the Python that has torch. cmake, ninja, pybind11 and pytest may be missing
there: carry their wheels in .whl/ (or in the folder that WHEELS names). Nothing is downloaded. Fails on the first
failure, and says what it left out.
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
MODEL_SECONDS = 75
"""After which llama.py builds no further model."""
STARTED = time.perf_counter()


def elapsed() -> float:
    return time.perf_counter() - STARTED


def say(text: str) -> None:
    print(f"gpu-check {elapsed():6.1f} s: {text}", flush=True)


def run(*command, **options) -> None:
    say(" ".join(map(str, command)))
    if subprocess.run([*map(str, command)], cwd=ROOT, check=False, **options).returncode:
        sys.exit(f"gpu-check failed: {' '.join(map(str, command))}")


def install_wheels(environment: dict) -> None:
    wheels = sorted(Path(environment.get("WHEELS", ROOT / ".whl")).glob("*.whl"))
    if wheels:
        run(sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade",
            "--target", SITE, *wheels)  # fmt: skip


def build(environment: dict) -> None:
    """setup.py's own build, in place: cmake, ninja, nvcc, for this GPU alone."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    hopper = ";90a-real" if (major, minor) == (9, 0) else ""
    environment["LLMFP4_CUDA_ARCHITECTURES"] = f"{major}{minor}-real{hopper}"
    for tool in ("cmake", "ninja"):
        if shutil.which(tool, path=environment["PATH"]) is None:
            sys.exit(f"gpu-check needs {tool}: carry its wheel in .whl/")
    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", env=environment)


def sanitize(environment: dict) -> None:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return say("left out: there is no compute-sanitizer")
    probe = subprocess.run([tool, sys.executable, "-c", "import torch; torch.ones(1).cuda()"], capture_output=True)
    if probe.returncode:
        return say("left out: compute-sanitizer does not work on this machine")
    tests = [
        "-m",
        "pytest",
        "-q",
        "-x",
        "python_tests/test_gpu.py",
        "-k",
        "test_static_integers and e2m1xe2m1 or moves",
    ]
    run(tool, "--error-exitcode", "1", sys.executable, *tests, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-benchmarks", action="store_true", help="stop after the tests")
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
    tests = ("python_tests/test_gpu.py", "python_tests/test_gpu_triton.py")
    run(sys.executable, "-m", "pytest", "-q", "-x", *tests, env=environment)
    sanitize(environment)
    run(sys.executable, "benchmarks/golden.py", env=environment)
    if arguments.no_benchmarks:
        say("left out: the benchmarks")
    else:
        if importlib.util.find_spec("transformers") is None:
            say("left out: a whole model, for there is no transformers")
        else:
            run(sys.executable, "benchmarks/llama.py", "--limit", MODEL_SECONDS, env=environment)
        left = max(MINUTES * 60 - elapsed() - 30, 60)  # 30 s: what is running then, and the pictures
        run(sys.executable, "benchmarks/gpu.py", "--limit", round(left), env=environment)
    say("done")


if __name__ == "__main__":
    main()
