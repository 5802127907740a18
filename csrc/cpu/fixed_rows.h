// Rows of activations as fixed-point numbers of three or five digits to the base 256:
//
//     x[k] = 2^(e - 6) · Σ_p digit[p][k] · 256^-p     -128 ≤ digit < 128, 2^e ≤ largest |x| of the stretch < 2^(e + 1)
//
// Numbers that digits do not hold whole, those far below the largest of their stretch, have digits of zero and multiply
// as floats, one by one. A row with NaN, Inf, exponents below -100 or too many of these takes the way of gemm_w4a16.h.
#pragma once
#include "integer_rows.h"

namespace llmfp4::cpu::LLMFP4_ISA {

constexpr int digit_bits = 8, stretch_k = 64, longest_stretch = 512;  // 512 · 64 · 128 · 257 < 2^31
constexpr int least_exponent = -100;

template <int digits>
struct FixedRows {
    int8_t* at;  // digit p of row r at (r·digits + p)·ld
    size_t ld;
    int stretch, stretches;
    int32_t* starts;  // [rows · digits][stretches]: -offset · Σ of the digits
    float* unit;      // [rows][stretches]: worth of digit 1's sum
    float* floats;    // [rows][padded_k]: the activations themselves
    int* lone;        // [rows][most_lone]: inputs that multiply as floats
    int* lone_count;  // [rows]; -1: all of them
    size_t padded_k;

