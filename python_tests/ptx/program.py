"""What PTX text is read into: modules of kernels of statements."""

from __future__ import annotations

from dataclasses import dataclass, field


class Refusal(Exception):
    """The machine does not model this PTX. The message names the instruction and its line."""


SIZES = {
    "pred": 1,
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
}
SIZES |= {"f32": 4, "f16x2": 4, "bf16x2": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "b128": 16}


@dataclass
class Statement:
    line: int
    source_line: int
    text: str  # without its predicate
    predicate: str | None
    opcode: str
    operands: list[str]
    scope: Scope


@dataclass
class Label:
    name: str  # unique in the kernel


@dataclass
class Scope:
    """Names of one pair of braces: registers, register ranges (%r<9>) and labels."""

    number: int
    parent: Scope | None
    registers: dict[str, tuple[str, str]] = field(default_factory=dict)  # name: (C++ name, PTX type)
    ranges: dict[str, str] = field(default_factory=dict)  # prefix: PTX type
    labels: dict[str, str] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)  # .branchtargets

    def walk(self):
        scope = self
        while scope:
            yield scope
            scope = scope.parent


@dataclass
class Array:
    """A variable in shared, local, global or constant memory."""

    name: str
    type: str
    align: int
    count: int
    values: str | None = None

    @property
    def bytes(self):
        return SIZES[self.type] * self.count


@dataclass
class Param:
    name: str
    offset: int
    bytes: int


@dataclass
class Entry:
    name: str
    line: int
    params: list[Param]
    max_threads: int
    items: list = field(default_factory=list)  # statements and labels
    locals: list[Array] = field(default_factory=list)
    shared: dict[str, Array] = field(default_factory=dict)


@dataclass
class Module:
    target: str
    entries: list[Entry] = field(default_factory=list)
    shared: dict[str, Array] = field(default_factory=dict)
    dynamic: dict[str, int] = field(default_factory=dict)  # .extern .shared: alignment
    variables: dict[str, tuple[str, Array]] = field(default_factory=dict)  # name: (global or const, array)
