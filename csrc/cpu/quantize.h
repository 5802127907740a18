// Rows of activations become int8 operands, rounded as llmfp4_kernels/reference.py does, bit by bit.
#pragma once
#include <type_traits>

#include "quantize_groups.h"
#include "rows.h"

namespace llmfp4::cpu::LLMFP4_ISA {

// An integer operand that does not fit int8 is split into planes, low + 128·high. Only E3M0 with a shift needs two: its
// values are single powers of two up to 64·2^7, so one plane of each is zero and both fit.
inline int planes_of(const Activation& a) {
    return a.element.max_integer() << (a.shifted ? a.element.max_shift() : 0) > int8_max ? 2 : 1;
}

// Of NaN and Inf magnitudes are the largest as bits.
inline uint32_t magnitude_of(float value) { return bits_of(value) & 0x7fffffffu; }
inline bool is_special(uint32_t magnitude) { return magnitude >= 0x7f800000u; }
inline uint32_t largest_bits(F32 magnitudes) {
    alignas(64) float lane[lanes];
    store(lane, magnitudes);
    uint32_t largest = 0;
    for (const float magnitude : lane) largest = largest > bits_of(magnitude) ? largest : bits_of(magnitude);
    return largest;
}
inline int32_t sum_of(I32 sums) {
    alignas(64) int32_t lane[lanes];
    store(lane, sums);
    int32_t sum = 0;
    for (const int32_t s : lane) sum += s;
    return sum;
}

// A row of activations, 64 at a time: as floats, with zeros behind its end.
template <class T>
struct Row {
    const T* x;
    int k;
    alignas(64) float buffer[pad_k];

    const float* at(int i) {
        if constexpr (std::is_same_v<T, float>)
            if (k - i >= pad_k) return x + i;
        const T* __restrict from = x + i;
        if (k - i >= pad_k) {
            for (int j = 0; j < pad_k; ++j) buffer[j] = to_float(from[j]);
        } else {
            for (int j = 0; j < k - i; ++j) buffer[j] = to_float(from[j]);
            for (int j = k - i; j < pad_k; ++j) buffer[j] = 0;
        }
        return buffer;
    }
};

// x [k] → element(code) · integer_factor, padded with zeros to padded_k. `sums` are those of the planes. Returns false
// if the row holds NaN or Inf.
template <int planes, class T>
inline bool quantize_row(const T* x, int k, int padded_k, const Activation& a, int8_t* low, int8_t* high,
                         int32_t* sums) {
    Row<T> row{x, k};
    const Rounder round(a.element);
    const F32 to_high = f32_all(1.0f / plane_weight), to_low = f32_all(-plane_weight), to_whole = f32_all(0x1.8p23f);
    F32 largest = f32_zero();
    I32 sum[2] = {i32_all(0), i32_all(0)};
    for (int i = 0; i < padded_k; i += pad_k) {
        const float* values = row.at(i);
        F32 integers[4];
        each<4>([&](int j) {
            const F32 value = load(values + j * lanes);
            largest = larger(largest, magnitude(value));
            integers[j] = round.clipped(mul(value, load(a.inverse + i + j * lanes)));
        });
        round.whole_steps(integers);
        each<4>([&](int j) { integers[j] = mul(integers[j], load(a.integer_factor + i + j * lanes)); });
        if constexpr (planes == 2) {
            F32 whole[4];
            each<4>([&](int j) {
                whole[j] = sub(fma(to_whole, integers[j], to_high), to_whole);  // half of the weight is even: 0
                integers[j] = fma(integers[j], whole[j], to_low);
            });
            sum[1] = store_integers(whole, high + i, sum[1]);
        }
        sum[0] = store_integers(integers, low + i, sum[0]);
    }
    for (int p = 0; p < planes; ++p) sums[p] = sum_of(sum[p]);
    return !is_special(largest_bits(largest));
}

// Where the groups of a row are quantized: where they lie, or, if they do not fill whole registers, spread to such.
struct GroupLayout {
    int groups, size;
    bool in_place;
    int values;  // zeros up to 16 groups included

