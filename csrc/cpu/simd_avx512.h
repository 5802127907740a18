// The words of simd.h in AVX-512 with VNNI: one register each.
#pragma once
#include "simd.h"

namespace llmfp4::cpu::LLMFP4_ISA {

constexpr bool signed_bytes = false;
constexpr int panel_rows = 6, panel_tiles = 4, float_rows = 6, float_tiles = 4;
constexpr int float_fused_tiles = 2, grouped_fused_tiles = 4, few_float_rows = 8, most_chained = 8;
using Tile = __m512i;
using Bytes = __m512i;
using I32 = __m512i;
using F32 = __m512;

struct ByteTable {
    __m512i entries;
    explicit ByteTable(const uint8_t (&table)[16])
        : entries(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)))) {}
};
struct FloatTable {
    __m512 entries;
    explicit FloatTable(const float (&table)[16]) : entries(_mm512_loadu_ps(table)) {}
};

inline Tile load_tile(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(uint8_t* p, Bytes b) { _mm512_storeu_si512(p, b); }
#if defined(__AVX512VBMI__)
// Looks at the low 6 bits of a byte: with the table there four times, what stands above a nibble need not be cleared.
inline Bytes decode_low(Tile t, const ByteTable& table) { return _mm512_permutexvar_epi8(t, table.entries); }
inline Bytes decode_high(Tile t, const ByteTable& table) {
    return _mm512_permutexvar_epi8(_mm512_srli_epi16(t, 4), table.entries);
}
#else
inline Bytes decode_low(Tile t, const ByteTable& table) {
    return _mm512_shuffle_epi8(table.entries, _mm512_and_si512(t, _mm512_set1_epi8(15)));
}
inline Bytes decode_high(Tile t, const ByteTable& table) {
    return _mm512_shuffle_epi8(table.entries, _mm512_and_si512(_mm512_srli_epi16(t, 4), _mm512_set1_epi8(15)));
}
#endif
inline I32 i32_all(int32_t v) { return _mm512_set1_epi32(v); }
inline I32 load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store(int32_t* p, I32 v) { _mm512_storeu_si512(p, v); }
inline I32 add(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
// As assembly: where sums are read after a loop, gcc 12 copies each of them before and after the intrinsic (group
// scales, m = 16 to 512: 1.08-1.24 times as long).
inline I32 dot4(I32 sum, Bytes w, const int8_t* x) {
    const __m512i four = _mm512_set1_epi32(four_bytes(x));
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(four));
    return sum;
}

// Products of bf16 pairs, sixteen times the same: what rivals multiply with where the CPU can.
#define LLMFP4_BF16_PAIRS 1
inline bool has_bf16_pairs() { return __builtin_cpu_supports("avx512bf16"); }
inline F32 dot2(F32 sum, const uint32_t* x) {
    const __m512i pairs = _mm512_set1_epi32(int(*x));
    asm("vdpbf16ps %1, %1, %0" : "+v"(sum) : "v"(pairs));
    return sum;
}

template <int nibble>
inline F32 decode_column(Tile t, const FloatTable& table) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(t, 4 * nibble), table.entries);  // reads the low 4 bits of a lane
}
inline F32 decode_column(Tile t, const FloatTable& table, int nibble) {
    return _mm512_permutexvar_ps(_mm512_srl_epi32(t, _mm_cvtsi32_si128(4 * nibble)), table.entries);
}
template <int bits>
inline I32 shift_left(I32 v) {
    return _mm512_slli_epi32(v, bits);
}
inline F32 f32_all(float v) { return _mm512_set1_ps(v); }
inline F32 f32_zero() { return _mm512_setzero_ps(); }
inline F32 to_float(I32 v) { return _mm512_cvtepi32_ps(v); }
inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 fma(F32 sum, F32 w, F32 x) { return _mm512_fmadd_ps(w, x, sum); }
inline F32 fma(F32 sum, F32 w, const float* x) { return _mm512_fmadd_ps(w, _mm512_set1_ps(*x), sum); }
inline F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
inline F32 ceil(F32 v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC); }
inline F32 clip(F32 v, F32 top) { return _mm512_range_ps(v, top, 2); }  // the least magnitude, with the sign of v
inline F32 magnitude(F32 v) { return _mm512_abs_ps(v); }
inline F32 larger(F32 a, F32 b) {
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
inline F32 binade(F32 v, F32 least) { return _mm512_max_ps(_mm512_and_ps(v, f32_all(INFINITY)), least); }
inline I32 to_integers(F32 v) { return _mm512_cvtps_epi32(v); }
inline Bytes to_bytes(const F32 (&v)[4]) {
    const auto pair = [&](int i) { return _mm512_packs_epi32(to_integers(v[i]), to_integers(v[i + 1])); };
    const __m512i quarters = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(quarters, _mm512_packs_epi16(pair(0), pair(2)));
}
inline I32 sum4(I32 sum, Bytes b) { return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), b); }

// Registers of rows a and b to one of a0·a2 b0·b2 a1·a3 b1·b3, and so on: half as many at each step.
template <class Op>
LLMFP4_INLINE F32 reduce_rows(const float* rows, size_t stride, Op&& op) {
    const auto halves = [&](__m512 a, __m512 b) { return op(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
    const auto quarters = [&](__m512 a, __m512 b) {
        return op(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    __m512 four[4];
    each<4>([&](int i) {
        const float* p = rows + 4 * i * stride;
        four[i] = halves(halves(load(p), load(p + 2 * stride)), halves(load(p + stride), load(p + 3 * stride)));
    });
    return quarters(quarters(four[0], four[1]), quarters(four[2], four[3]));
}
inline F32 max_of_rows(const float* rows, size_t stride) {
    return reduce_rows(rows, stride, [](__m512 a, __m512 b) { return _mm512_range_ps(a, b, 11); });  // of magnitudes
}
inline F32 sum_of_rows(const float* rows, size_t stride) {
    return reduce_rows(rows, stride, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
}
inline F32 load_scales(ScaleKind kind, const uint8_t* p) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if (kind == ScaleKind::e8m0) {  // byte 0 is a subnormal
        const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu8_epi32(packed), 23);
        return _mm512_castsi512_ps(_mm512_max_epu32(bits, _mm512_set1_epi32(0x00400000)));
    }
    const __m256i moved = _mm256_slli_epi16(_mm256_cvtepi8_epi16(packed), 7);
    const __m256i half = _mm256_and_si256(moved, _mm256_set1_epi16(e4m3_as_half));
    return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
