"""PTX text → modules of kernels of statements. What cannot be read is refused with its line."""

from __future__ import annotations

import re

from .program import SIZES, Array, Entry, Label, Module, Param, Refusal, Scope, Statement


def without_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


BRACKET = re.compile(r"[{}\[\]()]")
BRACE = re.compile(r"[{}]")


def split(text: str, separator: str = ",") -> list[str]:
    """At separators outside brackets."""
    if not BRACKET.search(text):
        return [part.strip() for part in text.split(separator)] if text.strip() else []
    parts, depth, current = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == separator and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += c
    return [*parts, current.strip()] if current.strip() else parts


def closing(text: str, start: int) -> int:
    """The index of the brace that closes the one at start."""
    depth = 0
    for brace in BRACE.finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise Refusal("unbalanced braces")


ARRAY = re.compile(
    r"\.(shared|local|global|const)\s+(?:\.attribute\S*\s+)?(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?"
    r"(?:\s*=\s*(.*))?$",
    re.S,
)
PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+)?(?:\.(?:global|shared|const|local)\s+)?(?:\.align\s+\d+\s+)?"
    r"([\w$]+)(?:\[(\d+)\])?$"
)


def read_array(text: str, line: int) -> tuple[str, Array]:
    m = ARRAY.match(text)
    if not m or m[3] not in SIZES:
        raise Refusal(f"PTX line {line}: declaration `{text[:100]}` is not modelled")
    return m[1], Array(m[4], m[3], int(m[2] or SIZES[m[3]]), int(m[5] or 1), m[6])


def read_params(text: str, line: int) -> list[Param]:
    params, offset = [], 0
    for part in split(text):
        m = PARAM.match(part)
        if not m:
            raise Refusal(f"PTX line {line}: parameter `{part[:100]}` is not modelled")
        size = SIZES[m[2]]
        align = int(m[1] or size)
        offset = -(-offset // align) * align
        params.append(Param(m[3], offset, size * int(m[4] or 1)))
        offset += params[-1].bytes
    return params


TOKEN = re.compile(
    r"\s*(?:(?P<brace>[{}])|\.loc\s+\d+\s+(?P<line>\d+)[^\n]*|\.(?:loc|file)\b[^\n]*"
    r"|(?P<table>[A-Za-z_$][\w$]*):\s*\.branchtargets\s+(?P<labels>[^;]*);|(?P<label>[A-Za-z_$][\w$]*):(?!:)"
    r"|(?P<statement>[^\s;{}][^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)"
)
STATEMENT = re.compile(r"(?:@(!?\s*[%\w$]+)\s+)?([\w.:]+)\s*(.*)$")


class Body:
    """The statements between the braces of one kernel."""

    def __init__(self, entry: Entry, text: str, line: int):
        self.entry, self.line, self.source_line = entry, line, 0
        self.scope, self.scopes, at = Scope(0, None), 0, 0
        end = len(text.rstrip())
        while at < end:
            token = TOKEN.match(text, at)
            if token is None:
                raise Refusal(f"kernel {entry.name}, PTX line {self.line}: cannot read `{text[at : at + 100].strip()}`")
            begin = token.start(token.lastgroup) if token.lastgroup else token.end()
            self.line += text.count("\n", at, begin)
            self.read(token)
            self.line += text.count("\n", begin, token.end())
            at = token.end()

    def read(self, token: re.Match) -> None:
        kind = token.lastgroup
        if kind == "statement":
            self.declaration_or_statement(" ".join(token["statement"].split()))
        elif kind == "line":
            self.source_line = int(token["line"])
        elif kind == "label":
            name = token["label"]
            self.scope.labels[name] = f"{name}_{self.scope.number}"
            self.entry.items.append(Label(self.scope.labels[name]))
        elif kind == "labels":
            self.scope.tables[token["table"]] = split(token["labels"])
        elif token["brace"] == "{":
            self.scopes += 1
            self.scope = Scope(self.scopes, self.scope)
        elif token["brace"] == "}":
            self.scope = self.scope.parent

    def declaration_or_statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self.registers(text)
        elif text.startswith((".local", ".shared")):
            space, array = read_array(text, self.line)
            if space == "local":
                self.entry.locals.append(array)
            else:
                self.entry.shared[array.name] = array
        elif not text.startswith(".pragma"):
            self.statement(text)

    def registers(self, text: str) -> None:
        m = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text)
        if m[1] not in SIZES or m[1] == "b128":
            raise Refusal(f"PTX line {self.line}: registers of type .{m[1]} are not modelled")
        for name in split(m[2]):
            many = re.match(r"(%?[\w$]+)<\d+>$", name)
            if many:
                self.scope.ranges[many[1]] = m[1]
            else:
                unique = f"{re.sub(r'[^0-9A-Za-z_]', '_', name)}_s{self.scope.number}"
                self.scope.registers[name] = unique, m[1]

    def statement(self, text: str) -> None:
        m = STATEMENT.match(text)
        if not m:
            raise Refusal(f"kernel {self.entry.name}, PTX line {self.line}: cannot read `{text[:100]}`")
        bare = text[m.start(2) :]
        statement = Statement(self.line, self.source_line, bare, m[1], m[2], split(m[3]), self.scope)
        self.entry.items.append(statement)