    GroupLayout(const Activation& a, int padded_k)
        : groups((padded_k + a.group_size - 1) / a.group_size),
          size(int(round_up(a.group_size, lanes))),
          in_place(size == a.group_size),
          values(int(round_up(size_t(groups) * size, lanes * size))) {}
};

// Floats of memory that quantize_dynamic_row needs.
inline size_t dynamic_floats(const Activation& a, int padded_k) {
    if (a.group_size == 0) return padded_k;
    const GroupLayout at(a, padded_k);
    return at.in_place ? at.values : padded_k + size_t(at.values) + at.values / sizeof(float);
}

// v [padded_k], zero from k on, times `scale` → integers. Returns their sum.
inline int32_t quantize_groups(float* v, int padded_k, const Activation& a, float scale, int most, const Rounder& round,
                               int8_t* out) {
    const GroupLayout at(a, padded_k);
    const F32 scales = f32_all(scale);
    float* values = at.in_place ? v : v + padded_k;
    int8_t* integers = at.in_place ? out : reinterpret_cast<int8_t*>(values + at.values);
    const int count = at.in_place ? padded_k : at.values;
    const auto each_value = [&](auto&& f) {  // of the row, of the layout
        for (int i = 0; i < padded_k; ++i) f(i, i / a.group_size * at.size + i % a.group_size);
    };
    for (int i = at.in_place ? padded_k : 0; i < at.values; ++i) values[i] = 0;
    if (!at.in_place) each_value([&](int of_row, int i) { values[i] = v[of_row]; });
    const I32 sum = at.size == lanes  // known beforehand: no division for each register
                        ? quantize_groups_of(values, lanes, count, scales, most, round, integers)
                        : quantize_groups_of(values, at.size, count, scales, most, round, integers);
    if (!at.in_place) each_value([&](int of_row, int i) { out[of_row] = integers[i]; });
    return sum_of(sum);
}

// v [padded_k] times `scale` → integers. Returns their sum.
template <bool even_steps>
inline int32_t quantize_values(const float* v, int padded_k, const Rounder& round, float scale, int8_t* out) {
    const F32 scales = f32_all(scale);
    I32 sum = i32_all(0);
    for (int i = 0; i < padded_k; i += pad_k) {
        F32 integers[4];
        each<4>([&](int j) { integers[j] = round.clipped(mul(load(v + i + j * lanes), scales)); });
        if (!even_steps) round.whole_steps(integers);
        sum = store_integers(integers, out + i, sum);
    }
    return sum_of(sum);
}

// x [k] → integers in units of the token's own scale, which is returned; NaN if the row, times x_factor, holds NaN or
// Inf. `v` is memory for dynamic_floats.
template <class T>
inline float quantize_dynamic_row(const T* x, int k, int padded_k, const Activation& a, float* v, int8_t* out,
                                  int32_t* sum) {
    Row<T> row{x, k};
    F32 magnitudes = f32_zero();
    for (int i = 0; i < padded_k; i += pad_k) {
        const float* values = row.at(i);
        each<4>([&](int j) {
            const F32 value = mul(load(values + j * lanes), load(a.inverse + i + j * lanes));
            store(v + i + j * lanes, value);
            magnitudes = larger(magnitudes, magnitude(value));
        });
    }
    const uint32_t largest = largest_bits(magnitudes);
    *sum = 0;
    if (is_special(largest)) {
        for (int i = 0; i < padded_k; ++i) out[i] = 0;
        return __builtin_nanf("");
    }
    const Rounder round(a.element, true);
    const int most = a.group_size ? int8_max / a.element.max_integer() : 1;  // factor of a group
    const float unit = float(a.element.integer_scale());
    const float smallest = 0x1p-100f, found = float_from_bits(largest);
    const float x_scale = (found > smallest ? found : smallest) / (round.top / unit * float(most));
    const float inverse = 1.0f / x_scale * unit;
    if (a.group_size)
        *sum = quantize_groups(v, padded_k, a, inverse, most, round, out);
    else if (a.element.exponent_bits == 1)  // steps of 1, to which int8 rounds
        *sum = quantize_values<true>(v, padded_k, round, inverse, out);
    else
        *sum = quantize_values<false>(v, padded_k, round, inverse, out);
    return x_scale;
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
