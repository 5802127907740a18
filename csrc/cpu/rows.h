// Rows of activations on their way in (quantize, convert) and rows of sums on their way out (the epilogue).
// Plain loops: the compiler vectorises them with the flags of the including file. No contraction of a·b + c into one
// rounding (-ffp-contract=off), so that every instruction set returns the same bits.
#pragma once
#include "../core/half.h"
#include "problem.h"
#include "simd.h"

namespace llmfp4::cpu::LLMFP4_ISA {

// An integer operand that does not fit int8 is split into planes, low + 128·high. Only E3M0 with a shift needs two: its
// values are single powers of two up to 64·2^7, so one plane of each is zero and both fit.
constexpr int plane_weight = 128, plane_limit = 64;

inline int planes_of(const Activation& a) {
    return a.element.max_integer() << (a.shifted ? a.element.max_shift() : 0) > 127 ? 2 : 1;
}

template <class T>
inline float to_float(T v);
struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};
template <>
inline float to_float(float v) {
    return v;
}
template <>
inline float to_float(Bf16 v) {
    return bf16_to_float(v.bits);
}
template <>
inline float to_float(Fp16 v) {
    return fp16_to_float(v.bits);
}
template <class T>
inline T from_float(float v);
template <>
inline float from_float(float v) {
    return v;
}
template <>
inline Bf16 from_float(float v) {
    return {float_to_bf16(v)};
}
template <>
inline Fp16 from_float(float v) {
    return {float_to_fp16(v)};
}

template <class F>
inline void with_dtype(Dtype dtype, F&& f) {
    if (dtype == Dtype::f32) f(float{});
    if (dtype == Dtype::bf16) f(Bf16{});
    if (dtype == Dtype::f16) f(Fp16{});
}

// x [k] → element(code) · integer_factor, rounded as reference.encode does; padded with zeros to padded_k. `sums` are
// those of the planes. Returns false if the row holds NaN or Inf. Bytes may alias anything, so without __restrict
// nothing vectorises (512 x 576 activations: 900 us against 60).
template <int planes, class T>
inline bool quantize_row(const T* __restrict x, int k, int padded_k, const Activation& a, int8_t* __restrict low,
                         int8_t* __restrict high, int32_t* sums) {
    const float* __restrict inverse = a.inverse;
    const float* __restrict factor = a.integer_factor;
    const float top = float(a.element.max_integer()) / float(a.element.integer_scale());
    const uint32_t to_anchor = uint32_t(23 - a.element.mantissa_bits) << 23;
    const uint32_t smallest = uint32_t(127 + 1 - a.element.bias) << 23;
    uint32_t special = 0;
    int32_t sum_low = 0, sum_high = 0;
    for (int i = 0; i < k; ++i) {
        const float value = to_float(x[i]);
        special |= uint32_t((bits_of(value) & 0x7f800000u) == 0x7f800000u);
        const float v = value * inverse[i];
        const uint32_t sign = bits_of(v) & 0x80000000u;
        const float magnitude = __builtin_fabsf(v) < top ? __builtin_fabsf(v) : top;
        uint32_t binade = bits_of(magnitude) & 0x7f800000u;
        binade = binade > smallest ? binade : smallest;
        // 1.5·2^23 steps of this binade: adding it rounds to a whole step, ties to even.
        const float anchor = float_from_bits((binade + to_anchor) | 0x00400000u);
        const float rounded = (magnitude + anchor) - anchor;
        const int32_t integer = int32_t(float_from_bits(bits_of(rounded) | sign) * factor[i]);
        if constexpr (planes == 1) {
            low[i] = int8_t(integer);
            sum_low += integer;
        } else {
            const bool large = integer > plane_limit || integer < -plane_limit;
            const int32_t l = large ? 0 : integer, h = large ? integer / plane_weight : 0;
            low[i] = int8_t(l);
            high[i] = int8_t(h);
            sum_low += l;
            sum_high += h;
        }
    }
    for (int i = k; i < padded_k; ++i) {
        low[i] = 0;
        if (planes == 2) high[i] = 0;
    }
    sums[0] = sum_low;
    if (planes == 2) sums[1] = sum_high;
    return special == 0;
}

// x [k] · factor [k] in fp32, padded with zeros.
template <class T>
inline void convert_row(const T* __restrict x, int k, int padded_k, const float* __restrict factor,
                        float* __restrict out) {
    for (int i = 0; i < k; ++i) out[i] = to_float(x[i]) * factor[i];
    for (int i = k; i < padded_k; ++i) out[i] = 0.0f;
}

// The one epilogue of every integer kernel: fp32(sum) · x_scale, · row_scale, + bias, each rounded to fp32.
// low_start and high_start are what the sums of the planes were not started with.
template <class T>
inline void finish_integer_row(const int32_t* __restrict low, int32_t low_start, const int32_t* __restrict high,
                               int32_t high_start, float x_scale, const float* __restrict row_scale,
                               const float* __restrict bias, T* __restrict y, int count) {
    if (high) {
        for (int i = 0; i < count; ++i) {
            const double sum = double(low[i] + low_start) + double(plane_weight) * double(high[i] + high_start);
            const float scaled = float(sum) * x_scale * row_scale[i];
            y[i] = from_float<T>(bias ? scaled + bias[i] : scaled);
        }
    } else {
        for (int i = 0; i < count; ++i) {
            const float scaled = float(low[i] + low_start) * x_scale * row_scale[i];
            y[i] = from_float<T>(bias ? scaled + bias[i] : scaled);
        }
    }
}

template <class T>
inline void finish_float_row(const float* __restrict sums, const float* __restrict row_scale,
                             const float* __restrict bias, T* __restrict y, int count) {
    for (int i = 0; i < count; ++i) {
        const float scaled = sums[i] * row_scale[i];
        y[i] = from_float<T>(bias ? scaled + bias[i] : scaled);
    }
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
