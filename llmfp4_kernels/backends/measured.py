"""What was measured on a GPU, tiles of kernels and the like: one JSON file per GPU and backend, in two places.

`llmfp4 tune` writes it into the user's cache folder, benchmarks/choices.py beside this file, from where it is shipped;
the cache folder is asked first. A file serves only where its conditions are those of here and where each of its rows
runs. Any other is left aside whole, with a warning. Integer products have the same bits in all tiles; sums of floats
are added in another order, and may differ in their last bits before and after a measurement.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import typing
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import BadFile
from ..packed import write_beside
from .gpu import Machine, sm

FOLDER = "LLMFP4_CACHE"
SHIPPED = Path(__file__).parent
FEW_TOKENS, MANY_TOKENS = 16, 4096


def cache_folder() -> Path:
    """$LLMFP4_CACHE, else llmfp4_kernels in the user's cache folder ($XDG_CACHE_HOME if absolute, or ~/.cache)."""
    given, base = os.environ.get(FOLDER), Path(os.environ.get("XDG_CACHE_HOME", ""))
    return Path(given) if given else (base if base.is_absolute() else Path.home() / ".cache") / "llmfp4_kernels"


@dataclass(frozen=True)
class Conditions:
    """What decides whether a measurement holds here."""

    gpu: str
    capability: str
    multiprocessors: int
    package: str

    @staticmethod
    def of(machine: Machine, device: torch.device) -> Conditions:
        from .. import __version__

        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        capability = sm(machine.capability(device.index))
        return Conditions(name, capability, machine.multiprocessors(device), __version__)


@dataclass(frozen=True)
class Kind:
    """Of a file: what its conditions and rows are, dataclasses both, of strings, numbers and such dataclasses."""

    name: str
    """Of the backend: files are called NAME-GPU-MULTIPROCESSORS.json."""
    format: str
    version: int
    """To be raised where fields change, or what a tile or a split means: older files are left aside then."""
    conditions: type
    row: type
    """With `form`, `m`, `seconds`, `commit`, `date`."""
    check: Callable[[object, object], str | None]
    """(row, conditions of here) → None, or why the row cannot run."""
    otherwise: str
    """What tiles are that were not measured: "guessed" or "counted"."""

    def file(self, here: Conditions) -> str:
        """Parts of a GPU (MIG) are GPUs with fewer multiprocessors."""
        gpu = re.sub(r"[^a-z0-9]+", "-", here.gpu.lower()).strip("-")
        return f"{self.name}-{gpu}-{here.multiprocessors}.json"


def serves(measured_m: int, m: int) -> bool:
    """Whether what was measured for `measured_m` tokens is taken for m: few tokens for fewer, more of them from a
    quarter on, and many for all beyond."""
    if m <= measured_m:
        return measured_m <= FEW_TOKENS or measured_m < 4 * m
    return measured_m >= MANY_TOKENS


def apart(a: int, b: int) -> float:
    """Of two sizes: factors of two between them."""
    return abs(math.log2(a / b))


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


def _check(kind: Kind, row, here: Conditions, path: Path) -> None:
    where = f"{path}: a row of m = {row.m}, n = {row.form.n}, k = {row.form.k}"
    numbers = [value for value in vars(row.form).values() if isinstance(value, int)]
    if min(row.m, row.form.n, row.form.k) < 1 or min(numbers) < 0 or max(row.m, *numbers) >= 1 << 31:
        raise BadFile(f"{where} is no product of these kernels")
    for name, value in vars(row).items():
        if name.endswith("seconds") and not 0 < value < math.inf:
            raise BadFile(f"{where} says {name} = {value}")
    why = kind.check(row, here)
    if why:
        raise BadFile(f"{where} does not run: {why}")


