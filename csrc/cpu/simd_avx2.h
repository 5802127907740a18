// The words of simd.h in AVX2: two registers each.
#pragma once
#include "simd.h"

namespace llmfp4::cpu::LLMFP4_ISA {

constexpr bool signed_bytes = false;
constexpr int panel_rows = 4, panel_tiles = 1, float_rows = 4, float_tiles = 1;
constexpr int float_fused_tiles = 1, grouped_fused_tiles = 2, few_float_rows = 4, most_chained = 2;
struct Tile {
    __m256i half[2];
};
struct Bytes {
    __m256i half[2];
};
struct I32 {
    __m256i half[2];
};
struct F32 {
    __m256 half[2];
};

struct ByteTable {
    __m256i entries;
    explicit ByteTable(const uint8_t (&table)[16])
        : entries(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)))) {}
};
struct FloatTable {  // magnitudes only: a permute reads 3 bits, the sign bit is moved by hand
    __m256 entries;
    explicit FloatTable(const float (&table)[16]) : entries(_mm256_loadu_ps(table)) {}
};

inline __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Tile load_tile(const uint8_t* p) { return {{load_256(p), load_256(p + 32)}}; }
inline Bytes load_bytes(const uint8_t* p) { return {{load_256(p), load_256(p + 32)}}; }
inline void store_bytes(uint8_t* p, Bytes b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), b.half[0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), b.half[1]);
}
inline __m256i lookup(__m256i t, const ByteTable& table) {
    return _mm256_shuffle_epi8(table.entries, _mm256_and_si256(t, _mm256_set1_epi8(15)));
}
inline Bytes decode_low(Tile t, const ByteTable& table) {
    return {{lookup(t.half[0], table), lookup(t.half[1], table)}};
}
inline Bytes decode_high(Tile t, const ByteTable& table) {
    return {{lookup(_mm256_srli_epi16(t.half[0], 4), table), lookup(_mm256_srli_epi16(t.half[1], 4), table)}};
}
inline I32 i32_all(int32_t v) { return {{_mm256_set1_epi32(v), _mm256_set1_epi32(v)}}; }
inline I32 load(const int32_t* p) { return {{load_256(p), load_256(p + 8)}}; }
inline void store(int32_t* p, I32 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.half[0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), v.half[1]);
}
inline I32 add(I32 a, I32 b) {
    return {{_mm256_add_epi32(a.half[0], b.half[0]), _mm256_add_epi32(a.half[1], b.half[1])}};
}
// Pair sums stay below 2^15: w + offset ≤ 128 and |x| ≤ 96, or 24 and 127.
inline __m256i dot4_half(__m256i sum, __m256i w, __m256i x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
inline I32 dot4(I32 sum, Bytes w, const int8_t* x) {
    const __m256i x4 = _mm256_set1_epi32(four_bytes(x));
    return {{dot4_half(sum.half[0], w.half[0], x4), dot4_half(sum.half[1], w.half[1], x4)}};
}

template <int nibble>
inline __m256 decode_half(__m256i t, const FloatTable& table) {
    const __m256 magnitude = _mm256_permutevar8x32_ps(table.entries, _mm256_srli_epi32(t, 4 * nibble));
    const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(t, 28 - 4 * nibble), _mm256_set1_epi32(INT32_MIN));
    return _mm256_xor_ps(magnitude, _mm256_castsi256_ps(sign));
}
template <int nibble>
inline F32 decode_column(Tile t, const FloatTable& table) {
    return {{decode_half<nibble>(t.half[0], table), decode_half<nibble>(t.half[1], table)}};
}
inline F32 f32_all(float v) { return {{_mm256_set1_ps(v), _mm256_set1_ps(v)}}; }
inline F32 f32_zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
inline F32 to_float(I32 v) { return {{_mm256_cvtepi32_ps(v.half[0]), _mm256_cvtepi32_ps(v.half[1])}}; }
inline F32 load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
inline void store(float* p, F32 v) {
    _mm256_storeu_ps(p, v.half[0]);
    _mm256_storeu_ps(p + 8, v.half[1]);
}
inline F32 add(F32 a, F32 b) { return {{_mm256_add_ps(a.half[0], b.half[0]), _mm256_add_ps(a.half[1], b.half[1])}}; }
inline F32 mul(F32 a, F32 b) { return {{_mm256_mul_ps(a.half[0], b.half[0]), _mm256_mul_ps(a.half[1], b.half[1])}}; }
inline F32 fma(F32 sum, F32 w, F32 x) {
    return {{_mm256_fmadd_ps(w.half[0], x.half[0], sum.half[0]), _mm256_fmadd_ps(w.half[1], x.half[1], sum.half[1])}};
}
inline F32 fma(F32 sum, F32 w, const float* x) {
    const __m256 all = _mm256_broadcast_ss(x);
    return fma(sum, w, F32{{all, all}});
}

