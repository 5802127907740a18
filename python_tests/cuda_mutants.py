"""The CUDA kernels with one planted bug each, and what must be found: (kernel, file, what is wrong, old, new, faults)."""

from __future__ import annotations

import re

from cuda_on_cpu import CSRC, headers_key
from mutants import WRONG
from ptx import build

INSTANCES = {  # name of the launch → the registry row that launches it, its parameters and body
    "quantize_activations": ("cuda.gemv", "Quantize", "quantize_token(p)"),
    "gemv_int8_8": ("cuda.gemv", "Gemv<Int8>", "gemv_block<Int8, false, 1>(p)"),
    "gemm_sm80_int8_64x32": ("cuda.sm80", "Gemm<Int8>", "gemm_block<Int8, false, 1, 4>(p)"),
    "gemm_sm80_f16_grouped_64x32": ("cuda.sm80", "Gemm<Halves<F16>>", "gemm_block<Halves<F16>, true, 1, 4>(p)"),
    "gemv_int8_shifted_8": ("cuda.gemv-weight-shift", "Gemv<ShiftedInt8>", "gemv_block<ShiftedInt8, false, 1>(p)"),
    "gemm_sm80_int8_shifted_64x32": (
        "cuda.sm80-weight-shift",
        "Gemm<ShiftedInt8>",
        "gemm_block<ShiftedInt8, false, 1, 4>(p)",
    ),
    "gemm_sm80_bf16_shifted_64x32": (
        "cuda.sm80-weight-shift",
        "Gemm<ShiftedBf16>",
        "gemm_block<ShiftedBf16, false, 1, 4>(p)",
    ),
    "gemm_sm80_int8_packed_64x32": ("cuda.sm80-packed", "Gemm<PackedInt8>", "gemm_block<PackedInt8, false, 1, 4>(p)"),
    "gemm_sm80_int8_grouped_64x32": ("cuda.sm80", "Gemm<GroupedInt8>", "gemm_block<GroupedInt8, true, 1, 4>(p)"),
    "split_activations": ("cuda.gemv", "Split", "split_token(p)"),
}
QUANTIZE, GEMV, GEMM, GROUPED, GEMV_SHIFTED, SHIFTED, BF16_SHIFTED, PACKED, INT8_GROUPED, SPLIT = INSTANCES
LOWER_PART = "            if (is_finite(rest) && !is_finite(widen(part, Dtype::bf16))) --part;\n"
STORE_PART = "            part_of(plane) = part;\n"
MUTANTS = [
    (GEMM, "gemm_sm80.h", "waits for one group too few", "<gemm_stages - 2>", "<gemm_stages - 1>", "MissingWait"),
    (GEMM, "gemm_sm80.h", "sums leave while copies arrive", "    wait_for_copies<0>();\n", "", "MissingWait Race"),
    (GEMM, "gemm_sm80.h", "no commit", "end_of_copies();", "", "MissingWait Uninitialised"),
    (GEMM, "gemm_sm80.h", "a stage too many", "% gemm_stages *", "% (gemm_stages + 1) *", "OutOfBounds"),
    (GEMM, "gemm_sm80.h", "x of the next row", "p.x + (row0 + r)", "p.x + (row0 + r + 1)", "OutOfBounds Uninitialised"),
    (GEMM, "gemm_sm80.h", "the edge of rows is not tested", "row0 + r < p.rows && ", "", "OutOfBounds Uninitialised"),
    (GEMM, "gemm_sm80.h", "the edge of strips is not tested", "unit < end && strip < p.strips", "unit < end", "OutOfBounds"),
    (GEMM, "gemm_sm80.h", "the end of k is not tested", "unit < end && strip < p.strips", "strip < p.strips", "OutOfBounds"),
    (GEMM, "gemm_sm80.h", "no barrier before sums leave", "        block_barrier();\n        const Tile", "        const Tile", "Race Uninitialised"),
    (GEMM, "gemm_sm80.h", "tokens of an accumulator swapped", "2 * t + e % 2", "2 * t + 1 - e % 2", WRONG),
    (GEMM, "gemm_sm80.h", "outputs g and g + 8 swapped", "g + e / 2 * 8", "g + 8 - e / 2 * 8", WRONG),
    (GEMM, "gemm_sm80.h", "x of the row after", "piece_at(8 * i + g,", "piece_at(8 * i + g + 1,", f"{WRONG} MissingWait Uninitialised"),
    (GEMM, "gemm_sm80.h", "all warps multiply one strip", "weights_of(stage, warp * strips)", "weights_of(stage, 0)", WRONG),
    (GEMM, "gemm_sm80.h", "splits of k overlap", "(blockIdx.z + 1) / gridDim.z", "(blockIdx.z + 2) / gridDim.z", f"{WRONG} OutOfBounds"),
    (GEMM, "gemm_sm80.h", "tiles share a counter", "out.arrived + blockIdx.y * gridDim.x + blockIdx.x", "out.arrived", "Uninitialised Race wrong values"),
    (GEMM, "epilogue.h", "the edge of tokens is not tested", "token >= out.m || ", "", "OutOfBounds"),
    (GEMM, "epilogue.h", "the edge of outputs is not tested", " || tile.out0 + o >= out.n", "", "OutOfBounds Race"),
    (GEMM, "epilogue.h", "bias and scale of another output", "token, tile.out0 + o);", "token, o);", WRONG),
    (GEMM, "epilogue.h", "the up of another gate", "(out, sum + 8,", "(out, sum + 7,", WRONG),
    (GEMM, "epilogue.h", "bias and scale of the gate for its up", "token, tile.out0 + o + 8)", "token, tile.out0 + o)", WRONG),
    (GEMM, "epilogue.h", "gates side by side", "column / 8 * 16 + column % 8", "column", WRONG),
    (GEMM, "epilogue.h", "gates and ups have columns of their own", "return gated ? n / 2 : n;", "return n;", f"{WRONG} OutOfBounds"),
    (GEMM, "epilogue.h", "tiles of gates overlap", "(gated ? tile.out0 / 2 : tile.out0) + column", "tile.out0 + column", f"{WRONG} OutOfBounds Race"),
    (GEMM, "epilogue.h", "the gate of a growing exponential", "exponential(-x)", "exponential(x)", WRONG),
    (GEMM, "epilogue.h", "gates below -87 have no floor", "    x = x < -87.0f ? -87.0f : x;\n", "", WRONG),
    (GEMM, "epilogue.h", "exponents beyond fp32", "    x = fminf(fmaxf(x, -87.0f), 87.0f);\n", "", WRONG),
    (GEMM, "epilogue.h", "a power of two too many", "power_of_two(truncate(n))", "power_of_two(truncate(n) + 1)", WRONG),
    (GEMM, "epilogue.h", "the residual of another row", "load_wide(out.residual, out.dtype, at)", "load_wide(out.residual, out.dtype, column)", WRONG),
    (GEMM, "epilogue.h", "the residual is forgotten", "if (out.residual) v", "if (false) v", WRONG),
    (GEMM, "device.h", "the residual in other bits", "return dtype == Dtype::f32 ? static_cast<const float*>(from)[at]", "return true ? static_cast<const float*>(from)[at]", f"{WRONG} OutOfBounds Misaligned"),
    (GEMM, "epilogue.h", "splits keep sums in one place", "(size_t(split) * out.planes * out.m + row)", "size_t(row)", f"{WRONG} Race"),
    (GEMM, "epilogue.h", "the first split counts twice", "int split = 1; split < out.splits", "int split = 0; split < out.splits", WRONG),
    (GEMM, "epilogue.h", "the last split is forgotten", "split < out.splits;", "split < out.splits - 1;", WRONG),
    (GEMM, "epilogue.h", "no barrier after adding splits", "    block_barrier();\n    finish", "    finish", "Race"),
    (GEMM, "epilogue.h", "planes have one weight", "int64_t(plane_weight) * sum", "int64_t(1) * sum", WRONG),
    (GEMM, "epilogue.h", "the scale of another token", "out.x_scale[token]", "out.x_scale[token ? token - 1 : 0]", WRONG),
    (GEMM, "device.h", "no fence before the counter", "        __threadfence();\n        *flag", "        *flag", "Race"),
    (GEMM, "device.h", "no fence after the counter", "== count - 1;\n        __threadfence();", "== count - 1;", "Race"),
    (GEMM, "device.h", "the counter is no atomic", "atomicInc(counter, count - 1)", "(*counter)++", "Race"),
    (GEMM, "device.h", "no barrier before the counter", "    Team::barrier();\n    if (threadIdx.x == 0) {", "    if (threadIdx.x == 0) {", "Race"),
    (GEMM, "device.h", "no barrier after the counter", "    }\n    Team::barrier();\n    return *flag", "    }\n    return *flag", "Race Uninitialised"),
    (GEMM, "device.h", "operands of a product swapped", '"r"(b0), "r"(b1)', '"r"(b1), "r"(b0)', WRONG),
    (GEMM, "device.h", "signs of other codes", "0xba98", "0xab98", WRONG),
    (GEMM, "device.h", "a block waits for its own copies only", '::"n"(left) : "memory");\n    __syncthreads();', '::"n"(left) : "memory");', "MissingWait Race Uninitialised"),
    (GEMM, "decode.h", "signs of outputs g for g + 8", "sign_masks(word << 4)", "sign_masks(word)", WRONG),
    (GEMM, "decode.h", "magnitudes of other outputs", "upper = magnitudes >> 16", "upper = magnitudes >> 12", WRONG),
    (GROUPED, "decode.h", "scales of g and g + 8 swapped", "i % 2 ? high : low", "i % 2 ? low : high", WRONG),
    (GROUPED, "decode.h", "one scale for four groups", "((4 * unit + t) >> p.group_shift)", "((4 * unit) >> p.group_shift)", WRONG),
    (GROUPED, "decode.h", "a pair of weights swapped", "0x3424", "0x2434", WRONG),
    (GROUPED, "gemm_sm80.h", "scales of another strip", "strip0 + threadIdx.x / 4;", "strip0 + threadIdx.x % 4;", WRONG),
    (GROUPED, "gemm_sm80.h", "pieces of x are read as they were not written", "+ g, Operand::vectors * t + v", "+ g, (Operand::vectors * t + v) ^ 1", WRONG),
    (GEMV, "gemv.h", "codes beyond the slice", "const bool inside = unit < share.end;", "const bool inside = true;", f"{WRONG} OutOfBounds"),
    (GEMV, "gemv.h", "the edge of rows is not tested", "row < p.rows && ", "", "OutOfBounds Uninitialised"),
    (GEMV, "gemv.h", "the edge of strips is not tested", "if (strip >= strips) end = begin;", "", "OutOfBounds"),
    (GEMV, "gemv.h", "no barrier before slices are added", "    block_barrier();\n    for", "    for", "Race Uninitialised"),
    (GEMV, "gemv.h", "no barrier after slices are added", "    }\n    block_barrier();\n    const Tile", "    }\n    const Tile", "Race"),
    (GEMV, "gemv.h", "slices of other strips are added", "slice < gemv_warps / warps_n", "slice < gemv_warps", "OutOfBounds Uninitialised wrong values"),
    (GEMV, "gemv.h", "activations a unit late", "weights.multiply(acc[j], x[i % 2][j])", "weights.multiply(acc[j], x[(i + 1) % 2][j])", WRONG),
    (GEMV, "gemv.h", "a misaligned stream", "+ lane;\n", "+ lane + 1;\n", f"{WRONG} OutOfBounds"),
    (QUANTIZE, "quantize.h", "no barrier in the largest value", "    block_barrier();\n    uint32_t largest = 0;", "    uint32_t largest = 0;", "Race Uninitialised"),
    (QUANTIZE, "quantize.h", "a vector past the row", "k0 + chunk_k <= q.k &&", "k0 <= q.k &&", "OutOfBounds"),
    (QUANTIZE, "quantize.h", "the vector's alignment is not tested", "(from) % 16 == 0", "(from) % 2 == 0", "Misaligned"),
    (QUANTIZE, "quantize.h", "inputs past the row", "if (k0 + i < q.k)", "if (true)", "OutOfBounds wrong values"),
    (QUANTIZE, "quantize.h", "lanes of a group do not meet", "lanes < q.group_size / chunk_k", "lanes < 1", WRONG),
    (QUANTIZE, "quantize.h", "a shuffle in part of a warp", "quantize_best(q, v);", "if (k0 < q.padded_k) quantize_best(q, v);", "DivergentWarp"),
    (QUANTIZE, "quantize.h", "threads beyond k keep what they had", "                if (k0 >= q.padded_k)\n#pragma unroll\n                    for (int i = 0; i < chunk_k; ++i) v[i] = 0;\n", "", WRONG),
    (QUANTIZE, "store.h", "planes of two tokens meet", "token * q.planes + 1", "token + 1", "Race wrong values"),
    (QUANTIZE, "quantize.h", "integers past the row", "if (k0 < q.padded_k) {\n            if (special)", "{\n            if (special)", "OutOfBounds Race"),
    (QUANTIZE, "quantize.h", "shifts of other inputs", "(8 * (i % 4)) & 0xffu", "(8 * (3 - i % 4)) & 0xffu", WRONG),
    (QUANTIZE, "store.h", "words stay in the order of rows", "if (q.form == Form::integers) {", "if (true) {", WRONG),
    (QUANTIZE, "store.h", "words of two groups swapped", "words[4] = bytes.y, words[8]", "words[8] = bytes.y, words[4]", WRONG),
    (QUANTIZE, "store.h", "signs of the other four codes", "(half ? 3 : 7)", "(half ? 7 : 3)", WRONG),
    (QUANTIZE, "store.h", "codes a binade too low", "mantissa_shift) + one;", "mantissa_shift);", WRONG),
    (QUANTIZE, "store.h", "codes take a byte each", "q.padded_k + k0) / 2)", "q.padded_k + k0))", "OutOfBounds Race"),
    (GEMV_SHIFTED, "gemv.h", "shifts a unit late", "ahead[i], shifts[i % 2]", "ahead[i], shifts[(i + 1) % 2]", WRONG),
    (GEMV_SHIFTED, "gemv.h", "shifts of another lane", "unit * unit_k + 16 * t);", "unit * unit_k + 16 * (t ^ 1));", WRONG),
    (GEMV_SHIFTED, "gemv.h", "shifts beyond the slice", "p.shift && unit < share.end", "p.shift", "OutOfBounds"),
    (SHIFTED, "decode_shift.h", "shifts of other inputs", "codes.y, t, shifts.y", "codes.y, t, shifts.x", WRONG),
    (SHIFTED, "decode_shift.h", "powers that fall as shifts rise", "e = t.top - shifts", "e = shifts", WRONG),
    (SHIFTED, "decode_shift.h", "four times is twice", "magnitudes + 3 * (", "magnitudes + (", WRONG),
    (SHIFTED, "decode_shift.h", "a bit of the shift is read twice", "sign_masks(e << 6)", "sign_masks(e << 7)", WRONG),
    (SHIFTED, "decode_shift.h", "negative bytes borrow", "(0x80808080u - v) ^ 0x80808080u", "0u - v", WRONG),
    (SHIFTED, "decode_shift.h", "signs of outputs g for g + 8", "sign_masks(word << 4)", "sign_masks(word)", WRONG),
    (SHIFTED, "gemm_sm80.h", "shifts of another unit", "p.shift + unit * unit_k", "p.shift + (unit + 1) * unit_k", f"{WRONG} OutOfBounds"),
    (SHIFTED, "gemm_sm80.h", "shifts of another lane", "(stage + T::shift_at)[t]", "(stage + T::shift_at)[g % 4]", WRONG),
    (SHIFTED, "gemm_sm80.h", "shifts and x in one place", "return shift_at + shift_bytes + row", "return shift_at + row", f"{WRONG} Race MissingWait"),
    (SHIFTED, "gemm_sm80.h", "the end of k is not tested", "unit < end && p.shift;", "p.shift != nullptr;", "OutOfBounds"),
    (BF16_SHIFTED, "decode_shift.h", "powers of a pair swapped", "i < 2 ? 0x4140 : 0x4342", "i < 2 ? 0x4041 : 0x4342", WRONG),
    (BF16_SHIFTED, "decode_shift.h", "powers of the pair before", "i < 2 ? 0x4140 : 0x4342", "0x4140", WRONG),
    (BF16_SHIFTED, "decode_shift.h", "powers that rise with shifts", "0x3f803f80u - (", "0x3f803f80u + (", WRONG),
    (PACKED, "decode_shift.h", "words of a row swapped", "Int8::decode(words.x, t.inputs, x.x, x.y)", "Int8::decode(words.x, t.inputs, x.y, x.x)", WRONG),
    (PACKED, "gemm_sm80.h", "codes of another lane", "piece_at(8 * i + g, 0))[t]", "piece_at(8 * i + g, 0))[t ^ 1]", WRONG),
    (PACKED, "gemm_sm80.h", "rows past the tile", "if (r >= T::rows) break;", "", f"{WRONG} OutOfBounds Race MissingWait"),
    (INT8_GROUPED, "decode_grouped.h", "lanes keep their group", "weights(transposed(codes), t.codes)", "weights(codes, t.codes)", WRONG),
    (INT8_GROUPED, "decode_grouped.h", "words of the wrong neighbour", "(upper ? w0 : w2, 2)", "(upper ? w0 : w2, 1)", WRONG),
    (INT8_GROUPED, "decode_grouped.h", "scales of g and g + 8 swapped", "e / 2 ? high[j] : low[j]", "e / 2 ? low[j] : high[j]", WRONG),
    (INT8_GROUPED, "decode_grouped.h", "one scale for the quad's groups", "from_quad_lane(mine[0], j)", "from_quad_lane(mine[0], 0)", WRONG),
    (INT8_GROUPED, "decode_grouped.h", "groups of 32 are added as 64", "if (group_shift == 1) add_group(d, sum, 0);", "", WRONG),
    (INT8_GROUPED, "decode_grouped.h", "a sum goes on in the next group", "            sum[e] = start;\n", "", WRONG),
    (INT8_GROUPED, "decode_grouped.h", "a scale of other bits", "(byte & 0x7fu) << 20", "(byte & 0x7fu) << 19", WRONG),
    (INT8_GROUPED, "device.h", "half a product's operands swapped", '"r"(a0), "r"(a1), "r"(b)', '"r"(a1), "r"(a0), "r"(b)', WRONG),
    (INT8_GROUPED, "epilogue.h", "scales of tokens are left out", "if (out.x_scale) whole", "if (false) whole", WRONG),
    (SPLIT, "split.h", "parts are stored before they are lowered", LOWER_PART + STORE_PART, STORE_PART + LOWER_PART, WRONG),
    (SPLIT, "split.h", "parts beyond bf16's largest are infinite", LOWER_PART, "", WRONG),
    (SPLIT, "split.h", "every part of the whole", "sub(rest, widen(part, Dtype::bf16))", "rest", WRONG),
    (SPLIT, "split.h", "one factor for all inputs", "q.factor[i]", "q.factor[0]", WRONG),
    (SPLIT, "split.h", "parts of two tokens meet", "token * q.planes + plane", "token + plane", f"{WRONG} Race"),
]  # fmt: skip
HEADERS = [
    CSRC / name
    for name in [
        "core/element.h",
        "core/scale.h",
        "core/half.h",
        "core/layout.h",
        "core/units.h",
        "cuda/launch.h",
        "cuda/linear.h",
        "cuda/device.h",
        "cuda/blocks.h",
        "cuda/decode.h",
        "cuda/decode_grouped.h",
        "cuda/decode_shift.h",
        "cuda/epilogue.h",
        "cuda/store.h",
        "cuda/quantize.h",
        "cuda/gemv.h",
        "cuda/gemm_sm80.h",
    ]
]
ALL_HEADERS = [*HEADERS, CSRC / "cuda/split.h"]
INCLUDES = "#include <cstddef>\n#include <cstdint>\n#include <stdexcept>\n#include <string>\n"
CUDA_INCLUDES = "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n"