def read(kind: Kind, path: Path, here: Conditions) -> list:
    """The rows of a file; raises FileNotFoundError, or BadFile for one that is not whole, not ours or not of here."""
    size = path.stat().st_size
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadFile(f"{path} ({size} bytes) is not JSON: {error}") from error
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (kind.format, kind.version):
        raise BadFile(f"{path} ({size} bytes) is not of format {kind.format!r}, version {kind.version}")
    was_measured = _record(kind.conditions, content.get("conditions"), path)
    for field in dataclasses.fields(kind.conditions):
        was, is_ = getattr(was_measured, field.name), getattr(here, field.name)
        if was != is_:
            raise BadFile(f"{path} was measured with {field.name} {was}, here it is {is_}")
    if not isinstance(content.get("rows"), list):
        raise BadFile(f"{path} has no list of rows")
    rows = [_record(kind.row, row, path) for row in content["rows"]]
    for row in rows:
        _check(kind, row, here, path)
    return rows


def write(kind: Kind, rows: Iterable, here: Conditions, folder: Path) -> Path:
    """The file of this GPU in a folder, written beside and renamed; what is asked next reads it."""
    path = folder / kind.file(here)
    content = {"format": kind.format, "version": kind.version, "conditions": dataclasses.asdict(here)}
    content["rows"] = [dataclasses.asdict(row) for row in rows]
    write_beside(path, lambda beside: beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))
    forget()
    return path


def put(kind: Kind, new: list, here: Conditions, folder: Path, identity: Callable) -> Path:
    """Rows in this GPU's file, in place of those of the same identity(row). A file that does not hold is replaced."""
    try:
        rows = read(kind, folder / kind.file(here), here)
    except (FileNotFoundError, BadFile):
        rows = []
    replaced = set(map(identity, new))
    return write(kind, [*(row for row in rows if identity(row) not in replaced), *new], here, folder)


@dataclass(frozen=True)
class Known:
    """What holds here."""

    files: tuple[tuple[Path, tuple], ...]
    """(path, its rows), the one to be asked first."""
    lacking: str
    """What is to be said where none of them serves."""

    def find(self, choose: Callable[[tuple], object]):
        """(what `choose` makes of the rows of a file, the file), of the first file of which it makes something."""
        found = ((choose(rows), path) for path, rows in self.files)
        return next(((row, path) for row, path in found if row), (None, None))

    def __str__(self) -> str:
        """For `llmfp4 info`."""
        measured = [
            f"measured, {len(rows)} rows of {path}, the last one of {rows[-1].date}, commit {rows[-1].commit}"
            for path, rows in self.files
            if rows
        ]
        return "; ".join(measured) or self.lacking


def known(kind: Kind, here: Callable[[], Conditions]) -> Known:
    """Of the files of the GPU that `here` describes; it is asked where there are files, which are read once."""
    if not _is_there(kind.name, folders()):
        places = " or ".join(map(str, folders()))
        return Known((), f"{kind.otherwise}: there is no {kind.name}-*.json in {places}")
    return _read(kind, here(), folders())


def folders() -> tuple[Path, ...]:
    """Where files are looked for, in order."""
    return cache_folder(), SHIPPED


def forget() -> None:
    """What is asked next is read anew."""
    _is_there.cache_clear()
    _read.cache_clear()


@functools.cache
def _is_there(name: str, folders: tuple[Path, ...]) -> bool:
    return any(any(folder.glob(f"{name}-*.json")) for folder in folders)


@functools.cache
def _read(kind: Kind, here: Conditions, folders: tuple[Path, ...]) -> Known:
    """Warns of a file that is left aside, once."""
    files, lacking = [], []
    for path in (folder / kind.file(here) for folder in folders):
        try:
            files.append((path, tuple(read(kind, path, here))))
            lacking.append(f"{path} has no measurement for it")
        except FileNotFoundError:
            lacking.append(f"there is no {path}")
        except (BadFile, OSError) as error:
            warnings.warn(f"measured tiles are not used: {error}; 'llmfp4 tune' writes them anew", stacklevel=2)
            lacking.append(str(error))
    return Known(tuple(files), f"{kind.otherwise}: {'; '.join(lacking)}")


@dataclass(frozen=True)
class Choice:
    config: object
    """A dataclass."""
    source: str
    """ "measured ...", or "guessed: ..." or "counted: ..." and why, for people."""


@functools.cache
def commit() -> str:
    """Of the checkout that this package runs from; "unknown" where it runs from none."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    try:
        command = ["git", "-C", str(root), "rev-parse", "--short=10", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
