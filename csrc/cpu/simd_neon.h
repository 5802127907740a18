// The words of simd.h in Arm NEON with the dot product of Armv8.2: four registers each. That product takes signed bytes
// only, so weight integers carry no offset.
#pragma once
#include <arm_neon.h>

#include "simd.h"

namespace llmfp4::cpu::LLMFP4_ISA {

constexpr bool signed_bytes = true;
constexpr int panel_rows = 4, panel_tiles = 1, float_rows = 4, float_tiles = 1;
constexpr int float_fused_tiles = 1, grouped_fused_tiles = 2, few_float_rows = 4, most_chained = 2;

template <class R>
struct Four {
    R part[4];
};
struct Tile : Four<uint8x16_t> {};
struct Bytes : Four<int8x16_t> {};
struct I32 : Four<int32x4_t> {};
struct F32 : Four<float32x4_t> {};

template <class V, class F>
LLMFP4_INLINE V each_part(F&& f) {
    V v;
    each<4>([&](int i) { v.part[i] = f(i); });
    return v;
}

struct ByteTable {
    int8x16_t entries;
    explicit ByteTable(const uint8_t (&table)[16]) : entries(vreinterpretq_s8_u8(vld1q_u8(table))) {}
};
constexpr int quarters = 2;  // every element is a whole number of 2^-2, and of those at most 64
struct FloatTable {
    uint8x16_t entries;
    explicit FloatTable(const float (&table)[16]) {
        uint8_t whole[16];
        for (int code = 0; code < 16; ++code) whole[code] = uint8_t(int8_t(table[code] * (1 << quarters)));
        entries = vld1q_u8(whole);
    }
};

inline Tile load_tile(const uint8_t* p) {
    return each_part<Tile>([&](int i) { return vld1q_u8(p + 16 * i); });
}
inline Bytes load_bytes(const uint8_t* p) {
    return each_part<Bytes>([&](int i) { return vreinterpretq_s8_u8(vld1q_u8(p + 16 * i)); });
}
inline void store_bytes(uint8_t* p, const Bytes& b) {
    each<4>([&](int i) { vst1q_u8(p + 16 * i, vreinterpretq_u8_s8(b.part[i])); });
}
inline Bytes decode_low(const Tile& t, const ByteTable& table) {
    return each_part<Bytes>([&](int i) { return vqtbl1q_s8(table.entries, vandq_u8(t.part[i], vdupq_n_u8(15))); });
}
inline Bytes decode_high(const Tile& t, const ByteTable& table) {
    return each_part<Bytes>([&](int i) { return vqtbl1q_s8(table.entries, vshrq_n_u8(t.part[i], 4)); });
}
inline I32 i32_all(int32_t v) {
    return each_part<I32>([&](int) { return vdupq_n_s32(v); });
}
inline I32 load(const int32_t* p) {
    return each_part<I32>([&](int i) { return vld1q_s32(p + 4 * i); });
}
inline void store(int32_t* p, const I32& v) {
    each<4>([&](int i) { vst1q_s32(p + 4 * i, v.part[i]); });
}
inline I32 add(const I32& a, const I32& b) {
    return each_part<I32>([&](int i) { return vaddq_s32(a.part[i], b.part[i]); });
}
inline I32 dot4(const I32& sum, const Bytes& w, const int8_t* x) {
    const int8x16_t x4 = vreinterpretq_s8_s32(vdupq_n_s32(four_bytes(x)));
    return each_part<I32>([&](int i) { return vdotq_s32(sum.part[i], w.part[i], x4); });
}

// The nibble's byte, looked up, becomes the highest of its lane: a fixed-point number with 24 more binary places.
template <int nibble>
inline F32 decode_column(const Tile& t, const FloatTable& table) {
    return each_part<F32>([&](int i) {
        const uint32x4_t lane = vreinterpretq_u32_u8(t.part[i]);
        const uint32x4_t code = vandq_u32(nibble ? vshrq_n_u32(lane, nibble ? 4 * nibble : 1) : lane, vdupq_n_u32(15));
        const uint8x16_t quarter = vqtbl1q_u8(table.entries, vreinterpretq_u8_u32(code));
        return vcvtq_n_f32_s32(vreinterpretq_s32_u32(vshlq_n_u32(vreinterpretq_u32_u8(quarter), 24)), 24 + quarters);
    });
}
inline F32 f32_all(float v) {
    return each_part<F32>([&](int) { return vdupq_n_f32(v); });
}
inline F32 f32_zero() {
    return each_part<F32>([](int) { return vdupq_n_f32(0.0f); });
}
inline F32 to_float(const I32& v) {
    return each_part<F32>([&](int i) { return vcvtq_f32_s32(v.part[i]); });
}
inline F32 load(const float* p) {
    return each_part<F32>([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline void store(float* p, const F32& v) {
    each<4>([&](int i) { vst1q_f32(p + 4 * i, v.part[i]); });
}
inline F32 add(const F32& a, const F32& b) {
    return each_part<F32>([&](int i) { return vaddq_f32(a.part[i], b.part[i]); });
}
inline F32 mul(const F32& a, const F32& b) {
    return each_part<F32>([&](int i) { return vmulq_f32(a.part[i], b.part[i]); });
}
inline F32 fma(const F32& sum, const F32& w, const F32& x) {
    return each_part<F32>([&](int i) { return vfmaq_f32(sum.part[i], w.part[i], x.part[i]); });
}
inline F32 fma(const F32& sum, const F32& w, const float* x) {
    return each_part<F32>([&](int i) { return vfmaq_n_f32(sum.part[i], w.part[i], *x); });
}
inline F32 sub(const F32& a, const F32& b) {
    return each_part<F32>([&](int i) { return vsubq_f32(a.part[i], b.part[i]); });
}
inline F32 div(const F32& a, const F32& b) {
    return each_part<F32>([&](int i) { return vdivq_f32(a.part[i], b.part[i]); });
}
inline F32 ceil(const F32& v) {
    return each_part<F32>([&](int i) { return vrndpq_f32(v.part[i]); });
}
inline F32 clip(const F32& v, const F32& top) {
    return each_part<F32>(
        [&](int i) { return vmaxnmq_f32(vminnmq_f32(v.part[i], top.part[i]), vnegq_f32(top.part[i])); });
}
inline F32 magnitude(const F32& v) {
    return each_part<F32>([&](int i) { return vabsq_f32(v.part[i]); });
}
inline F32 larger(const F32& a, const F32& b) {
    return each_part<F32>([&](int i) {
        return vreinterpretq_f32_u32(vmaxq_u32(vreinterpretq_u32_f32(a.part[i]), vreinterpretq_u32_f32(b.part[i])));
    });
}
inline F32 binade(const F32& v, const F32& least) {
    return each_part<F32>([&](int i) {
        const uint32x4_t power = vandq_u32(vreinterpretq_u32_f32(v.part[i]), vdupq_n_u32(0x7f800000u));
        return vmaxq_f32(vreinterpretq_f32_u32(power), least.part[i]);
    });
}
inline I32 to_integers(const F32& v) {
    return each_part<I32>([&](int i) { return vcvtnq_s32_f32(v.part[i]); });
}
inline Bytes to_bytes(const F32 (&v)[4]) {
    return each_part<Bytes>([&](int i) {
        const I32 integers = to_integers(v[i]);
        const auto pair = [&](int j) {
            return vcombine_s16(vqmovn_s32(integers.part[j]), vqmovn_s32(integers.part[j + 1]));
        };
        return vcombine_s8(vqmovn_s16(pair(0)), vqmovn_s16(pair(2)));
    });
}
inline I32 sum4(const I32& sum, const Bytes& b) {
    return each_part<I32>([&](int i) { return vdotq_s32(sum.part[i], b.part[i], vdupq_n_s8(1)); });
}
inline F32 load_scales(ScaleKind kind, const uint8_t* p) {
    float scales[16];
    for (int i = 0; i < 16; ++i) scales[i] = decode_scale(kind, p[i]);
    return load(scales);
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
