"""One kernel as a C++ function. The semantics stand in the instruction tables, which register themselves here."""

from __future__ import annotations

import re

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


class Function:
    def __init__(self, module: Module, entry: Entry):
        self.module, self.entry = module, entry
        self.registers: dict[str, str] = {}  # C++ name: C++ type
        self.lines: list[str] = []
        self.sites: list[tuple[int, int, str]] = [(entry.line, 0, f".entry {entry.name}")]
        self.seen_labels: set[str] = set()
        self.shared: dict[str, int] = {}
        self.shared_bytes = 0
        self.locals: dict[str, int] = {}
        self.local_bytes = 0
        self.dynamic_align = max(module.dynamic.values(), default=16)
        for array in entry.locals:
            self.locals[array.name] = self.local_bytes = -(-self.local_bytes // array.align) * array.align
            self.local_bytes += array.bytes
        for item in entry.items:
            self.label(item) if isinstance(item, Label) else self.translate(item)

    def label(self, item: Label) -> None:
        self.seen_labels.add(item.name)
        self.lines.append(f"{item.name}:;")

    def translate(self, s: Statement) -> None:
        self.now = s
        self.sites.append((s.line, s.source_line, s.text[:120]))
        try:
            handler, match = self.find(s.opcode)
            code = handler(self, match, *s.operands)
            if s.predicate:
                code = f"if ({self.predicate(s.predicate)}) {{ {code} }}"
        except (Refusal, KeyError, TypeError, ValueError, IndexError) as e:
            why = str(e) if isinstance(e, Refusal) else f"unexpected operands ({type(e).__name__}: {e})"
            raise Refusal(f"kernel {self.entry.name}, PTX line {s.line}: `{s.text[:120]}`: {why}") from e
        self.lines.append(f"    {code}")

    @staticmethod
    def find(opcode: str):
        for pattern, handler in TABLE:
            if match := pattern.fullmatch(opcode):
                return handler, match
        raise Refusal(f"instruction `{opcode}` is not modelled")

    # ---- operands
    def at(self) -> str:
        """Names this instruction in what the machine reports from here on."""
        return f"T.site = {len(self.sites) - 1}; "

    def register(self, name: str) -> str:
        name = name.strip()
        if name in SPECIAL:
            return SPECIAL[name]
        for scope in self.now.scope.walk():
            if name in scope.registers:
                unique, type = scope.registers[name]
                self.registers[unique] = unsigned(type)
                return unique
            m = re.match(r"(.*?\D)(\d+)$", name)
            if m and m[1] in scope.ranges:
                unique = f"{m[1].lstrip('%')}{m[2]}_s{scope.number}"
                self.registers[unique] = unsigned(scope.ranges[m[1]])
                return unique
        raise Refusal(f"unknown operand `{name}`")

    def predicate(self, name: str) -> str:
        return "!" + self.register(name[1:]) if name.startswith("!") else self.register(name)

    def value(self, operand: str, type: str = "b32") -> str:
        operand = operand.strip()
        if operand.startswith("!"):
            return self.predicate(operand)
        if re.fullmatch(r"-?\d+U?|-?0[xX][0-9a-fA-F]+U?", operand):
            return (
                f"{unsigned(type)}({int(operand.rstrip('U'), 0)}ll)"
                if abs(int(operand.rstrip("U"), 0)) < 2**63
                else (f"{operand.rstrip('U')}ull")
            )
        if m := re.fullmatch(r"0[fFdD]([0-9a-fA-F]{8}|[0-9a-fA-F]{16})", operand):
            return f"0x{m[1]}{'u' if len(m[1]) == 8 else 'ull'}"
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
            return f"(SHARED_BASE + {self.shared[name]}u)"
        if name in self.module.variables:
            return f"u64(variable_{name.replace('$', '_')})"
        if name in self.locals:
            return f"(u64(T.local) + {self.locals[name]})"
        offsets = {p.name: p.offset for p in self.entry.params}
        return f"(u64(B.params) + {offsets[name]})" if name in offsets else None

    def address(self, operand: str) -> str:
        m = re.fullmatch(r"\[\s*(.+?)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if not m:
            raise Refusal(f"address `{operand}` is not modelled")
        base = self.value(m[1], "b64")
        return f"({base} + ({int(m[2], 0)}))" if m[2] else base

    def target(self, name: str) -> str:
        for scope in self.now.scope.walk():
            if name in scope.labels:
                return scope.labels[name]
        raise Refusal(f"unknown label `{name}`")

    # ---- the result
    def code(self) -> str:
        frame = sum(int(t[1:]) // 8 if t != "bool" else 1 for t in self.registers.values()) + self.local_bytes
        if frame > MAX_FRAME:
            raise Refusal(f"kernel {self.entry.name}: {frame} bytes of registers and locals, a thread has {MAX_FRAME}")
        out = [f"static void body_{self.entry.name}(Thread& T) {{"]
        out += [f"    {type} {name} = 0;" for name, type in self.registers.items()]
        if self.local_bytes:
            out.append(f"    alignas(16) u8 local_memory[{self.local_bytes}];")
            out.append("    memset(local_memory, 0xFF, sizeof local_memory);")
        out.append(f"    T.local = {'local_memory' if self.local_bytes else 'nullptr'};")
        out.append(f"    T.local_bytes = {self.local_bytes};")
        return "\n".join([*out, *self.lines, "}\n"])
