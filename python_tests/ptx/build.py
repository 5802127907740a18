"""nvcc and g++, each result kept under build/ptx by the content it was made from."""

from __future__ import annotations

import ctypes
import functools
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / "build" / "ptx"
FLAGS = [
    "-std=c++17",
    "-march=native",
    "-ffp-contract=off",
    "-fPIC",
    "-fno-strict-aliasing",
    "-fno-stack-protector",
    "-w",
]
SOURCES = ("schedule", "shared", "memory", "barriers", "copies", "matrices", "wgmma")


@functools.cache
def nvcc() -> str | None:
    found = [shutil.which("nvcc"), *sorted(glob.glob("/usr/local/cuda*/bin/nvcc"))]
    return next((p for p in found if p), None)


def cannot_run() -> str | None:
    """Why PTX cannot run here, or None."""
    if platform.machine() != "x86_64":
        return f"the machine's fibers are written for x86_64, this is {platform.machine()}"
    return None if shutil.which("g++") else "no g++ on PATH: translated PTX cannot be compiled"


def missing() -> str | None:
    """Why CUDA kernels cannot run here, or None."""
    if nvcc() is None:
        return "no nvcc on PATH or in /usr/local/cuda*/bin: CUDA kernels cannot be compiled to PTX"
    return cannot_run()


def call(*command) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(str(command[0])).name} failed:\n{(done.stderr or done.stdout)[-4000:]}")
    return done.stdout


@functools.cache
def machine_key() -> str:
    """What -march=native and the compiler make of the sources."""
    target = subprocess.run(["g++", "-march=native", "-Q", "--help=target"], capture_output=True, text=True).stdout
    return digest(call("g++", "--version"), target, *(p.read_text() for p in sorted(HERE.glob("*.h"))))


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def cached(name: str, make) -> Path:
    """CACHE/name; make(path) writes it where it is missing. Two may make it at once: the last rename stands."""
    path = CACHE / name
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder) / name
            make(made)
            os.replace(made, path)
    return path


def ptx(cuda: str, arch: str = "sm_80", options: tuple[str, ...] = (), lines: bool = True) -> str:
    """The PTX that nvcc makes of CUDA C++ text; half of it are the source's lines, which faults name."""
    options = (*options, *["-lineinfo"] * lines)
    key = digest(cuda, arch, *options, call(nvcc(), "--version"))

    def make(out: Path) -> None:
        source = out.with_suffix(".cu")
        source.write_text(cuda)
        code = arch.replace("sm_", "compute_")
        call(
            nvcc(),
            "-std=c++17",
            "-O3",
            "-ptx",
            "-gencode",
            f"arch={code},code={code}",
            *options,
            source,
            "-o",
            out,
        )

    return cached(f"{key}.ptx", make).read_text()


def ptx_of_cubin(path: Path) -> str:
    """The PTX embedded in an object, library or fatbin."""
    tool = shutil.which("cuobjdump") or next(iter(glob.glob("/usr/local/cuda*/bin/cuobjdump")), None)
    if tool is None:
        raise RuntimeError("no cuobjdump on PATH or in /usr/local/cuda*/bin: PTX cannot be taken out of a binary")
    return re.sub(r"\A.*?(?=\.version)", "", call(tool, "-ptx", path), flags=re.S)


@functools.cache
def runtime() -> ctypes.CDLL:
    sources = {s: (HERE / f"{s}.cpp").read_text() for s in SOURCES}

    def compile(name: str) -> Path:
        key = digest(machine_key(), sources[name])
        return cached(f"{name}-{key}.o", lambda out: call("g++", "-O2", *FLAGS, "-c", HERE / f"{name}.cpp", "-o", out))

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, SOURCES))
    library = cached(
        f"machine-{digest(*map(str, objects))}.so", lambda out: call("g++", "-shared", *objects, "-o", out)
    )
    # Kernels resolve their symbols here.
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


class Form(ctypes.Structure):
    _fields_ = [("text", ctypes.c_char_p), ("run", ctypes.c_void_p)]


FORMS: dict[str, int] = {}  # the address of each form's function
_making = threading.Lock()


def load_forms(path: Path) -> None:
    library = ctypes.CDLL(str(path))
    count = ctypes.c_uint32.in_dll(library, "form_count").value
    FORMS.update((form.text.decode(), form.run) for form in (Form * count).in_dll(library, "forms"))


def form_library(texts: list[str]) -> str:
    """C++ of the forms, see function.py."""
    out = ["using namespace ptx;", "#define r(type, i) (*(type*)(R + o->at[i]))"]
    out += [f"static const Op* form_{i}(Thread& T, u8* R, const Op* o) {{ {text} }}" for i, text in enumerate(texts)]
    out += ["struct Form { const char* text; const Op* (*run)(Thread&, u8*, const Op*); };"]
    rows = ",\n".join(f"{{{json.dumps(text)}, form_{i}}}" for i, text in enumerate(texts))
    return "\n".join(
        [*out, f'extern "C" const Form forms[] = {{{rows}}};', f'extern "C" const u32 form_count = {len(texts)};']
    )


def forms(texts: set[str]) -> dict[str, int]:
    """FORMS with these among them. g++ compiles those that are in no library yet into a new one."""
    runtime()
    with _making:
        key = digest(machine_key(), *FLAGS)
        if not FORMS:
            for path in sorted(CACHE.glob(f"forms-{key}-*.so")):
                load_forms(path)
        if new := sorted(texts - FORMS.keys()):
            code, compile = form_library(new), ("g++", "-O2", *FLAGS)
            # Precompiled: most libraries have few forms.
            header = cached(
                f"numbers-{key}.h.gch", lambda out: call(*compile, "-x", "c++-header", HERE / "numbers.h", "-o", out)
            )

            def make(out: Path) -> None:
                source = out.with_suffix(".cpp")
                source.write_text(code)
                call(*compile, "-include", header.with_suffix(""), "-shared", source, "-o", out)

            load_forms(cached(f"forms-{key}-{digest(code)}.so", make))
    return FORMS
