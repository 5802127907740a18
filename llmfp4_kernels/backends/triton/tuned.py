"""Tiles that were measured: one JSON file per GPU, which `llmfp4 tune` writes, read where a product first asks for it.

A file serves only where its GPU, Triton and the text of the kernels are those of here, and where each of its tiles
runs; any other is left aside whole, with a warning, and the tiles are configs.py's. Integer products have the same bits
in all tiles; sums of floats are added in another order, and may differ in their last bits before and after a tuning.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import math
import os
import re
import typing
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import BadFile
from ...packed import write_beside
from ..gpu import sm
from . import configs, machine
from .configs import Config
from .form import Form

FORMAT, VERSION = "llmfp4 triton tiles", 1
FOLDER = "LLMFP4_CACHE"
KERNEL_FILES = ("decode.py", "product.py")


def cache_folder() -> Path:
    """$LLMFP4_CACHE, else llmfp4_kernels in the user's cache folder ($XDG_CACHE_HOME if absolute, or ~/.cache)."""
    given, base = os.environ.get(FOLDER), Path(os.environ.get("XDG_CACHE_HOME", ""))
    return Path(given) if given else (base if base.is_absolute() else Path.home() / ".cache") / "llmfp4_kernels"


@functools.cache
def _kernels() -> str:
    """A digest of the text that was compiled."""
    text = "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in KERNEL_FILES)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Conditions:
    """What decides whether a measurement holds here."""

    gpu: str
    capability: str
    multiprocessors: int
    triton: str
    package: str
    kernels: str
    """Of decode.py and product.py."""

    @staticmethod
    def here(device: torch.device) -> Conditions:
        from ... import __version__

        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        capability = sm(machine.here.capability(device.index))
        version = importlib.import_module("triton").__version__
        return Conditions(name, capability, machine.here.multiprocessors(device), version, __version__, _kernels())

    @property
    def path(self) -> Path:
        """Of the file: parts of a GPU (MIG) are GPUs with fewer multiprocessors."""
        name = re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")
        return cache_folder() / f"triton-{name}-{self.multiprocessors}.json"


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

    def serves(self, form: Form, m: int) -> bool:
        """Tiles of a few tokens are as good for fewer; larger ones from a quarter of m on."""
        return form == self.form and m <= self.m and (self.m <= configs.GEMV_TOKENS or self.m < 4 * m)


def _record(kind, given, path: Path):
    """`given`, parsed from JSON, as the dataclass `kind`; raises BadFile where its fields or their types differ."""
    types = typing.get_type_hints(kind)
    if not isinstance(given, dict) or set(given) != set(types):
        found = ", ".join(given) if isinstance(given, dict) else repr(given)
        raise BadFile(f"{path}: a {kind.__name__.lower()} has the fields {found}, expected {', '.join(types)}")
    values = {}
    for name, type_ in types.items():
        value = _record(type_, given[name], path) if dataclasses.is_dataclass(type_) else given[name]
        if type(value) is not type_:
            raise BadFile(f"{path}: {name} is {value!r}, expected {type_.__name__}")
        values[name] = value
    return kind(**values)


def _check(row: Row, capability: tuple[int, int], path: Path) -> None:
    where = f"{path}: {row.form.kernel} at m = {row.m}, n = {row.form.n}, k = {row.form.k}"
    if min(row.m, row.form.n, row.form.k) < 1 or (row.form.kernel, row.form.bits) not in configs.TABLE:
        raise BadFile(f"{where} is no product of these kernels")
    if not (0 < row.seconds < math.inf and 0 < row.guess_seconds < math.inf):
        raise BadFile(f"{where} takes {row.seconds} and {row.guess_seconds} s")
    why = configs.refusal(row.config, row.form, capability, machine.version())
    if why:
        raise BadFile(f"{where} has a tile that does not run: {why}")


def read(path: Path, here: Conditions) -> list[Row]:
    """The rows of a file; raises FileNotFoundError, or BadFile for one that is not whole, not ours or not of here."""
    size = path.stat().st_size
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadFile(f"{path} ({size} bytes) is not JSON: {error}") from error
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise BadFile(f"{path} ({size} bytes) is not of format {FORMAT!r}, version {VERSION}")
    measured = _record(Conditions, content.get("conditions"), path)
    for field in dataclasses.fields(Conditions):
        was, is_ = getattr(measured, field.name), getattr(here, field.name)
        if was != is_:
            raise BadFile(f"{path} was measured with {field.name} {was}, here it is {is_}")
    if not isinstance(content.get("rows"), list):
        raise BadFile(f"{path} has no list of rows")
    rows = [_record(Row, row, path) for row in content["rows"]]
    for row in rows:
        _check(row, machine.here.capability(None), path)
    return rows


def write(rows: list[Row], here: Conditions) -> Path:
    """The file of this GPU, written beside and renamed; what is asked next reads it."""
    content = {"format": FORMAT, "version": VERSION, "conditions": dataclasses.asdict(here)}
    content["rows"] = [dataclasses.asdict(row) for row in rows]
    write_beside(here.path, lambda beside: beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))
    _known.cache_clear()
    return here.path


@functools.cache
def _known(path: Path, here: Conditions) -> tuple[list[Row], str]:
    """(rows, what is to be said where none serves); warns of a file that is left aside, once."""
    try:
        return read(path, here), f"{path} has no measurement for it"
    except FileNotFoundError:
        return [], f"there is no {path}"
    except (BadFile, OSError) as error:
        warnings.warn(f"measured tiles are not used: {error}; 'llmfp4 tune' writes them anew", stacklevel=2)
        return [], str(error)


@dataclass(frozen=True)
class Choice:
    config: Config
    source: str
    """ "measured ..." or "guessed: ...", for people."""


def choose(form: Form, m: int, device: torch.device) -> Choice:
    """The measured tile for the fewest tokens that serves m, or configs.py's."""
    here = Conditions.here(device)
    rows, why = _known(here.path, here)
    row = min((row for row in rows if row.serves(form, m)), key=lambda row: row.m, default=None)
    if row:
        return Choice(row.config, f"measured at m = {row.m}, {row.date}, commit {row.commit}")
    config = configs.choose(form, m, machine.here.capability(device.index), machine.version(), here.multiprocessors)
    return Choice(config, f"guessed: {why}")


def put(new: Row, device: torch.device) -> Path:
    """The row in this GPU's file, in place of one of its form and m. A file that does not hold here is replaced."""
    here = Conditions.here(device)
    try:
        rows = read(here.path, here)
    except (FileNotFoundError, BadFile):
        rows = []
    return write([*(row for row in rows if (row.form, row.m) != (new.form, new.m)), new], here)
