// Rows of activations on their way in as floats, and rows of sums on their way out (the epilogue).
// Plain loops: the compiler vectorises them with the flags of the including file. No contraction of a·b + c into one
// rounding (-ffp-contract=off), so that every instruction set returns the same bits.
#pragma once
#include "../core/half.h"
#include "problem.h"
#include "simd.h"

namespace llmfp4::cpu::LLMFP4_ISA {

constexpr int plane_weight = 128;  // of the second int8 plane of an integer operand, see quantize.h

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
LLMFP4_INLINE void finish_integer_row(const int32_t* __restrict low, int32_t low_start, const int32_t* __restrict high,
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
LLMFP4_INLINE void finish_float_row(const float* __restrict sums, float x_scale, const float* __restrict row_scale,
                                    const float* __restrict bias, T* __restrict y, int count) {
    for (int i = 0; i < count; ++i) {
        const float scaled = sums[i] * x_scale * row_scale[i];
        y[i] = from_float<T>(bias ? scaled + bias[i] : scaled);
    }
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
