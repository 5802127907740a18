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

// Rounds numbers in an element's units, or in those of its integers, to the element: saturating, ties to the even step.
// What rounds to zero is +0.
struct Rounder {
    float top;
    uint32_t to_anchor, smallest;

    explicit Rounder(Element e, bool integers = false)
        : top(float(e.max_integer()) / float(integers ? 1 : e.integer_scale())),
          to_anchor((uint32_t(23 - e.mantissa_bits) << 23) + 0x00400000u),
          smallest(uint32_t(integers ? 127 + e.mantissa_bits : 127 + 1 - e.bias) << 23) {}

    LLMFP4_INLINE float operator()(float v) const {
        const float below = v < top ? v : top, clipped = below > -top ? below : -top;
        return whole_steps(clipped);
    }
    // The same for what exceeds the element's largest by less than half a step.
    LLMFP4_INLINE float whole_steps(float v) const {
        uint32_t binade = bits_of(v) & 0x7f800000u;
        binade = binade > smallest ? binade : smallest;
        // 1.5·2^23 steps of this binade: adding it rounds to a whole step, ties to even, on both sides of zero.
        const float anchor = float_from_bits(binade + to_anchor);
        return (v + anchor) - anchor;
    }
};

// Of NaN and Inf magnitudes are the largest as bits.
inline uint32_t magnitude_of(float value) { return bits_of(value) & 0x7fffffffu; }
inline bool is_special(uint32_t magnitude) { return magnitude >= 0x7f800000u; }

