"""cuda.sm90's kernels with one planted bug each; as cuda_mutants.py."""

from __future__ import annotations

from cuda_mutants import HEADERS as COMMON
from cuda_on_cpu import CSRC
from mutants import WRONG

INSTANCES = {  # as cuda_mutants.py
    "quantize_activations": ("cuda.sm90", "Quantize", "quantize_token(p)"),
    "gemm_sm90_int8_32": ("cuda.sm90", "GemmSm90<Int8>", "gemm_sm90_block<Int8, false, 4>(p)"),
    "gemm_sm90_int8_128": ("cuda.sm90", "GemmSm90<Int8>", "gemm_sm90_block<Int8, false, 16>(p)"),
    "split_activations": ("cuda.sm90", "Split", "split_token(p)"),
    "gemm_sm90_fp8_32": ("cuda.sm90", "GemmSm90<Fp8>", "gemm_sm90_block<Fp8, false, 4>(p)"),
    "gemm_sm90_fp8_grouped_32": ("cuda.sm90", "GemmSm90<GroupedFp8>", "gemm_sm90_block<GroupedFp8, true, 4>(p)"),
    "gemm_sm90_f16_grouped_32": ("cuda.sm90", "GemmSm90<Halves<F16>>", "gemm_sm90_block<Halves<F16>, true, 4>(p)"),
}
QUANTIZE, GEMM, WIDE, SPLIT, FP8, GROUPED_FP8, GROUPED = INSTANCES
ARRIVE = "        if (lane == 0) arrive(&share.empty[i % T::stages]);\n"
WAIT = "        wait_for_products();\n"
MUTANTS = [
    (GEMM, "gemm_sm90.h", "copies are not waited for", "        wait_for_phase(&share.full[i % T::stages], i / T::stages & 1);\n", "", "MissingWait"),
    (GEMM, "gemm_sm90.h", "full stages are waited for in the other phase", "i / T::stages & 1", "i / T::stages + 1 & 1", "MissingWait Deadlock"),
    (GEMM, "gemm_sm90.h", "x is not expected", "T::codes_bytes + T::x_bytes", "T::codes_bytes", "MissingWait Uninitialised"),
    (GEMM, "gemm_sm90.h", "more is expected than comes", "T::codes_bytes + T::x_bytes", "T::codes_bytes + 16 + T::x_bytes", "Deadlock"),
    (GEMM, "gemm_sm90.h", "stages are filled before they are empty", "        wait_for_phase(&share.empty[i % T::stages], (i / T::stages - 1) & 1);\n", "", "MissingWait Race Misuse"),
    (GEMM, "gemm_sm90.h", "empty stages are waited for in the other phase", "(i / T::stages - 1) & 1", "i / T::stages & 1", "Deadlock MissingWait Race Misuse"),
    (GEMM, "gemm_sm90.h", "seven warps empty a stage", "barrier_init(&empty[i], sm90_warps)", "barrier_init(&empty[i], sm90_warps - 1)", "Race MissingWait Misuse"),
    (GEMM, "gemm_sm90.h", "nine warps empty a stage", "barrier_init(&empty[i], sm90_warps)", "barrier_init(&empty[i], sm90_warps + 1)", "Deadlock"),
    (GEMM, "gemm_sm90.h", "a stage is empty before its products are done", WAIT + ARRIVE, ARRIVE + WAIT, "MissingWait Race"),
    (GEMM, "gemm_sm90.h", "products are not waited for", WAIT, "", "MissingWait Race"),
    (GEMM, "gemm_sm90.h", "products are not committed", "        products_commit();\n", "", "MissingWait Race"),
    (GEMM, "gemm_sm90.h", "no block barrier after the barriers are made", "    block_barrier();\n\n    Sum", "    Sum", "Misuse Race"),
    (GEMM, "gemm_sm90.h", "barriers are made by all threads", "if (threadIdx.x == 0) {\n        for", "{\n        for", "Misuse"),
    (GEMM, "gemm_sm90.h", "x is read while the kernel before writes it", "    wait_for_previous_kernel();\n", "", "MissingWait"),
    (GEMM, "gemm_sm90.h", "the edge of strips is not tested", "min(share.strip0 + lane, p.strips - 1)", "share.strip0 + lane", "OutOfBounds"),
    (GEMM, "gemm_sm90.h", "every lane copies codes", "        if (lane >= sm90_warps) return;\n", "", "OutOfBounds Deadlock Race MissingWait"),
    (GEMM, "gemm_sm90.h", "all warps multiply one strip", "stage + warp * unit_bytes)", "stage)", WRONG),
    (WIDE, "gemm_sm90.h", "x of the first rows in every block", " + size_t(share.row0 / block_rows) * T::row8_bytes", "", WRONG),
    (WIDE, "gemm_sm90.h", "units of x follow too soon", "p.rows / block_rows * size_t(T::row8_bytes)", "size_t(T::x_bytes)", WRONG),
    (GEMM, "gemm_sm90.h", "rows of x are half as far apart", "T::x_at, T::row8_bytes)", "T::x_at, T::row8_bytes / 2)", WRONG),
    (GEMM, "gemm_sm90.h", "products read the same half of a unit", "x = blocks_after(x, 2 * block_bytes);", "", WRONG),
    (GEMM, "gemm_sm90.h", "weights of the first unit", "        weights = next;\n", "", WRONG),
    (GEMM, "gemm_sm90.h", "splits of k overlap", "(blockIdx.z + 1) / gridDim.z", "(blockIdx.z + 2) / gridDim.z", f"{WRONG} OutOfBounds"),
    (GEMM, "gemm_sm90.h", "the copying warp has sums, too", "if (warp < sm90_warps) {\n            Sum", "{\n            Sum", f"{WRONG} Race OutOfBounds"),
    (GEMM, "gemm_sm90.h", "no barrier before sums leave", "    for (int batch = 0; batch < rows8 / batch8; ++batch) {\n        block_barrier();", "    for (int batch = 0; batch < rows8 / batch8; ++batch) {", "Race MissingWait"),
    (GEMM, "gemm_sm90.h", "no barrier after sums left", "        block_barrier();\n        const Tile", "        const Tile", "Race Uninitialised"),
    (GEMM, "gemm_sm90.h", "outputs g and g + 8 swapped", "e / 2 * 8] =", "8 - e / 2 * 8] =", WRONG),
    (GEMM, "gemm_sm90.h", "tokens of an accumulator swapped", "(8 * i + e % 2)", "(8 * i + 1 - e % 2)", WRONG),
    (GEMM, "gemm_sm90.h", "tiles share a counter", "out.arrived + blockIdx.y * gridDim.x + blockIdx.x", "out.arrived", f"Uninitialised Race {WRONG}"),
    (GEMM, "device_sm90.h", "blocks overlap along k", "uint64_t(128 >> 4) << 16", "uint64_t(64 >> 4) << 16", WRONG),
    (GEMM, "device_sm90.h", "strides of a descriptor swapped", "uint64_t(128 >> 4) << 16 | uint64_t(column_stride >> 4) << 32", "uint64_t(128 >> 4) << 32 | uint64_t(column_stride >> 4) << 16", WRONG),
    (GEMM, "device_sm90.h", "addresses in bytes", "uint64_t(shared_address(from) >> 4)", "uint64_t(shared_address(from))", f"OutOfBounds Uninitialised MissingWait {WRONG}"),
    (GEMM, "device_sm90.h", "operands A of a product swapped", '"r"(a[1]), "r"(a[2])', '"r"(a[2]), "r"(a[1])', WRONG),
    (GEMM, "device_sm90.h", "sums begin anew", "setp.eq.u32 add, 0, 0;", "setp.eq.u32 add, 0, 1;", WRONG),
    (GEMM, "device_sm90.h", "copies arrive nowhere", '"r"(bytes), "r"(shared_address(barrier))', '"r"(bytes), "r"(shared_address(barrier) + 8)', "Misuse Deadlock MissingWait"),
    (QUANTIZE, "blocks.h", "rows of a block are too close", "row % block_rows * 16", "row % block_rows * 8", f"{WRONG} Race"),
    (QUANTIZE, "blocks.h", "units meet", "(unit * (rows / block_rows) + row / block_rows)", "(unit + row / block_rows)", f"{WRONG} Race"),
    (QUANTIZE, "blocks.h", "lanes swapped", "k0 % unit_k / 16 * 4", "(3 - k0 % unit_k / 16) * 4", WRONG),
    (QUANTIZE, "store.h", "blocks swapped", "word[block_words] = bytes.y, word[2 * block_words] = bytes.z", "word[block_words] = bytes.z, word[2 * block_words] = bytes.y", WRONG),
    (SPLIT, "split.h", "pairs of inputs in one block", " + i % 16 / 2 * block_bytes", "", f"{WRONG} Race"),
    (SPLIT, "split.h", "inputs of a pair swapped", "[i % 2];", "[1 - i % 2];", WRONG),
    (SPLIT, "blocks.h", "rows of a block are too close", "row % block_rows * 16", "row % block_rows * 8", f"{WRONG} Race"),
    (GROUPED, "gemm_sm90.h", "scales are not expected", "(grouped ? sm90_warps * strip_scales : 0)", "0", f"MissingWait Deadlock {WRONG}"),
    (GROUPED, "gemm_sm90.h", "scales of the first unit", "scales_at(p, strip, unit, 0, 0)", "scales_at(p, strip, 0, 0, 0)", WRONG),
    (GROUPED, "gemm_sm90.h", "scales of the first strip", " + warp * T::strip_scales", "", WRONG),
    (GROUPED, "gemm_sm90.h", "one scale for four groups", "[group * 8 + lane / 4]", "[lane / 4]", WRONG),
    (GROUPED, "gemm_sm90.h", "more scales than a unit has", "64u >> min(p.group_shift, 2)", "128u >> min(p.group_shift, 2)", f"OutOfBounds MissingWait Race {WRONG}"),
    (GROUPED, "device_sm90.h", "sums of halves begin anew", "setp.eq.u32 add, 0, 0;", "setp.eq.u32 add, 0, 1;", WRONG),
    (GEMM, "epilogue_eights.h", "eights of the row beside", "tile.at + r * tile", "tile.at + (r ^ 1) * tile", WRONG),
    (GEMM, "epilogue_eights.h", "the edge of tokens is not tested", "token >= out.m || ", "", "OutOfBounds"),
    (GEMM, "epilogue_eights.h", "the edge of outputs is not tested", " || o >= out.n", "", "OutOfBounds Race"),
    (GEMM, "epilogue_eights.h", "outputs of a pair swapped", "rounded_pair(v[2], v[3], dtype)", "rounded_pair(v[3], v[2], dtype)", WRONG),
    (GEMM, "gemm_sm90.h", "copies do not see the barriers", "        barriers_ready();\n", "", "MissingFence"),
    (GEMM, "epilogue_eights.h", "rows of any length", "out.columns() % 8 == 0 && ", "", "Misaligned OutOfBounds"),
    (GEMM, "epilogue_eights.h", "planes are tokens", "out.planes == 1 && ", "", f"{WRONG} OutOfBounds"),
    (GEMM, "epilogue_eights.h", "ups of the same eight", "(out, sums + 8, token, o + 8, up)", "(out, sums, token, o, up)", WRONG),
    (GEMM, "epilogue_eights.h", "gates in the columns of the weight", "(gated ? o / 2 : o)", "o", f"{WRONG} OutOfBounds Race"),
    (GEMM, "epilogue_eights.h", "ups are gates, too", "gated ? 16 : 8", "8", f"{WRONG} OutOfBounds Race Misaligned"),
    (GEMM, "epilogue_eights.h", "one residual for eight columns", "out.dtype, at + j)", "out.dtype, at)", WRONG),
    (GEMM, "epilogue_eights.h", "the residual is forgotten", "        if (out.residual)\n", "        if (false)\n", WRONG),
    (FP8, "gemm_sm90.h", "sums in fp32 are overwritten", "total[i][e] = add(total[i][e], acc[i][e]);", "total[i][e] = acc[i][e];", WRONG),
    (FP8, "gemm_sm90.h", "sums count twice", "            acc[i][e] = 0;\n", "", WRONG),
    (FP8, "gemm_sm90.h", "the last sums are forgotten", "    }\n    promote(total, acc);\n", "    }\n", WRONG),
    (FP8, "gemm_sm90.h", "sums stay in the tensor core", "if constexpr (units_of_a_sum<Operand> > 0)", "if constexpr (false)", WRONG),
    (FP8, "gemm_sm90.h", "sums leave every 256 inputs", "units_of_a_sum<Fp8> = 2;", "units_of_a_sum<Fp8> = 4;", WRONG),
    (GROUPED_FP8, "gemm_sm90.h", "sums of scaled weights leave every 256 inputs", "units_of_a_sum<GroupedFp8> = 2;", "units_of_a_sum<GroupedFp8> = 4;", WRONG),
    (GROUPED_FP8, "decode_fp8.h", "zero gets an exponent", "0x08080800u", "0x08080808u", WRONG),
    (GROUPED_FP8, "decode_fp8.h", "scales of outputs g for g + 8", "high = 127u - (pair >> 8)", "high = 127u - (pair & 0xffu)", WRONG),
    (GROUPED_FP8, "decode_fp8.h", "large magnitudes are not scaled", "table.magnitudes[1] - low * 0x08080808u", "table.magnitudes[1]", WRONG),
    (GROUPED_FP8, "decode_fp8.h", "exponents move the other way", "table.magnitudes[0] - high", "table.magnitudes[0] + high", WRONG),
    (QUANTIZE, "store.h", "E4M3 without its sign", "byte | bits_of(v) >> 31 << 7", "byte", WRONG),
    (QUANTIZE, "store.h", "subnormals of E4M3 as normal numbers", "magnitude >= smallest_normal ?", "magnitude > 0 ?", WRONG),
    (QUANTIZE, "store.h", "subnormals of E4M3 in halves of a step", "mul(fabsf(v), 512.0f)", "mul(fabsf(v), 1024.0f)", WRONG),
    (QUANTIZE, "quantize.h", "elements beyond the largest", "fabsf(v) < q.top ? fabsf(v) : q.top", "fabsf(v)", WRONG),
    (FP8, "decode_fp8.h", "signs of outputs g for g + 8", "word << 4 & 0x80808080u", "word & 0x80808080u", WRONG),
    (FP8, "decode_fp8.h", "magnitudes of outputs g for g + 8", "magnitudes >> 16", "magnitudes", WRONG),
    (FP8, "epilogue.h", "the scale of a token is forgotten", "if (out.x_scale) whole = mul(whole, out.x_scale[token]);", "", WRONG),
]  # fmt: skip
HEADERS = [p for p in COMMON if p.name not in ("gemv.h", "gemm_sm80.h")]
HEADERS.insert(HEADERS.index(CSRC / "cuda/decode.h"), CSRC / "cuda/device_sm90.h")
HEADERS.insert(HEADERS.index(CSRC / "cuda/decode.h") + 1, CSRC / "cuda/decode_fp8.h")
HEADERS.insert(HEADERS.index(CSRC / "cuda/epilogue.h") + 1, CSRC / "cuda/epilogue_eights.h")
HEADERS += [CSRC / "cuda/split.h", CSRC / "cuda/gemm_sm90.h"]
OF = {"mutants": MUTANTS, "instances": INSTANCES, "headers": HEADERS}
