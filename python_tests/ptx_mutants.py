"""Kernels with one planted bug each and its fault: (kernel, what is wrong, old text, new text, fault)."""

from __future__ import annotations

import re
from pathlib import Path

KERNELS = Path(__file__).parent / "ptx" / "test_kernels"

SYNC_TREE = "        if (t < half) tree[t] += tree[t + half];\n        __syncthreads();"
MUTANTS = [
    (
        "gemm",
        "no barrier before the products",
        "        __syncthreads();\n#pragma unroll 1\n        for (int half",
        "#pragma unroll 1\n        for (int half",
        "MissingWait Race Uninitialised",
    ),
    (
        "gemm",
        "no barrier at the end of the loop",
        "        __syncthreads();\n    }\n    for (int q",
        "    }\n    for (int q",
        "Race MissingWait",
    ),
    ("gemm", "no wait at all", "cp.async.wait_group", "// cp.async.wait_group", "MissingWait Uninitialised"),
    ("gemm", "waits for one group too few", "cp.async.wait_group 1;", "cp.async.wait_group 2;", "MissingWait"),
    ("gemm", "the last tile is not awaited", "cp.async.wait_group 0;", "cp.async.wait_group 1;", "MissingWait"),
    ("gemm", "no commit", "cp.async.commit_group;", "// no commit", "MissingWait"),
    ("gemm", "half of each tile is not loaded", "i < TILE * 4", "i < TILE * 2", "Uninitialised"),
    ("gemm", "three stages in the memory of two", "stage ^= 1", "stage++", "OutOfBounds MissingWait Uninitialised"),
    ("gemm", "a row past the matrix", "(size_t)(row0 + row) * k", "(size_t)(row0 + row + 1) * k", "OutOfBounds"),
    ("gemm", "a misaligned source", "k0 + chunk * 16 : x", "k0 + chunk * 16 + 4 : x", "Misaligned"),
    ("gemm", "a misaligned ldmatrix", "half * 2 + lane / 16))", "half * 2 + lane / 16) + 8)", "Misaligned"),
    ("gemm", "the edge of c is not tested", "row < m && column < n", "column < n", "OutOfBounds"),
    (
        "gemm",
        "a barrier for some threads only",
        "        __syncthreads();\n#pragma",
        "        if (threadIdx.x < 100) __syncthreads();\n#pragma",
        "DivergentBarrier DivergentWarp",
    ),
    (
        "gemm",
        "rows of a fragment swapped",
        '"r"(fa[i][0]), "r"(fa[i][1])',
        '"r"(fa[i][1]), "r"(fa[i][0])',
        "wrong values",
    ),
    ("gemm", "ldmatrix lanes wrong", "lane / 8 % 2", "lane / 16 % 2", "wrong values"),
    (
        "gemm",
        "tiles stored in another order",
        "chunk ^ (row >> 1 & 3)) * 16); }",
        "chunk ^ (row >> (threadIdx.x & 1) & 3)) * 16); }",
        "wrong values Uninitialised Race MissingWait",
    ),
    ("gemm", "an endless loop", "k0 += TILE, stage", "k0 += k0 ? 0 : TILE, stage", "TimeLimit"),
    ("reduction", "no barrier in the tree", SYNC_TREE, SYNC_TREE.split("\n")[0], "Race"),
    (
        "reduction",
        "no barrier before the tree",
        "tree[t] = s;\n    __syncthreads();",
        "tree[t] = s;",
        "Race Uninitialised",
    ),
    (
        "reduction",
        "the barrier is inside the branch",
        SYNC_TREE,
        "if (t < half) { tree[t] += tree[t + half]; __syncthreads(); }",
        "DivergentBarrier Uninitialised",
    ),
    (
        "reduction",
        "threads leave before the barrier",
        "    tree[t] = s;",
        "    if (t >= n / 16) return;\n    tree[t] = s;",
        "DivergentBarrier",
    ),
    ("reduction", "one element too far", "tree[t + half];", "tree[t + half + 1];", "Race OutOfBounds Uninitialised"),
    ("reduction", "the tree is too small", "float tree[THREADS]", "float tree[THREADS - 8]", "OutOfBounds"),
    ("reduction", "a misaligned vector", "(x + i)", "(x + i + 1)", "Misaligned"),
    ("reduction", "a loop that reads past x", "i < n; i +=", "i <= n; i +=", "OutOfBounds"),
    ("reduction", "no fence before the atomic", "        __threadfence();\n        last", "        last", "Race"),
    ("reduction", "no fence after the atomic", "- 1;\n        __threadfence();", "- 1;", "Race"),
    ("reduction", "the counter is no atomic", "atomicAdd(arrived, 1)", "(*arrived)++", "Race"),
    ("reduction", "every block writes the sum", "if (last && t == 0)", "if (t == 0)", "Uninitialised Race"),
    ("reduction", "a shuffle in half a warp", "if (t < 32) {", "if (t < 16) {", "DivergentWarp DivergentBarrier"),
]


def mutated(kernel: str, old: str, new: str) -> str:
    text = (KERNELS / f"{kernel}.cu").read_text()
    if old not in text:
        raise ValueError(f"{kernel}.cu has no `{old}`")
    return text.replace(old, new)


def combined() -> str:
    """All of them in one file, kernel i named gemm_i or reduction_i: nvcc starts once."""
    parts = ["#include <cstdint>"]
    for i, (kernel, _, old, new, _) in enumerate([("gemm", "", "", "", ""), ("reduction", "", "", "", ""), *MUTANTS]):
        text = mutated(kernel, old, new) if old else (KERNELS / f"{kernel}.cu").read_text()
        text = re.sub(rf"\b{kernel}\((?=const)", f"{kernel}_{i}(", text.replace("#include <cstdint>", ""))
        parts.append(f"namespace n{i} {{\n#line 1\n{text}\n}}")
    return "\n".join(parts)
