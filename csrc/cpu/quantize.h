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

// Rounds numbers in an element's units to the element: saturating, ties to the even step. What rounds to zero is +0.
struct Rounder {
    float top;
    uint32_t to_anchor, smallest;

    explicit Rounder(Element e)
        : top(float(e.max_integer()) / float(e.integer_scale())),
          to_anchor((uint32_t(23 - e.mantissa_bits) << 23) + 0x00400000u),
          smallest(uint32_t(127 + 1 - e.bias) << 23) {}

    float operator()(float v) const {
        const float below = v < top ? v : top, clipped = below > -top ? below : -top;
        uint32_t binade = bits_of(clipped) & 0x7f800000u;
        binade = binade > smallest ? binade : smallest;
        // 1.5·2^23 steps of this binade: adding it rounds to a whole step, ties to even, on both sides of zero.
        const float anchor = float_from_bits(binade + to_anchor);
        return (clipped + anchor) - anchor;
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

// Loops of a fixed width are kept as loops: unrolled, or with bytes among their numbers, they fill a quarter of a
// vector.
template <int width>
inline float largest_of(const float* __restrict v, int count) {
    uint32_t bits = 0;
#pragma GCC unroll 1
    for (int i = 0; i < (width ? width : count); ++i) {
        const uint32_t magnitude = bits_of(v[i]) & 0x7fffffffu;
        bits = bits > magnitude ? bits : magnitude;
    }
    return float_from_bits(bits);
}

// The two factors that each of some groups may have: the least that holds its largest value, and the one below.
constexpr int groups_at_once = 16;
struct Factors {
    int holds[groups_at_once], below[groups_at_once];
    float inverse_holds[groups_at_once], inverse_below[groups_at_once];

    // largest [groups_at_once]: of the groups, in units of the token.
    Factors(const float* __restrict largest, float top, int most) {
        for (int g = 0; g < groups_at_once; ++g) {  // without ceil and conditions of floats, which gcc leaves scalar
            const float needed = largest[g] / top;
            const int whole = int(needed), ceil = whole + (needed > float(whole)), some = ceil > 1 ? ceil : 1;
            holds[g] = some < most ? some : most;
            below[g] = holds[g] > 2 ? holds[g] - 1 : 1;
            inverse_holds[g] = 1.0f / float(holds[g]);
            inverse_below[g] = 1.0f / float(below[g]);
        }
    }
};

// v [count] in units of the token → element · factor as integers, with the factor of group g that errs less. Squared
// errors are compared in 1/64 of an integer unit: integers themselves, so no order of summation changes which one wins;
// (e - 64h)² - (e - 64b)² = 128 · (b - h) · (e - 32(h + b)).
template <int width>
inline void quantize_group(const float* __restrict v, int count, const Factors& f, int g, const Rounder& round,
                           float integer_scale, int8_t* __restrict out) {
    alignas(64) int32_t with[2][dynamic_group_limit];
    const float inverse[2] = {f.inverse_holds[g], f.inverse_below[g]};
    const float scale[2] = {integer_scale * float(f.holds[g]), integer_scale * float(f.below[g])};
    const float residual = integer_scale * 64;
    int32_t excess = 0;  // of the error with the larger factor, / 128
#pragma GCC unroll 1
    for (int i = 0; i < (width ? width : count); ++i) {
        const int32_t exact = int32_t(__builtin_rintf(v[i] * residual));
        const int32_t holds = int32_t(round(v[i] * inverse[0]) * scale[0]);
        const int32_t below = int32_t(round(v[i] * inverse[1]) * scale[1]);
        excess += (below - holds) * (exact - 32 * (holds + below));
        with[0][i] = holds;
        with[1][i] = below;
    }
    const int32_t* __restrict best = with[excess > 0];
#pragma GCC unroll 1
    for (int i = 0; i < (width ? width : count); ++i) out[i] = int8_t(best[i]);
}

template <int width>
inline void quantize_groups(const float* __restrict v, int k, int group_size, const Element& e, const Rounder& round,
                            int8_t* __restrict out) {
    const int most = int8_max / e.max_integer();
    const float integer_scale = float(e.integer_scale());
    const auto size_at = [&](int i) { return k - i < group_size ? k - i : group_size; };
    for (int begin = 0; begin < k; begin += groups_at_once * group_size) {
        alignas(64) float largest[groups_at_once] = {};
        for (int g = 0, i = begin; g < groups_at_once && i < k; ++g, i += group_size)
            largest[g] = largest_of<width>(v + i, size_at(i));
        const Factors factors(largest, round.top, most);
        for (int g = 0, i = begin; g < groups_at_once && i < k; ++g, i += group_size)
            quantize_group<width>(v + i, size_at(i), factors, g, round, integer_scale, out + i);
    }
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
    } else if (a.group_size == 16) {  // zeros of the padding change neither the largest value nor an error
        quantize_groups<16>(v, int(round_up(k, 16)), 16, a.element, round, out);
    } else {
        quantize_groups<0>(v, k, a.group_size, a.element, round, out);
    }
    for (int i = k; i < padded_k; ++i) out[i] = 0;
    int32_t total = 0;
    for (int i = 0; i < padded_k; ++i) total += out[i];
    *sum = total;
    return special ? __builtin_nanf("") : x_scale;
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