    static int most_lone(size_t padded_k) { return int(padded_k / 16); }
    const int8_t* row(int r) const { return at + size_t(r) * digits * ld; }
};

// One stretch of x [width, or count] → digits and their sums; returns whether an input is not held whole. With 128
// added to each digit, a number is its own digits.
template <int digits, int width>
inline bool digits_of_stretch(const float* __restrict x, int count, float to_fixed, int8_t* __restrict out, size_t ld,
                              int32_t* __restrict sums) {
    const int size = width ? width : count;
    int32_t high[longest_stretch], low[longest_stretch], sum[5] = {};
    uint32_t rest = 0;
    for (int i = 0; i < size; ++i) {
        const float fixed = x[i] * to_fixed;
        const int32_t cut = int32_t(fixed);
        const float left = fixed - float(cut);
        // Two more digits hold -32896 .. 32639. Without floor, which gcc leaves scalar.
        const int32_t up = digits == 3 ? 0 : int32_t(left > 0.498f) - int32_t(left < -0.502f);
        const int32_t whole = cut + up, above = whole + 0x00808080;
        // What is far below the largest may underflow; 128 may come first.
        rest |= uint32_t((fixed == 0.0f) != (x[i] == 0.0f)) | uint32_t(above) >> 24;
        high[i] = above ^ 0x00808080;
        sum[0] += int8_t(high[i] >> 16);
        sum[1] += int8_t(high[i] >> 8);
        sum[2] += int8_t(high[i]);
        if constexpr (digits == 3) {
            rest |= uint32_t(left != 0.0f);
        } else {
            const float second = (left - float(up)) * 0x1p16f;
            const int32_t more = int32_t(second), more_above = more + 0x8080;
            rest |= uint32_t(float(more) != second) | uint32_t(more_above) >> 16;
            low[i] = more_above ^ 0x8080;
            sum[3] += int8_t(low[i] >> 8);
            sum[4] += int8_t(low[i]);
        }
    }
    for (int p = 0; p < digits; ++p) {
        const int32_t* __restrict from = p < 3 ? high : low;
        const int shift = digit_bits * ((p < 3 ? 2 : 4) - p);
        for (int i = 0; i < size; ++i) out[p * ld + i] = int8_t(from[i] >> shift);
        sums[p] = sum[p];
    }
    return rest;
}

// Takes what digits do not hold whole out of a stretch. Returns false if there is no room for it.
template <int digits>
inline bool set_apart(const FixedRows<digits>& x, int r, int first, int count, float to_fixed, int8_t* out,
                      int32_t* sums) {
    const float* values = x.floats + r * x.padded_k;
    for (int i = first; i < first + count; ++i) {
        int8_t one[digits];
        int32_t sums_of_one[digits];
        if (!digits_of_stretch<digits, 1>(values + i, 1, to_fixed, one, 1, sums_of_one)) continue;
        for (int p = 0; p < digits; ++p) {
            out[p * x.ld + i] = 0;
            sums[p] -= one[p];
        }
        if (x.lone_count[r] == FixedRows<digits>::most_lone(x.padded_k)) return false;
        x.lone[r * FixedRows<digits>::most_lone(x.padded_k) + x.lone_count[r]++] = i;
    }
    return true;
}

// Row r of x.floats → digits, starts, units. Returns false if it must multiply as floats.
template <int width, int digits>
inline bool fix_row(const FixedRows<digits>& x, int r, int offset, float weight_unit) {
    const float* values = x.floats + r * x.padded_k;
    int8_t* out = x.at + size_t(r) * digits * x.ld;
    x.lone_count[r] = 0;
    for (int s = 0; s < x.stretches; ++s) {
        const int first = s * x.stretch, left = int(x.padded_k) - first;
        const int count = width ? width : left < x.stretch ? left : x.stretch;
        uint32_t top = 0;
        for (int i = first; i < first + count; ++i) {
            const uint32_t magnitude = magnitude_of(values[i]);
            top = magnitude > top ? magnitude : top;
        }
        const int exponent = int(top >> 23) - 127;
        if (exponent == 128 || (top && exponent < least_exponent)) return false;
        const float to_fixed = top ? float_from_bits(uint32_t(127 + 22 - exponent) << 23) : 0.0f;
        int32_t sums[digits];
        if (digits_of_stretch<digits, width>(values + first, count, to_fixed, out + first, x.ld, sums) &&
            !set_apart(x, r, first, count, to_fixed, out, sums))
            return false;
        for (int p = 0; p < digits; ++p) x.starts[(size_t(r) * digits + p) * x.stretches + s] = -offset * sums[p];
        x.unit[size_t(r) * x.stretches + s] =
            top ? float_from_bits(uint32_t(127 - 6 - digit_bits + exponent) << 23) * weight_unit : 0.0f;
    }
    return true;
}

template <int digits>
inline bool fix_row(const FixedRows<digits>& x, int r, int offset, float weight_unit) {
    if (x.stretch == 64) return fix_row<64>(x, r, offset, weight_unit);
    if (x.stretch == 32) return fix_row<32>(x, r, offset, weight_unit);
    if (x.stretch == 16) return fix_row<16>(x, r, offset, weight_unit);
    return fix_row<0>(x, r, offset, weight_unit);
}

template <int digits>
inline FixedRows<digits> fix_rows(const Weights& w, const float* x_factor, const Call& call, int offset) {
    FixedRows<digits> x;
    x.padded_k = w.at.padded_k(), x.ld = spread_stride(x.padded_k);
    x.stretch = w.scale_kind == ScaleKind::none ? stretch_k : w.group_size;
    x.stretches = int((x.padded_k + x.stretch - 1) / x.stretch);
    const size_t rows = call.m, lone = FixedRows<digits>::most_lone(x.padded_k);
    const size_t words = rows * (x.padded_k + x.stretches * (digits + 1) + lone + 1);
    auto* memory = static_cast<char*>(workspace(slot_rows, words * 4 + rows * digits * x.ld));
    x.floats = reinterpret_cast<float*>(memory);
    x.starts = reinterpret_cast<int32_t*>(x.floats + rows * x.padded_k);
    x.unit = reinterpret_cast<float*>(x.starts + rows * digits * x.stretches);
    x.lone = reinterpret_cast<int*>(x.unit + rows * x.stretches);
    x.lone_count = x.lone + rows * lone;
    x.at = reinterpret_cast<int8_t*>(x.lone_count + rows);
    const float weight_unit = 1.0f / float(w.element.integer_scale());
    with_dtype(call.dtype, [&](auto type) {
        const auto* source = static_cast<const decltype(type)*>(call.x);
        parallel_ranges(long(call.m) * w.at.k < 32768 ? 1 : call.threads, call.m, [&](long begin, long end) {
            for (int r = int(begin); r < int(end); ++r) {
                convert_row(source + r * call.ldx, w.at.k, int(x.padded_k), x_factor, x.floats + r * x.padded_k);
                if (!fix_row(x, r, offset, weight_unit)) x.lone_count[r] = -1;
            }
        });
    });
    return x;
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
