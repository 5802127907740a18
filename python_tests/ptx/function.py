"""One kernel as a list of operations. The semantics stand in the instruction tables, which register themselves here.

An instruction becomes its form, C++ text in which registers and constants are numbered operands, such as
`r(u32, 0) = u32(r(u32, 1) + r(u32, 2));`, and the places of the operands in a thread's frame. A kernel has thousands of
instructions, but all kernels together some hundred forms: g++ compiles each of them once.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from .program import SIZES, Entry, Label, Module, Refusal, Statement

TABLE: list = []  # (pattern of a whole opcode, handler(function, match, *operands))


def instruction(pattern: str):
    """Registers a handler for opcodes that match entirely: a modifier outside the pattern is refused, never dropped."""

    def register(handler):
        TABLE.append((re.compile(pattern), handler))
        return handler

    return register


def unsigned(type: str) -> str:
    return "bool" if type == "pred" else f"u{8 * SIZES[type]}"


def signed(type: str) -> str:
    """The C++ type in which this PTX type compares and extends."""
    return f"s{8 * SIZES[type]}" if type[0] == "s" else unsigned(type)


SPECIAL = {f"%{name}.{axis}": f"B.{name}[{i}]" for name in ("ntid", "ctaid", "nctaid") for i, axis in enumerate("xyz")}
SPECIAL |= {f"%tid.{axis}": f"T.tid[{i}]" for i, axis in enumerate("xyz")}
SPECIAL |= {"%laneid": "u32(T.lane)", "%warpid": "u32(T.warp)", "%nwarpid": "u32(B.warps)", "WARP_SZ": "32u"}
SPECIAL |= {
    "%lanemask_eq": "(1u << T.lane)",
    "%lanemask_lt": "((1u << T.lane) - 1)",
    "%lanemask_le": "u32((2ull << T.lane) - 1)",
}
SPECIAL |= {"%lanemask_gt": "~u32((2ull << T.lane) - 1)", "%lanemask_ge": "~((1u << T.lane) - 1)"}
SPECIAL |= {"%dynamic_smem_size": "(B.shared_bytes - B.dynamic_offset)"}
MAX_FRAME = 192 * 1024
INTEGER = re.compile(r"-?\d+U?|-?0[xX][0-9a-fA-F]+U?")
FLOAT = re.compile(r"0[fFdD]([0-9a-fA-F]{8}|[0-9a-fA-F]{16})")
ADDRESS = re.compile(r"\[\s*(.+?)\s*(?:\+\s*(-?\w+))?\s*\]")


@dataclass
class Operation:
    form: str  # C++ text
    site: int
    operands: list[int | str]  # places in the frame, or a label


class Function:
    def __init__(self, module: Module, entry: Entry, variables: dict[str, int]):
        """`variables` are the addresses of the module's .global and .const variables."""
        self.module, self.entry, self.variables = module, entry, variables
        self.frame = bytearray()  # registers and constants, as a thread finds them
        self.places: dict[object, int] = {}  # of a register's unique name, or of a constant's value and type
        self.registers: dict[tuple[str, int], tuple[int, str]] = {}  # by name and number of the scope that uses it
        self.operations: list[Operation] = []
        self.labels: dict[str, int] = {}  # number of the operation that follows
        self.sites: list[tuple[int, int, str]] = [(entry.line, 0, f".entry {entry.name}")]
        self.shared: dict[str, int] = {}
        self.shared_bytes = 0
        self.locals: dict[str, int] = {}
        self.local_bytes = 0
        self.dynamic_align = max(module.dynamic.values(), default=16)
        for array in entry.locals:
            self.locals[array.name] = self.local_bytes = -(-self.local_bytes // array.align) * array.align
            self.local_bytes += array.bytes
        for item in entry.items:
            if isinstance(item, Label):
                self.labels[item.name] = len(self.operations)
            else:
                self.translate(item)
        self.operations.append(Operation("return nullptr;", 0, []))
        if len(self.frame) + self.local_bytes > MAX_FRAME:
            needed = f"{len(self.frame) + self.local_bytes} bytes of registers, constants and locals"
            raise Refusal(f"kernel {entry.name}: {needed}, a thread has {MAX_FRAME}")

    def translate(self, s: Statement) -> None:
        self.now, self.operands = s, []
        self.sites.append((s.line, s.source_line, s.text[:120]))
        try:
            handler, match = self.find(s.opcode)
            code = handler(self, match, *s.operands)
            if code.strip(" ;") and s.predicate:
                code = f"if ({self.predicate(s.predicate)}) {{ {code} }}"
        except (Refusal, KeyError, TypeError, ValueError, IndexError) as e:
            why = str(e) if isinstance(e, Refusal) else f"unexpected operands ({type(e).__name__}: {e})"
            raise Refusal(f"kernel {self.entry.name}, PTX line {s.line}: `{s.text[:120]}`: {why}") from e
        if code.strip(" ;"):
            form = f"{code} return next<{len(self.operands)}>(o);"
            self.operations.append(Operation(form, len(self.sites) - 1, self.operands))

    @staticmethod
    @functools.cache
    def find(opcode: str):
        for pattern, handler in TABLE:
            if match := pattern.fullmatch(opcode):
                return handler, match
        raise Refusal(f"instruction `{opcode}` is not modelled")

    # ---- operands
    def at(self) -> str:
        """Names this instruction in what the machine reports from here on."""
        return "T.site = o->site; "

    def place(self, key: object, type: str, value: int = 0) -> int:
        """In the frame, of what is known by `key`; it holds `value` at first."""
        if key not in self.places:
            bytes = 8 if type == "u64" else 4
            self.frame.extend(bytearray(-len(self.frame) % bytes))
            self.places[key] = len(self.frame)
            self.frame += value.to_bytes(bytes, "little")
        return self.places[key]

    def operand(self, place: int, type: str) -> str:
        self.operands.append(place)
        return f"r({type}, {len(self.operands) - 1})"

    def constant(self, value: int, type: str) -> str:
        value = int(value != 0) if type == "bool" else value % 2 ** int(type[1:])
        return self.operand(self.place((value, type), type, value), type)

    def register(self, name: str) -> str:
        name = name.strip()
        if name in SPECIAL:
            return SPECIAL[name]
        known = name, self.now.scope.number
        if known not in self.registers:
            self.registers[known] = self.declared(name)
        return self.operand(*self.registers[known])

    def declared(self, name: str) -> tuple[int, str]:
        """Place and C++ type of the register that has this name here."""
        numbered = re.match(r"(.*?\D)\d+$", name)
        for scope in self.now.scope.walk():
            if name in scope.registers:
                unique, type = scope.registers[name]
            elif numbered and numbered[1] in scope.ranges:
                unique, type = (name, scope.number), scope.ranges[numbered[1]]
            else:
                continue
            return self.place(unique, unsigned(type)), unsigned(type)
        raise Refusal(f"unknown operand `{name}`")

    def predicate(self, name: str) -> str:
        return "!" + self.register(name[1:]) if name.startswith("!") else self.register(name)

    def value(self, operand: str, type: str = "b32") -> str:
        operand = operand.strip()
        if operand.startswith("!"):
            return self.predicate(operand)
        if operand.startswith("%"):
            return self.register(operand)
        if INTEGER.fullmatch(operand):
            return self.constant(int(operand.rstrip("U"), 0), unsigned(type))
        if m := FLOAT.fullmatch(operand):
            return self.constant(int(m[1], 16), "u32" if len(m[1]) == 8 else "u64")
        symbol = self.symbol(operand)
        return symbol if symbol else self.register(operand)

    def values(self, operand: str, type: str = "b32") -> list[str]:
        """The elements of {a, b, ...}; of one operand, itself."""
        if not operand.startswith("{"):
            return [self.value(operand, type)]
        return [x if x == "_" else self.value(x, type) for x in operand[1:-1].replace(" ", "").split(",")]

    def symbol(self, name: str) -> str | None:
        if name in self.module.dynamic:
            return "(SHARED_BASE + B.dynamic_offset)"
        array = self.entry.shared.get(name) or self.module.shared.get(name)
        if array:
            if name not in self.shared:
                self.shared[name] = -(-self.shared_bytes // array.align) * array.align
                self.shared_bytes = self.shared[name] + array.bytes
            return f"(SHARED_BASE + {self.constant(self.shared[name], 'u32')})"
        if name in self.variables:
            return self.constant(self.variables[name], "u64")
        if name in self.locals:
            return f"(u64(T.local) + {self.constant(self.locals[name], 'u64')})"
        offsets = {p.name: p.offset for p in self.entry.params}
        return f"(u64(B.params) + {self.constant(offsets[name], 'u64')})" if name in offsets else None

    def address(self, operand: str) -> str:
        m = ADDRESS.fullmatch(operand)
        if not m:
            raise Refusal(f"address `{operand}` is not modelled")
        base = self.value(m[1], "b64")
        return f"({base} + {self.constant(int(m[2], 0), 'u64')})" if m[2] else base

    def jump(self, name: str) -> str:
        for scope in self.now.scope.walk():
            if name in scope.labels:
                target = scope.labels[name]
                break
        else:
            raise Refusal(f"unknown label `{name}`")
        back = self.at() + "step_back(T); " if target in self.labels else ""
        self.operands.append(target)
        return f"{back}return jump(o, {len(self.operands) - 1});"
