// The words of simd.h in plain C++.
#pragma once
#include "../core/half.h"
#include "simd.h"

namespace llmfp4::cpu::LLMFP4_ISA {

constexpr bool signed_bytes = false;
constexpr int panel_rows = 4, panel_tiles = 1, float_rows = 4, float_tiles = 1;
constexpr int float_fused_tiles = 1, grouped_fused_tiles = 2, few_float_rows = 4, most_chained = 2;
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
inline F32 f32_all(float v) {
    return each_lane<F32>([&](size_t) { return v; });
}
inline F32 f32_zero() {
    return each_lane<F32>([](size_t) { return 0.0f; });
}
inline F32 to_float(const I32& v) {
    return each_lane<F32>([&](size_t i) { return float(v.lane[i]); });
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
inline F32 sub(const F32& a, const F32& b) {
    return each_lane<F32>([&](size_t i) { return a.lane[i] - b.lane[i]; });
}
inline F32 div(const F32& a, const F32& b) {
    return each_lane<F32>([&](size_t i) { return a.lane[i] / b.lane[i]; });
}
inline F32 ceil(const F32& v) {
    return each_lane<F32>([&](size_t i) { return __builtin_ceilf(v.lane[i]); });
}
inline F32 clip(const F32& v, const F32& top) {
    return each_lane<F32>([&](size_t i) {
        const float below = v.lane[i] < top.lane[i] ? v.lane[i] : top.lane[i];
        return below > -top.lane[i] ? below : -top.lane[i];
    });
}
inline F32 magnitude(const F32& v) {
    return each_lane<F32>([&](size_t i) { return float_from_bits(bits_of(v.lane[i]) & 0x7fffffffu); });
}
inline F32 larger(const F32& a, const F32& b) {
    return each_lane<F32>([&](size_t i) {
        const uint32_t bits_a = bits_of(a.lane[i]), bits_b = bits_of(b.lane[i]);
        return float_from_bits(bits_a > bits_b ? bits_a : bits_b);
    });
}
inline F32 binade(const F32& v, const F32& least) {
    return each_lane<F32>([&](size_t i) {
        const float power = float_from_bits(bits_of(v.lane[i]) & 0x7f800000u);
        return power > least.lane[i] ? power : least.lane[i];
    });
}
inline I32 to_integers(const F32& v) {
    return each_lane<I32>([&](size_t i) { return int32_t(v.lane[i]); });
}
inline Bytes to_bytes(const F32 (&v)[4]) {
    return each_lane<Bytes>([&](size_t i) {
        const float whole = v[i / 16].lane[i % 16] + 0x1.8p23f;  // the low bits are those of the nearest integer
        return uint8_t(bits_of(whole));
    });
}
inline I32 sum4(const I32& sum, const Bytes& b) {
    return each_lane<I32>([&](size_t i) {
        int32_t s = sum.lane[i];
        for (int j = 0; j < 4; ++j) s += int8_t(b.lane[4 * i + j]);
        return s;
    });
}
inline F32 load_scales(ScaleKind kind, const uint8_t* p) {
    return each_lane<F32>([&](size_t i) { return decode_scale(kind, p[i]); });
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
