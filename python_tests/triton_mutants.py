"""The Triton kernels with one planted bug each, and what must be found: (problem, file, what is wrong, old, new, faults)."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

from mutants import WRONG

import llmfp4_kernels.backends.triton as package

FOLDER = Path(package.__file__).parent
INTEGER, PLANES, SHARED_K, GROUPED, PARTS, GROUPS = "integer", "planes", "shared k", "grouped", "parts", "groups"
FP8, CANCELLING = "8-bit floats", "8-bit floats that cancel"
MUTANTS = [
    (INTEGER, "product.py", "rows past the end are read", "(rows % half)", "rows", "OutOfBounds Race"),
    (INTEGER, "product.py", "tokens past the end are read", "(tokens % m)", "tokens", "OutOfBounds"),
    (INTEGER, "product.py", "codes past the end of k", "inputs[None, :] < padded_k", "inputs[None, :] < padded_k + BLOCK_K", "OutOfBounds"),
    (INTEGER, "product.py", "inputs past the end of k", "inputs[:, None] < k, other=zero)", "inputs[:, None] < k + 64, other=zero)", "OutOfBounds"),
    (INTEGER, "product.py", "the edge of outputs is not tested", "    valid &= rows < n\n", "", "OutOfBounds Race"),
    (INTEGER, "product.py", "both nibbles are one output", "    rows += half\n", "", "Race unwritten"),
    (INTEGER, "product.py", "rows of the next half are stored", "valid = rows < half", "valid = rows < n", f"Race {WRONG}"),
    (INTEGER, "product.py", "halves of outputs swapped", "low = tl.dot(w_low", "low = tl.dot(w_high", WRONG),
    (INTEGER, "decode.py", "the nibbles of other bytes", 'nibbles="0x6420"', 'nibbles="0x7531"', WRONG),
    (INTEGER, "decode.py", "signs select the other table", "positive, 0xca", "positive, 0xac", WRONG),
    (INTEGER, "decode.py", "the sign of the other nibble", "shift=4", "shift=0", WRONG),
    (INTEGER, "operands.py", "inputs past the row", "at < k, other=0).to(tl.float32)", "at < k + 64, other=0).to(tl.float32)", "OutOfBounds"),
    (INTEGER, "operands.py", "the shift is applied twice", "shift_top - exponent", "shift_top + exponent", WRONG),
    (PLANES, "product.py", "planes have one weight", "tl.constexpr(128)", "tl.constexpr(1)", WRONG),
    (PLANES, "operands.py", "planes of two tokens meet", "row + tl.cast(m, tl.int64) * padded_k + at, high", "row + padded_k + at, high", "Race unwritten"),
    (SHARED_K, "product.py", "splits of k overlap", "(split + 1)", "(split + 2)", WRONG),
    (SHARED_K, "product.py", "splits keep sums in one place", "split.to(tl.int64) * PLANES", "0 * PLANES", "Race unwritten"),
    (SHARED_K, "product.py", "the last split is forgotten", "range(splits)", "range(splits - 1)", WRONG),
    (GROUPED, "product.py", "scales of the other output", "rows + half, group", "rows, group", WRONG),
    (GROUPED, "product.py", "a group a step", "step * BLOCK_K // GROUP", "step * COUNT", WRONG),
    (GROUPED, "decode.py", "bytes of a bf16 swapped", "low, high, 0x5140", "low, high, 0x1504", WRONG),
    (PARTS, "operands.py", "the rest of a part is all of it", "rest - whole)", "rest)", WRONG),
    (GROUPS, "operands.py", "the worse factor is taken", "gain[:, None] > 0", "gain[:, None] < 0", WRONG),
    (FP8, "decode.py", "zeros lose a group's exponent, too", "and.b32 b, b, $2;", "mov.b32 b, $2;", WRONG),
    (FP8, "decode.py", "scales raise exponents", "sub.u32 a, a, b;", "add.u32 a, a, b;", WRONG),
    (FP8, "decode.py", "a float's sign is lost", "a, signs, 0x80808080", "a, signs, 0x80800080", WRONG),
    (FP8, "product.py", "both outputs have one scale", "decode(bytes, s_low, s_high", "decode(bytes, s_low, s_low", WRONG),
    (FP8, "product.py", "a step forgets those before", "high += tl.dot", "high = tl.dot", WRONG),
    (FP8, "operands.py", "floats are twice as large", "7.52316384526264e-37", "1.504632769052528e-36", WRONG),
    (CANCELLING, "product.py", "sums stay in the tensor core", "acc=BLOCK_K", "acc=0", WRONG),
]  # fmt: skip


def mutant(i: int, folder: Path):
    """The module of mutant i's file, with its bug; everything that it imports is the package's."""
    _, file, _, old, new, _ = MUTANTS[i]
    text = (FOLDER / file).read_text()
    if text.count(old) == 0:
        raise ValueError(f"{file} has no `{old}`")
    text = text.replace(old, new)
    text = re.sub(r"from \.(?=\w)", f"from {package.__name__}.", text)
    text = re.sub(r"from \.\.\.(?=\w)", "from llmfp4_kernels.", text)
    path = folder / f"mutant_{i}.py"
    path.write_text(text)
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module  # where dataclasses look
    specification.loader.exec_module(module)
    return module
