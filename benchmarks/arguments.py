"""What the benchmarks' options take, as argparse types: a wrong one ends in a sentence before anything is measured."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from ours import DTYPES

from llmfp4_kernels import registry
from llmfp4_kernels.cli import count
from llmfp4_kernels.errors import LLMFP4Error
from llmfp4_kernels.formats import recipe as recipe_named


def rounds(text: str) -> int:
    """Two or more: a spread needs them."""
    return count(text, least=2)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return value


def shape(text: str) -> tuple[int, int]:
    """NxK, of which this machine's memory holds fp32 weights twice."""
    n, separator, k = text.partition("x")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape NxK, as 4096x11008 is")
    n, k = count(n), count(k)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 8 * n * k > memory:
        have = f"this machine has {memory >> 30} GiB"
        raise argparse.ArgumentTypeError(f"{text!r} in fp32 is {4 * n * k >> 30} GiB, twice; {have}")
    return n, k


def recipe(text: str) -> str:
    try:
        return recipe_named(text).name
    except LLMFP4Error as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def scheme(text: str) -> str:
    """RECIPE or RECIPE:DTYPE, the dtype of the activations."""
    name, separator, dtype = text.partition(":")
    if separator and dtype not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} ends in none of :{', :'.join(DTYPES)}")
    return recipe(name) + separator + dtype


def kernel(text: str) -> str:
    """A row of the registry, or a family of rows."""
    names = [row.name for row in registry.table()]
    if text not in names and text not in {name.split(".")[0] for name in names}:
        raise argparse.ArgumentTypeError(f"{text!r} names no kernel: known are {', '.join(names)}")
    return text


def _writable(text: str, write: Callable[[Path], object]) -> Path:
    """A file in a folder, which is made, as far as `write` succeeds."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise argparse.ArgumentTypeError(f"{text!r} cannot be written: it is no file")
        write(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error.strerror}") from error
    return path


def result_file(text: str) -> Path:
    """A file that lines can be appended to; its folder is made."""
    return _writable(text, lambda path: path.open("a").close())


def whole_file(text: str) -> Path:
    """A file that packed.write_beside can put in its place; its folder is made."""
    return _writable(text, lambda path: tempfile.TemporaryFile(dir=path.parent).close())