inline F32 sub(F32 a, F32 b) { return {{_mm256_sub_ps(a.half[0], b.half[0]), _mm256_sub_ps(a.half[1], b.half[1])}}; }
template <class Op>
LLMFP4_INLINE F32 each_half(Op&& op) {
    return {{op(0), op(1)}};
}
inline F32 div(F32 a, F32 b) { return {{_mm256_div_ps(a.half[0], b.half[0]), _mm256_div_ps(a.half[1], b.half[1])}}; }
inline F32 ceil(F32 v) { return {{_mm256_ceil_ps(v.half[0]), _mm256_ceil_ps(v.half[1])}}; }
inline F32 clip(F32 v, F32 top) {
    return each_half([&](int i) {
        const __m256 bottom = _mm256_xor_ps(top.half[i], _mm256_set1_ps(-0.0f));
        return _mm256_max_ps(_mm256_min_ps(v.half[i], top.half[i]), bottom);
    });
}
inline F32 magnitude(F32 v) {
    return each_half([&](int i) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v.half[i]); });
}
inline F32 larger(F32 a, F32 b) {
    return each_half([&](int i) {
        return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a.half[i]), _mm256_castps_si256(b.half[i])));
    });
}
inline F32 binade(F32 v, F32 least) {
    return each_half(
        [&](int i) { return _mm256_max_ps(_mm256_and_ps(v.half[i], _mm256_set1_ps(INFINITY)), least.half[i]); });
}
inline I32 to_integers(F32 v) { return {{_mm256_cvtps_epi32(v.half[0]), _mm256_cvtps_epi32(v.half[1])}}; }
inline Bytes to_bytes(const F32 (&v)[4]) {
    const auto pair = [&](int i) {
        const I32 integers = to_integers(v[i]);
        return _mm256_packs_epi32(integers.half[0], integers.half[1]);
    };
    const auto half = [&](int i) {
        return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(pair(i), pair(i + 1)),
                                           _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    };
    return {{half(0), half(2)}};
}
inline I32 sum4(I32 sum, Bytes b) {
    const auto half = [&](int i) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), b.half[i]);
        return _mm256_add_epi32(sum.half[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    };
    return {{half(0), half(1)}};
}

inline __m256 load_half_scales(ScaleKind kind, const uint8_t* p) {
    const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    if (kind == ScaleKind::e8m0) {  // byte 0 is a subnormal
        const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu8_epi32(packed), 23);
        return _mm256_castsi256_ps(_mm256_max_epu32(bits, _mm256_set1_epi32(0x00400000)));
    }
    const __m128i moved = _mm_slli_epi16(_mm_cvtepi8_epi16(packed), 7);
    const __m128i half = _mm_and_si128(moved, _mm_set1_epi16(e4m3_as_half));
    return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
}
inline F32 load_scales(ScaleKind kind, const uint8_t* p) {
    return {{load_half_scales(kind, p), load_half_scales(kind, p + 8)}};
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