ENTRY = re.compile(r"(?:\.visible\s+|\.weak\s+)?\.entry\s+([\w$]+)\s*\(([^)]*)\)\s*([^{]*)\{")


def read_entry(module: Module, text: str, m, line: int) -> int:
    bound = re.search(r"\.(?:reqntid|maxntid)\s+([\d,\s]+)", m[3])
    threads = 1
    for n in re.findall(r"\d+", bound[1]) if bound else ["1024"]:
        threads *= int(n)
    if ".explicitcluster" in m[3] or ".reqnctapercluster" in m[3]:
        raise Refusal(f"kernel {m[1]}, PTX line {line}: clusters are not modelled")
    entry = Entry(m[1], line, read_params(m[2], line), min(threads, 1024))
    end = closing(text, m.end() - 1)
    Body(entry, text[m.end() : end], line + text.count("\n", m.start(), m.end()))
    module.entries.append(entry)
    return end + 1


def read_module(text: str) -> Module:
    text = without_comments(text)
    target = re.search(r"\.target\s+([\w.]+)", text)
    if not target:
        raise Refusal("this text has no .target, so it is not PTX")
    module, at = Module(target[1]), 0
    while m := re.compile(r"\s*(?=\S)").match(text, at):
        at = m.end()
        line = text.count("\n", 0, at) + 1
        if m := ENTRY.match(text, at):
            at = read_entry(module, text, m, line)
        elif m := re.compile(r"\.section\s+[\w.]+\s*\{|(?:\.\w+\s+)*\.func\b[^;{]*[;{]").match(text, at):
            # A device function is read over; a call of it is refused where it stands.
            at = closing(text, m.end() - 1) + 1 if m[0].endswith("{") else m.end()
        elif m := re.compile(r"\.(?:version|target|address_size|file)\b[^\n]*").match(text, at):
            at = m.end()
        elif m := re.compile(r"[^;]*;").match(text, at):
            read_variable(module, " ".join(m[0][:-1].split()), line)
            at = m.end()
        else:
            raise Refusal(f"PTX line {line}: cannot read `{text[at : at + 60]}`")
    return module


def read_variable(module: Module, text: str, line: int) -> None:
    outside = text.startswith(".extern")
    space, array = read_array(re.sub(r"^(?:\.(?:visible|extern|weak|common)\s+)*", "", text), line)
    if space == "shared" and outside:
        module.dynamic[array.name] = array.align
    elif space == "shared":
        module.shared[array.name] = array
    else:
        module.variables[array.name] = space, array
