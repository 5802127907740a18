// The vocabulary of the CPU kernels: 16 lanes wide in every instruction set. Intrinsics stand nowhere else
// but in amx.h. The compiler flags of the including file choose the body; each body has a namespace of its own, since
// the same templates are compiled several times into one module.
//
//     Tile    64 bytes of codes: 16 outputs x 8 inputs (core/layout.h)
//     Bytes   64 unsigned bytes: 16 outputs x 4 inputs, element integer + offset
//     I32 F32 16 lanes, one per output
#pragma once
#include <cstdint>

#include "../core/layout.h"
#include "../core/scale.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define LLMFP4_ISA amx
#elif defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define LLMFP4_ISA avx512vnni
#elif defined(__AVX2__)
#define LLMFP4_ISA avx2
#else
#define LLMFP4_ISA scalar
#endif

#if defined(__AVX2__)
#include <immintrin.h>
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

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

inline int32_t four_bytes(const int8_t* x) {
    int32_t word;
    __builtin_memcpy(&word, x, 4);
    return word;
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

constexpr int panel_rows = 6, panel_tiles = 4, float_rows = 6, float_tiles = 4;
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
inline Bytes decode_low(Tile t, const ByteTable& table) {
    return _mm512_shuffle_epi8(table.entries, _mm512_and_si512(t, _mm512_set1_epi8(15)));
}
inline Bytes decode_high(Tile t, const ByteTable& table) {
    return _mm512_shuffle_epi8(table.entries, _mm512_and_si512(_mm512_srli_epi16(t, 4), _mm512_set1_epi8(15)));
}
inline I32 i32_all(int32_t v) { return _mm512_set1_epi32(v); }
inline I32 load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store(int32_t* p, I32 v) { _mm512_storeu_si512(p, v); }
inline I32 add(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
inline I32 dot4(I32 sum, Bytes w, const int8_t* x) {
    return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(four_bytes(x)));
}

template <int nibble>
inline F32 decode_column(Tile t, const FloatTable& table) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(t, 4 * nibble), table.entries);  // reads the low 4 bits of a lane
}
inline F32 f32_zero() { return _mm512_setzero_ps(); }
inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 fma(F32 sum, F32 w, F32 x) { return _mm512_fmadd_ps(w, x, sum); }
inline F32 fma(F32 sum, F32 w, const float* x) { return _mm512_fmadd_ps(w, _mm512_set1_ps(*x), sum); }
inline F32 load_scales(ScaleKind kind, const uint8_t* p) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    if (kind == ScaleKind::e8m0) {
        const __m512i subnormal = _mm512_set1_epi32(0x00400000);
        const __mmask16 zero = _mm512_testn_epi32_mask(bytes, bytes);
        return _mm512_castsi512_ps(_mm512_mask_mov_epi32(_mm512_slli_epi32(bytes, 23), zero, subnormal));
    }
    // (8·[p > 0] + f) · 2^(max(p, 1) - 10): an integer times a power of two, since fp32 subnormals take a slow path.
    const __m512i field = _mm512_and_si512(_mm512_srli_epi32(bytes, 3), _mm512_set1_epi32(15));
    const __m512i f = _mm512_and_si512(bytes, _mm512_set1_epi32(7));
    const __m512i steps = _mm512_mask_add_epi32(f, _mm512_test_epi32_mask(field, field), f, _mm512_set1_epi32(8));
    const __m512i exponent =
        _mm512_add_epi32(_mm512_max_epi32(field, _mm512_set1_epi32(1)), _mm512_set1_epi32(127 - 10));
    const __m512 unit = _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
    const __m512 magnitude = _mm512_mul_ps(_mm512_cvtepi32_ps(steps), unit);
    const __m512i sign = _mm512_slli_epi32(_mm512_srli_epi32(bytes, 7), 31);
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(magnitude), sign));
}

#elif defined(__AVX2__)

constexpr int panel_rows = 4, panel_tiles = 1, float_rows = 4, float_tiles = 1;
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
inline F32 f32_zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
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

#else

