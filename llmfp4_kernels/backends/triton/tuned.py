"""Tiles that were measured, as measured.py keeps them, read where a product first asks for one; else configs.py's."""

from __future__ import annotations

import functools
import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import measured
from ..measured import Choice, Kind
from . import configs, machine
from .configs import Config
from .form import Form

KERNEL_FILES = ("decode.py", "product.py")


@functools.cache
def _kernels() -> str:
    """A digest of the text that was compiled."""
    text = "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in KERNEL_FILES)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Conditions(measured.Conditions):
    triton: str
    kernels: str
    """Of decode.py and product.py."""

    @staticmethod
    def here(device: torch.device) -> Conditions:
        common = measured.Conditions.of(machine.here, device)
        return Conditions(**vars(common), triton=importlib.import_module("triton").__version__, kernels=_kernels())


@dataclass(frozen=True)
class Row:
    """The fastest tile found for m tokens."""

    form: Form
    m: int
    config: Config
    seconds: float
    guess_seconds: float
    """Of configs.py's tile, in the same rounds."""
    timed: int
    """Tiles timed before time was up, of `candidates`."""
    candidates: int
    commit: str
    date: str


def _refusal(row: Row, here: Conditions) -> str | None:
    if (row.form.kernel, row.form.bits) not in configs.TABLE:
        return f"there is no kernel {row.form.kernel} of {row.form.operand}"
    return configs.refusal(row.config, row.form, machine.here.capability(None), machine.version())


KIND = Kind("triton", "llmfp4 triton tiles", 1, Conditions, Row, _refusal, "guessed")


def known(device: torch.device) -> measured.Known:
    """What was measured on a GPU; the files are read once."""
    return measured.known(KIND, functools.partial(Conditions.here, device))


def choose(form: Form, m: int, device: torch.device) -> Choice:
    """The measured tile for the number of tokens next to m that serves it, or configs.py's."""

    def serving(rows: tuple[Row, ...]) -> Row | None:
        found = (row for row in rows if row.form == form and measured.serves(row.m, m))
        return min(found, key=lambda row: measured.apart(row.m, m), default=None)

    here = known(device)
    row, _ = here.find(serving)
    if row:
        return Choice(row.config, f"measured at m = {row.m}, {row.date}, commit {row.commit}")
    limits = machine.here.capability(device.index), machine.version()
    config = configs.choose(form, m, *limits, machine.here.multiprocessors(device))
    return Choice(config, here.lacking)


def put(new: Row, device: torch.device) -> Path:
    """The row in this GPU's file in the cache folder, in place of one of its form and m."""
    here, folder = Conditions.here(device), measured.cache_folder()
    return measured.put(KIND, [new], here, folder, lambda row: (row.form, row.m))