// x [k] → element(code) · integer_factor, padded with zeros to padded_k. `sums` are those of the planes. Returns false
// if the row holds NaN or Inf.
template <int planes, class T>
inline bool quantize_row(const T* __restrict x, int k, int padded_k, const Activation& a, int8_t* __restrict low,
                         int8_t* __restrict high, int32_t* sums) {
    const float* __restrict inverse = a.inverse;
    const float* __restrict factor = a.integer_factor;
    const Rounder round(a.element);
    uint32_t largest = 0;
    int32_t sum_low = 0, sum_high = 0;
    for (int i = 0; i < k; ++i) {
        const float value = to_float(x[i]);
        const uint32_t magnitude = magnitude_of(value);
        largest = largest > magnitude ? largest : magnitude;
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
    return !is_special(largest);
}

inline float largest_of(const float* __restrict v, int count) {
    uint32_t bits = 0;
    for (int i = 0; i < count; ++i) {
        const uint32_t magnitude = magnitude_of(v[i]);
        bits = bits > magnitude ? bits : magnitude;
    }
    return float_from_bits(bits);
}

// The two factors that each of some groups may have: the least that holds its largest value, and the one below.
constexpr int groups_at_once = 16;
struct Factors {
    float holds[groups_at_once], below[groups_at_once], inverse_holds[groups_at_once], inverse_below[groups_at_once];

    // largest [groups_at_once]: of the groups, in integer units of the token.
    LLMFP4_INLINE void choose(const float* __restrict largest, float top, int most) {
        for (int g = 0; g < groups_at_once; ++g) {  // without ceil and conditions of floats, which gcc leaves scalar
            const float needed = largest[g] / top;
            const int whole = int(needed), ceil = whole + (needed > float(whole)), some = ceil > 1 ? ceil : 1;
            const int h = some < most ? some : most, b = h > 2 ? h - 1 : 1;
            holds[g] = float(h);
            below[g] = float(b);
            inverse_holds[g] = 1.0f / holds[g];
            inverse_below[g] = 1.0f / below[g];
        }
    }
};

// Both of what a value in integer units becomes, and how much more the larger factor errs: (e - h)² - (e - b)² =
// (b - h) · (2e - h - b), e being the value to 1/64. That is a multiple of 1/32 below 2^12: sums of 16 are exact as
// floats, those of 256 as integers, so no order of summation changes which one wins.
LLMFP4_INLINE float excess_of(float v, const Rounder& round, const Factors& f, int g, float& holds, float& below) {
    const float to_64th = 1.5f * 0x1p17f, exact = (v + to_64th) - to_64th;
    // A value exceeds the element's largest times `holds` by its own rounding at most.
    const float h = round.whole_steps(v * f.inverse_holds[g]) * f.holds[g];
    const float b = round(v * f.inverse_below[g]) * f.below[g];
    holds = h;
    below = b;
    return (b - h) * ((exact - h) + (exact - b));
}

// v [k] in integer units of the token → element · factor. Returns their sum.
inline int32_t quantize_groups(const float* __restrict v, int k, int group_size, int most, const Rounder& round,
                               int8_t* __restrict out) {
    const auto size_at = [&](int i) { return k - i < group_size ? k - i : group_size; };
    int32_t total = 0;
    for (int begin = 0; begin < k; begin += groups_at_once * group_size) {
        float largest[groups_at_once] = {};
        for (int g = 0, i = begin; g < groups_at_once && i < k; ++g, i += group_size)
            largest[g] = largest_of(v + i, size_at(i));
        Factors factors;
        factors.choose(largest, round.top, most);
        for (int g = 0, i = begin; g < groups_at_once && i < k; ++g, i += group_size) {
            float with[2][dynamic_group_limit];
            int32_t excess = 0;
            for (int j = 0; j < size_at(i); ++j)
                excess += int32_t(32 * excess_of(v[i + j], round, factors, g, with[0][j], with[1][j]));
            const float* __restrict best = with[excess > 0];
            for (int j = 0; j < size_at(i); ++j) {
                out[i + j] = int8_t(int32_t(best[j]));
                total += int32_t(best[j]);
            }
        }
    }
    return total;
}

// The same for groups of 16, which all 16 lanes hold: v [count] times `scale`, zeros up to a multiple of 256 (they
// change neither the largest value nor an error). Several blocks of 16 groups take each step together, or every step
// waits for the end of the last.
inline int32_t quantize_groups_of_16(const float* __restrict v, int count, float scale, int most, const Rounder& round,
                                     int8_t* __restrict out) {
    constexpr int size = 16, block = groups_at_once * size, most_blocks = 3, most_here = most_blocks * block;
    alignas(64) int32_t totals[size] = {}, integers[most_here], chosen[most_blocks * groups_at_once];
    alignas(64) float values[most_here], with[2 * most_here], sums[most_blocks * groups_at_once];
    alignas(64) Factors factors[most_blocks];
    for (int left = count; left > 0; left -= most_here, v += most_here, out += most_here) {
        const int here = left < most_here ? left : most_here;
        const int blocks = (here + block - 1) / block, groups = (here + size - 1) / size;
        for (int i = 0; i < blocks * block; ++i) {
            values[i] = v[i] * scale;
            with[i] = float_from_bits(magnitude_of(values[i]));
        }
        for (int b = 0; b < blocks; ++b) max_of_rows(with + b * block, sums + b * groups_at_once);
        for (int b = 0; b < blocks; ++b) factors[b].choose(sums + b * groups_at_once, round.top, most);
        for (int g = 0; g < groups; ++g)
#pragma GCC unroll 1
            for (int i = g * size; i < (g + 1) * size; ++i)
                values[i] = excess_of(values[i], round, factors[g / groups_at_once], g % groups_at_once, with[i],
                                      with[most_here + i]);
        for (int b = 0; b < blocks; ++b) sum_of_rows(values + b * block, sums + b * groups_at_once);
        for (int g = 0; g < blocks * groups_at_once; ++g) chosen[g] = sums[g] > 0 ? most_here : 0;
        for (int g = 0; g < groups; ++g) {
            const float* __restrict best = with + chosen[g] + g * size;
#pragma GCC unroll 1
            for (int i = 0; i < size; ++i) integers[g * size + i] = int32_t(best[i]);
        }
        for (int g = 0; g < groups; ++g)
            for (int i = 0; i < size; ++i) totals[i] += integers[g * size + i];
        for (int i = 0; i < here; ++i) out[i] = int8_t(integers[i]);
    }
    int32_t total = 0;
    for (int i = 0; i < size; ++i) total += totals[i];
    return total;
}

// Floats of memory that quantize_dynamic_row needs.
inline size_t dynamic_floats(size_t padded_k) { return round_up(padded_k, 256); }

// x [k] → integers in units of the token's own scale, which is returned; NaN if the row, times x_factor, holds NaN or
// Inf. `v` is memory for dynamic_floats.
template <class T>
inline float quantize_dynamic_row(const T* __restrict x, int k, int padded_k, const Activation& a, float* __restrict v,
                                  int8_t* __restrict out, int32_t* sum) {
    const float* __restrict factor = a.inverse;
    const Rounder round(a.element, true);
    uint32_t largest = 0;
    for (int i = 0; i < k; ++i) {
        v[i] = to_float(x[i]) * factor[i];
        const uint32_t magnitude = magnitude_of(v[i]);
        largest = largest > magnitude ? largest : magnitude;
    }
    *sum = 0;
    if (is_special(largest)) {
        for (int i = 0; i < padded_k; ++i) out[i] = 0;
        return __builtin_nanf("");
    }
    const int most = a.group_size ? int8_max / a.element.max_integer() : 1;  // factor of a group
    const float unit = float(a.element.integer_scale());
    const float smallest = 0x1p-100f, found = float_from_bits(largest);
    const float x_scale = (found > smallest ? found : smallest) / (round.top / unit * float(most));
    const float inverse = 1.0f / x_scale * unit;
    if (a.group_size == 0) {
        int32_t total = 0;
        for (int i = 0; i < k; ++i) {
            const int32_t integer = int32_t(round(v[i] * inverse));
            out[i] = int8_t(integer);
            total += integer;
        }
        *sum = total;
    } else if (a.group_size == 16) {
        for (size_t i = k; i < dynamic_floats(padded_k); ++i) v[i] = 0;
        *sum = quantize_groups_of_16(v, padded_k, inverse, most, round, out);
    } else {
        for (int i = 0; i < k; ++i) v[i] *= inverse;
        *sum = quantize_groups(v, k, a.group_size, most, round, out);
    }
    for (int i = k; i < padded_k; ++i) out[i] = 0;
    return x_scale;
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