def mutated(file: str, old: str, new: str, headers=HEADERS) -> str:
    """All headers of a kernel as one text, with one change."""
    texts = []
    for path in headers:
        text = path.read_text()
        if path.name == file:
            if old not in text:
                raise ValueError(f"{file} has no `{old}`")
            text = text.replace(old, new)
        texts.append(re.sub(r"^#(include|pragma once).*$", "", text, flags=re.M))
    return "\n".join(texts)


def combined(numbers, mutants=MUTANTS, instances=INSTANCES, headers=ALL_HEADERS) -> str:
    """The mutants of these numbers in one file, number i's kernel called mutant_i: nvcc starts once."""
    parts = [INCLUDES, CUDA_INCLUDES]
    for i in numbers:
        kernel, file, _, old, new, _ = mutants[i]
        _, parameters, body = instances[kernel]
        # Shared memory is declared per kernel; host functions of all mutants live in namespaces of their own.
        parts.append(f"namespace n{i} {{\n{mutated(file, old, new, headers)}\n}}")
        spaces = f"using namespace n{i}::llmfp4; using namespace n{i}::llmfp4::cuda;"
        parts.append(
            f"namespace k{i} {{ {spaces}\n"
            f'extern "C" __global__ void mutant_{i}(const __grid_constant__ {parameters} p) {{ {body}; }} }}'
        )
    return "\n".join(parts)


def ptx_of(numbers, arch="sm_80", **of) -> str:
    return build.ptx(combined(numbers, **of), arch, (f"-DHEADERS={headers_key()}",), lines=False)
