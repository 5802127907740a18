// Rows of activations become int8 operands, rounded as llmfp4_kernels/reference.py does, bit by bit.
// Bytes may alias anything, so without __restrict nothing vectorises (512 x 576 activations: 900 us against 60).
#pragma once
#include "rows.h"

namespace llmfp4::cpu::LLMFP4_ISA {

// An integer operand that does not fit int8 is split into planes, low + 128·high. Only E3M0 with a shift needs two: its
// values are single powers of two up to 64·2^7, so one plane of each is zero and both fit.
constexpr int plane_limit = 64, int8_max = 127;

inline int planes_of(const Activation& a) {
    return a.element.max_integer() << (a.shifted ? a.element.max_shift() : 0) > int8_max ? 2 : 1;
}

// Rounds numbers in an element's units to the element: saturating, ties to the even step.
struct Rounder {
    float top;
    uint32_t to_anchor, smallest;

    explicit Rounder(Element e)
        : top(float(e.max_integer()) / float(e.integer_scale())),
          to_anchor(uint32_t(23 - e.mantissa_bits) << 23),
          smallest(uint32_t(127 + 1 - e.bias) << 23) {}

    float operator()(float v) const {
        const uint32_t sign = bits_of(v) & 0x80000000u;
        const float magnitude = __builtin_fabsf(v) < top ? __builtin_fabsf(v) : top;
        uint32_t binade = bits_of(magnitude) & 0x7f800000u;
        binade = binade > smallest ? binade : smallest;
        // 1.5·2^23 steps of this binade: adding it rounds to a whole step, ties to even.
        const float anchor = float_from_bits((binade + to_anchor) | 0x00400000u);
        const float rounded = (magnitude + anchor) - anchor;
        return float_from_bits(bits_of(rounded) | sign);
    }
};

inline uint32_t is_special(float value) { return uint32_t((bits_of(value) & 0x7f800000u) == 0x7f800000u); }

// x [k] → element(code) · integer_factor, padded with zeros to padded_k. `sums` are those of the planes. Returns false
// if the row holds NaN or Inf.
template <int planes, class T>
inline bool quantize_row(const T* __restrict x, int k, int padded_k, const Activation& a, int8_t* __restrict low,
                         int8_t* __restrict high, int32_t* sums) {
    const float* __restrict inverse = a.inverse;
    const float* __restrict factor = a.integer_factor;
    const Rounder round(a.element);
    uint32_t special = 0;
    int32_t sum_low = 0, sum_high = 0;
    for (int i = 0; i < k; ++i) {
        const float value = to_float(x[i]);
        special |= is_special(value);
        const int32_t integer = int32_t(round(value * inverse[i]) * factor[i]);
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

// v [count] in units of the token → element · factor as integers (floats still); returns Σ of squared errors in 1/64 of
// an integer unit. Those are integers themselves, so no order of summation changes which factor wins. Loops of a fixed
// width are kept as loops: unrolled, or with bytes among their numbers, they fill a quarter of a vector.
template <int width>
inline int32_t quantize_group(const float* __restrict v, int count, float factor, const Rounder& round,
                              float integer_scale, float* __restrict out) {
    const float inverse = 1.0f / factor, residual = integer_scale * 64, scale = integer_scale * factor;
    int32_t error = 0;
#pragma GCC unroll 1
    for (int i = 0; i < (width ? width : count); ++i) {
        const float integer = round(v[i] * inverse) * scale;
        const int32_t e = int32_t(__builtin_rintf(v[i] * residual)) - int32_t(integer) * 64;
        error += e * e;
        out[i] = integer;
    }
    return error;
}

// One group, in place, with the least factor that holds its largest value, or with the one below if that errs less.
template <int width>
inline void quantize_best(float* __restrict v, int count, const Element& e, const Rounder& round) {
    uint32_t bits = 0;
#pragma GCC unroll 1
    for (int i = 0; i < (width ? width : count); ++i) {
        const uint32_t magnitude = bits_of(v[i]) & 0x7fffffffu;
        bits = bits > magnitude ? bits : magnitude;
    }
    const float most = float(int8_max / e.max_integer()), needed = __builtin_ceilf(float_from_bits(bits) / round.top);
    const float holds = needed < 1 ? 1 : needed > most ? most : needed, below = holds > 1 ? holds - 1 : 1;
    alignas(64) float with[2][dynamic_group_limit];
    const int32_t error = quantize_group<width>(v, count, holds, round, float(e.integer_scale()), with[0]);
    const bool better = quantize_group<width>(v, count, below, round, float(e.integer_scale()), with[1]) < error;
    __builtin_memcpy(v, with[better], (width ? width : count) * sizeof(float));
}

// x [k] → integers in units of the token's own scale, which is returned; NaN if the row, times x_factor, holds NaN or
// Inf. `v` is memory for padded_k floats.
template <class T>
inline float quantize_dynamic_row(const T* __restrict x, int k, int padded_k, const Activation& a, float* __restrict v,
                                  int8_t* __restrict out, int32_t* sum) {
    const float* __restrict factor = a.inverse;
    const Rounder round(a.element);
    uint32_t special = 0, largest = 0;
    for (int i = 0; i < k; ++i) {
        v[i] = to_float(x[i]) * factor[i];
        special |= is_special(v[i]);
        const uint32_t magnitude = bits_of(v[i]) & 0x7fffffffu;
        largest = largest > magnitude ? largest : magnitude;
    }
    const float smallest = 0x1p-100f, found = float_from_bits(largest);
    const float top = a.group_size ? round.top * float(int8_max / a.element.max_integer()) : round.top;
    const float x_scale = (found > smallest ? found : smallest) / top, inverse = 1.0f / x_scale;
    for (int i = 0; i < k; ++i) v[i] *= inverse;
    for (int i = k; i < padded_k; ++i) v[i] = 0;
    if (special) {
        for (int i = 0; i < padded_k; ++i) out[i] = 0;
    } else if (a.group_size == 0) {
        const float scale = float(a.element.integer_scale());
        for (int i = 0; i < padded_k; ++i) out[i] = int8_t(int32_t(round(v[i]) * scale));
    } else {
        for (int i = 0; i < k; i += a.group_size) {
            const int count = k - i < a.group_size ? k - i : a.group_size;
            if (count == 16)
                quantize_best<16>(v + i, 16, a.element, round);
            else
                quantize_best<0>(v + i, count, a.element, round);
        }
        for (int i = 0; i < padded_k; ++i) out[i] = int8_t(int32_t(v[i]));
    }
    int32_t total = 0;
    for (int i = 0; i < padded_k; ++i) total += out[i];
    *sum = total;
    return special ? __builtin_nanf("") : x_scale;
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