constexpr int panel_rows = 4, panel_tiles = 1, float_rows = 4, float_tiles = 1;
struct Tile {
    uint8_t lane[64];
};
struct Bytes {
    uint8_t lane[64];
};
struct I32 {
    int32_t lane[16];
};
struct F32 {
    float lane[16];
};
struct ByteTable {
    uint8_t entries[16];
    explicit ByteTable(const uint8_t (&table)[16]) { __builtin_memcpy(entries, table, sizeof entries); }
};
struct FloatTable {
    float entries[16];
    explicit FloatTable(const float (&table)[16]) { __builtin_memcpy(entries, table, sizeof entries); }
};

template <class V, class T>
inline V load_lanes(const T* p) {
    V v;
    __builtin_memcpy(v.lane, p, sizeof v.lane);
    return v;
}
template <class V, class F>
inline V each_lane(F f) {
    V v;
    for (size_t i = 0; i < sizeof v.lane / sizeof v.lane[0]; ++i) v.lane[i] = f(i);
    return v;
}
inline Tile load_tile(const uint8_t* p) { return load_lanes<Tile>(p); }
inline Bytes load_bytes(const uint8_t* p) { return load_lanes<Bytes>(p); }
inline void store_bytes(uint8_t* p, const Bytes& b) { __builtin_memcpy(p, b.lane, sizeof b.lane); }
inline Bytes decode_low(const Tile& t, const ByteTable& table) {
    return each_lane<Bytes>([&](size_t i) { return table.entries[t.lane[i] & 15]; });
}
inline Bytes decode_high(const Tile& t, const ByteTable& table) {
    return each_lane<Bytes>([&](size_t i) { return table.entries[t.lane[i] >> 4]; });
}
inline I32 i32_all(int32_t v) {
    return each_lane<I32>([&](size_t) { return v; });
}
inline I32 load(const int32_t* p) { return load_lanes<I32>(p); }
inline void store(int32_t* p, const I32& v) { __builtin_memcpy(p, v.lane, sizeof v.lane); }
inline I32 add(const I32& a, const I32& b) {
    return each_lane<I32>([&](size_t i) { return a.lane[i] + b.lane[i]; });
}
inline I32 dot4(const I32& sum, const Bytes& w, const int8_t* x) {
    return each_lane<I32>([&](size_t i) {
        int32_t s = sum.lane[i];
        for (int j = 0; j < 4; ++j) s += int32_t(w.lane[4 * i + j]) * x[j];
        return s;
    });
}
template <int nibble>
inline F32 decode_column(const Tile& t, const FloatTable& table) {
    return each_lane<F32>([&](size_t i) { return table.entries[t.lane[4 * i + nibble / 2] >> (nibble % 2 * 4) & 15]; });
}
inline F32 f32_zero() {
    return each_lane<F32>([](size_t) { return 0.0f; });
}
inline F32 load(const float* p) { return load_lanes<F32>(p); }
inline void store(float* p, const F32& v) { __builtin_memcpy(p, v.lane, sizeof v.lane); }
inline F32 add(const F32& a, const F32& b) {
    return each_lane<F32>([&](size_t i) { return a.lane[i] + b.lane[i]; });
}
inline F32 mul(const F32& a, const F32& b) {
    return each_lane<F32>([&](size_t i) { return a.lane[i] * b.lane[i]; });
}
inline F32 fma(const F32& sum, const F32& w, const F32& x) {
    return each_lane<F32>([&](size_t i) { return sum.lane[i] + w.lane[i] * x.lane[i]; });
}
inline F32 fma(const F32& sum, const F32& w, const float* x) {
    return each_lane<F32>([&](size_t i) { return sum.lane[i] + w.lane[i] * *x; });
}

#endif

#if !defined(__AVX512VNNI__)
inline F32 load_scales(ScaleKind kind, const uint8_t* p) {
    float scales[16];
    for (int i = 0; i < 16; ++i) scales[i] = decode_scale(kind, p[i]);
    return load(scales);
}
#endif

}  // namespace llmfp4::cpu::LLMFP4_ISA
