// The vocabulary of the CPU kernels: 16 lanes wide in every instruction set. Intrinsics stand nowhere else
// but in amx.h. The compiler flags of the including file choose the body; each body has a namespace of its own, since
// the same templates are compiled several times into one module.
//
//     Tile    64 bytes of codes: 16 outputs x 8 inputs (core/layout.h)
//     Bytes   64 bytes: 16 outputs x 4 inputs, element integer, plus an offset that makes it unsigned if not
//     signed_bytes I32 F32 16 lanes, one per output
#pragma once
#include <cmath>
#include <cstdint>

#include "../core/layout.h"
#include "../core/scale.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define LLMFP4_ISA amx
#elif defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define LLMFP4_ISA avx512vbmi
#elif defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define LLMFP4_ISA avx512vnni
#elif defined(__AVX2__)
#define LLMFP4_ISA avx2
#elif defined(__ARM_FEATURE_DOTPROD)
#define LLMFP4_ISA neon
#else
#define LLMFP4_ISA scalar
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Where one instruction multiplies and adds four bytes, digits beat floats (gemm_fixed.h).
#if defined(__AVX512VNNI__)
#define LLMFP4_DIGITS 1
#endif

namespace llmfp4::cpu::LLMFP4_ISA {

// f(0) .. f(N - 1), and f(i, j) over M x N, unrolled: blocks of accumulators stay in registers only if every loop over
// them is, and gcc by itself stops at about 16 statements (W4A4 at m = 512: 226 against 418 GFLOP/s).
template <int N, class F>
LLMFP4_INLINE void each(F&& f) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) f(i);
}
template <int M, int N, class F>
LLMFP4_INLINE void each(F&& f) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < N; ++j) f(i, j);
}

// A loop over blocks of accumulators, never inlined: beside other work gcc 12 finds fewer registers for it (MXFP4
// scales, m = 512: 1.25 times as long).
#define LLMFP4_APART __attribute__((noinline))

// How many numbers the registers of an instruction set hold: `panel_` and `float_rows` x `_tiles` accumulators of a
// panel; few_float_rows is where decoding to a panel begins to pay for floats, most_chained the accumulators up to
// which two chains of each fit. Two AVX2 registers make 16 lanes: float blocks of 4 x 2 spill (m = 8: 10.7 ms
// against 7.4).

inline int32_t four_bytes(const int8_t* x) {
    int32_t word;
    __builtin_memcpy(&word, x, 4);
    return word;
}

// Of an E4M3 byte, its sign extended, times 2^7: S.0EEEE.MMM0000000, the fp16 number that is 2^8 times smaller,
// subnormals included.
constexpr int16_t e4m3_as_half = int16_t(0xbf80);

}  // namespace llmfp4::cpu::LLMFP4_ISA

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "simd_neon.h"
#else
#include "simd_scalar.h"
#endif

namespace llmfp4::cpu::LLMFP4_ISA {

#if !defined(__AVX512VNNI__) || !defined(__AVX512BW__)
// What AVX-512 has words of its own for. 16 rows → the largest magnitude, or the sum, of each.
template <class Op>
inline F32 reduce_rows(const float* rows, size_t stride, Op&& op) {
    alignas(64) float out[16];
    for (int r = 0; r < 16; ++r) {
        const float* row = rows + r * stride;
        float half[8];  // in vectors, which an order from left to right would not be
        for (int i = 0; i < 8; ++i) half[i] = op(row[i], row[i + 8]);
        for (int i = 0; i < 4; ++i) half[i] = op(half[i], half[i + 4]);
        out[r] = op(op(half[0], half[2]), op(half[1], half[3]));
    }
    return load(out);
}
inline F32 max_of_rows(const float* rows, size_t stride) {
    return reduce_rows(rows, stride, [](float a, float b) {
        const float magnitude_a = __builtin_fabsf(a), magnitude_b = __builtin_fabsf(b);
        return magnitude_a > magnitude_b ? magnitude_a : magnitude_b;
    });
}
inline F32 sum_of_rows(const float* rows, size_t stride) {
    return reduce_rows(rows, stride, [](float a, float b) { return a + b; });
}
#endif

// How many bytes beyond a tile those lie that are read 32 and 64 steps later. A step reads one tile of each of `rows`
// neighbouring rows of tiles; behind the ends of these rows the next ones begin.
struct Ahead {
    size_t near = 32 * tile_bytes, far = 64 * tile_bytes;

    Ahead() = default;
    Ahead(size_t kt, size_t tiles_k, int rows) {
        const size_t skipped = (rows - 1) * tiles_k * tile_bytes;
        if (kt + 32 >= tiles_k) near += skipped;
        if (kt + 64 >= tiles_k) far += skipped;
    }
};

// The tile at p, and prefetches: of the one 32 tiles later, and of that 64 later to the second-level cache, which keeps
// more lines on their way than the first. One core, m = 1, share of the read bandwidth with the first alone, 16 / 32 /
// 64 / 128 tiles later: W4A16 .70 .80 .76 .68, NVFP4 x int8 .79 .88 .87 .76, W4A4 .97 .97 .90 .83. The second makes
// W4A4 1.06 times as fast; 96 and 160 tiles later 1.05 and 1.04.
inline Tile stream_tile(const uint8_t* p, const Ahead& ahead = {}) {
    __builtin_prefetch(p + ahead.near, 0, 3);
    __builtin_prefetch(p + ahead.far, 0, 2);
    return load_tile(p);
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
