"""cuda.sm120's kernels with one planted bug each; as cuda_mutants.py."""

from __future__ import annotations

from cuda_mutants import HEADERS as COMMON
from cuda_mutants import WRONG
from cuda_on_cpu import CSRC

INSTANCES = {  # as cuda_mutants.py
    "quantize_sm120_activations": ("cuda.sm120", "QuantizeBlocks", "quantize_blocks(p)"),
    "gemm_sm120_mxf4": ("cuda.sm120", "GemmSm120", "gemm_sm120_block<Mxf4>(p)"),
    "gemm_sm120_nvf4": ("cuda.sm120", "GemmSm120", "gemm_sm120_block<Nvf4>(p)"),
}
QUANTIZE, MXF4, NVF4 = INSTANCES
SELECTORS = '"n"(byte % 4), "n"(thread_a), "n"(thread_b))'
MUTANTS = [
    (MXF4, "gemm_sm120.h", "waits for one group too few", "<sm120_stages - 2>", "<sm120_stages - 1>", "MissingWait"),
    (MXF4, "gemm_sm120.h", "sums leave while copies arrive", "    wait_for_copies<0>();\n", "", "MissingWait Race"),
    (MXF4, "gemm_sm120.h", "no commit", "end_of_copies();", "", "MissingWait Uninitialised"),
    (MXF4, "gemm_sm120.h", "a stage too many", "% sm120_stages *", "% (sm120_stages + 1) *", "OutOfBounds"),
    (MXF4, "gemm_sm120.h", "activations before they are written", "    wait_for_previous_kernel();\n", "", "MissingWait"),
    (MXF4, "gemm_sm120.h", "the edge of rows is not tested", "step < end && row < p.rows", "step < end", "OutOfBounds Uninitialised"),
    (MXF4, "gemm_sm120.h", "the edge of strips is not tested", "step < end && strip < p.strips", "step < end", "OutOfBounds MissingWait"),
    (MXF4, "gemm_sm120.h", "the end of k is not tested", "step < end && strip < p.strips", "strip < p.strips", "OutOfBounds MissingWait Race"),
    (MXF4, "gemm_sm120.h", "splits of k overlap", "(blockIdx.z + 1) / gridDim.z", "(blockIdx.z + 2) / gridDim.z", f"{WRONG} OutOfBounds"),
    (MXF4, "gemm_sm120.h", "all warps multiply one strip", "const int strip = warp * T::strips;", "const int strip = 0;", WRONG),
    (MXF4, "gemm_sm120.h", "x of another lane", "(8 * (i0 + i) + g) * 4 + t]", "(8 * (i0 + i) + g) * 4 + (t ^ 1)]", WRONG),
    (MXF4, "gemm_sm120.h", "inputs of a step's first half twice", "a[1], x[thread_b].z, x[thread_b].w", "a[0], x[thread_b].x, x[thread_b].y", WRONG),
    (MXF4, "gemm_sm120.h", "weight scales of g and g + 8 swapped", "g + t % 2 * 8", "g + 8 - t % 2 * 8", WRONG),
    (MXF4, "gemm_sm120.h", "weight scales of the other strip", "(strip + t / 2)", "(strip + 1 - t / 2)", WRONG),
    (MXF4, "gemm_sm120.h", "weight scales of the first step", "p.steps + step) * pieces", "p.steps) * pieces", WRONG),
    (MXF4, "gemm_sm120.h", "both strips take one thread's scales", "multiply_four<Kind, 1, 0, 1, 2, 3>", "multiply_four<Kind, 0, 0, 1, 2, 3>", WRONG),
    (MXF4, "gemm_sm120.h", "row scales in another order", "(8 * (i0 + t) + g) * T::scale_bytes", "(8 * (i0 + 3 - t) + g) * T::scale_bytes", WRONG),
    (MXF4, "gemm_sm120.h", "row scales of the first step", "p.steps + step) * T::scale_bytes", "p.steps) * T::scale_bytes", WRONG),
    (MXF4, "gemm_sm120.h", "row scales of another row", "+ threadIdx.x * T::scale_bytes,", "+ (threadIdx.x ^ 1) * T::scale_bytes,", WRONG),
    (MXF4, "device_sm120.h", "rows take one thread's scales", SELECTORS, SELECTORS.replace("thread_b", "0"), WRONG),
    (MXF4, "device_sm120.h", "both halves take the first's scales", '"ue8m0", 2 * half)', '"ue8m0", 0)', WRONG),
    (MXF4, "device_sm120.h", "halves of x swapped", '"r"(b0), "r"(b1)', '"r"(b1), "r"(b0)', WRONG),
    (MXF4, "device_sm120.h", "outputs g and g + 8 swapped", '"r"(a.x), "r"(a.y)', '"r"(a.y), "r"(a.x)', WRONG),
    (MXF4, "device_sm120.h", "scales of the sides swapped", "%10, {%12, %13}, %11, {%12, %14}", "%11, {%12, %13}, %10, {%12, %14}", WRONG),
    (MXF4, "epilogue.h", "the row scale of another output", "out.row_scale[o]", "out.row_scale[0]", WRONG),
    (NVF4, "epilogue.h", "the scale of another token", "out.x_scale[token]", "out.x_scale[token ? token - 1 : 0]", WRONG),
    (NVF4, "device_sm120.h", "both halves take the first's scales", '"ue4m3", 4 * half)', '"ue4m3", 0)', WRONG),
    (NVF4, "gemm_sm120.h", "one word of scales twice", "(from)[w]", "(from)[0]", WRONG),
    (NVF4, "gemm_sm120.h", "scales of another strip", "const int strip = strip0 + threadIdx.x / pieces,", "const int strip = strip0 + threadIdx.x % pieces,", WRONG),
    (QUANTIZE, "quantize_sm120.h", "block scales below E4M3's least", "fmaxf(scale, power_of_two(-9))", "scale", WRONG),
    (QUANTIZE, "quantize_sm120.h", "exponents below E8M0's least", "max(exponent, 0)", "exponent", WRONG),
    (QUANTIZE, "quantize_sm120.h", "nibbles swapped", "(4 * (i % 8))", "(4 * (i % 8 ^ 1))", WRONG),
    (QUANTIZE, "quantize_sm120.h", "signs in the place of an exponent", ">> 31 << 3", ">> 31 << 2", WRONG),
    (QUANTIZE, "quantize_sm120.h", "words in the order of inputs", "to[word % 4 * 4 + word / 4] = words[0]", "to[word] = words[0]", f"{WRONG} Race"),
    (QUANTIZE, "quantize_sm120.h", "blocks of 16 with scales for 32", "if (p.kind == ScaleKind::e8m0) largest = max(largest, from_lane_xor(largest, 1));", "", WRONG),
    (QUANTIZE, "quantize_sm120.h", "both lanes of a block store its scale", "if (k0 % block == 0) p.scales", "p.scales", "Race"),
    (QUANTIZE, "quantize_sm120.h", "codes past the row", "        if (!inside) continue;\n", "", "OutOfBounds Race"),
    (QUANTIZE, "quantize_sm120.h", "the shift of the first block", "q.shift[k0 / shift_block]", "q.shift[0]", WRONG),
    (QUANTIZE, "quantize_sm120.h", "scales that rise with shifts", "2 + q.shift_top - shift", "2 + shift", WRONG),
    (QUANTIZE, "quantize_sm120.h", "places without an input read one", "if (channel >= 0)", "if (true)", "OutOfBounds"),
    (QUANTIZE, "quantize_sm120.h", "inputs in their order", "if (!p.channel) return", "if (true) return", WRONG),
    (QUANTIZE, "quantize_sm120.h", "powers of two are rounded down", "+ (1u << 21)", "", WRONG),
    (QUANTIZE, "quantize_sm120.h", "scales without the token's", "divide(divide(largest, p.q.top), x_scale)", "divide(largest, p.q.top)", WRONG),
    (QUANTIZE, "quantize_sm120.h", "integer groups without their factor", "mul(4.0f, factor)", "4.0f", WRONG),
    (QUANTIZE, "quantize_sm120.h", "a bad token is zeros", "special ? float_of(0x7fc00000u) : mul", "mul", WRONG),
]  # fmt: skip
HEADERS = [p for p in COMMON if p.name not in ("gemv.h", "decode_shift.h")]
for after, name in (("linear.h", "linear_sm120.h"), ("device.h", "device_sm120.h")):
    HEADERS.insert(HEADERS.index(CSRC / "cuda" / after) + 1, CSRC / "cuda" / name)
HEADERS += [CSRC / "cuda/gemm_sm120.h", CSRC / "cuda/quantize_sm120.h"]
OF = {"mutants": MUTANTS, "instances": INSTANCES, "headers": HEADERS}
