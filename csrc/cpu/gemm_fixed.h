// W4A16 for up to 3 rows of 16-bit numbers, without floats: a stretch of 64 activations (or of a group of weights)
// shares an exponent, and each is a fixed-point number of three digits to the base 256:
//
//     x[k] = 2^(e - 6) · Σ_p digit[p][k] · 256^-p     -128 ≤ digit < 128, 2^e ≤ largest |x| of the stretch < 2^(e + 1)
//
// Digits are int8 operands of exact sums: a tile of codes costs 5 + 6 instructions a row in place of 23, and sums round
// once a stretch in place of once an input. Numbers that digits do not hold whole, those far below the largest of their
// stretch, have digits of zero and multiply as floats afterwards, one by one. A row with NaN, Inf, exponents below -100
// or too many of these takes the way of gemm_w4a16.h.
//
// Tried: five digits, which fp32 numbers need. One row took as long as with floats, four took 1.7 times as long.
#pragma once
#include "gemm_w4a16.h"

namespace llmfp4::cpu::LLMFP4_ISA {

constexpr int digits = 3, digit_bits = 8, stretch_k = 64, longest_stretch = 512;  // 512 · 64 · 128 · 257 < 2^31
constexpr int least_exponent = -100, fixed_tiles = 6, fixed_rows = 3;

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
template <int width>
inline bool digits_of_stretch(const float* __restrict x, int count, float to_fixed, int8_t* __restrict out, size_t ld,
                              int32_t* __restrict sums) {
    constexpr int32_t offsets = 0x00808080;
    const int size = width ? width : count;
    int32_t packed[longest_stretch], sum[digits] = {};
    uint32_t rest = 0;
    for (int i = 0; i < size; ++i) {
        const float fixed = x[i] * to_fixed;
        const int32_t whole = int32_t(fixed), above = whole + offsets;
        // What is far below the largest may underflow; 128 may come first.
        rest |= uint32_t(float(whole) != fixed) | uint32_t((fixed == 0.0f) != (x[i] == 0.0f)) | uint32_t(above) >> 24;
        packed[i] = above ^ offsets;
        sum[0] += int8_t(packed[i] >> 16);
        sum[1] += int8_t(packed[i] >> 8);
        sum[2] += int8_t(packed[i]);
    }
    for (int p = 0; p < digits; ++p) {
        for (int i = 0; i < size; ++i) out[p * ld + i] = int8_t(packed[i] >> (16 - 8 * p));
        sums[p] = sum[p];
    }
    return rest;
}

// Takes what digits do not hold whole out of a stretch. Returns false if there is no room for it.
inline bool set_apart(const FixedRows& x, int r, int first, int count, float to_fixed, int8_t* out, int32_t* sums) {
    const float* values = x.floats + r * x.padded_k;
    for (int i = first; i < first + count; ++i) {
        int8_t one[digits];
        int32_t sums_of_one[digits];
        if (!digits_of_stretch<1>(values + i, 1, to_fixed, one, 1, sums_of_one)) continue;
        for (int p = 0; p < digits; ++p) {
            out[p * x.ld + i] = 0;
            sums[p] -= one[p];
        }
        if (x.lone_count[r] == FixedRows::most_lone(x.padded_k)) return false;
        x.lone[r * FixedRows::most_lone(x.padded_k) + x.lone_count[r]++] = i;
    }
    return true;
}

// Row r of x.floats → digits, starts, units. Returns false if it must multiply as floats.
template <int width>
inline bool fix_row(const FixedRows& x, int r, int offset, float weight_unit) {
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
        if (digits_of_stretch<width>(values + first, count, to_fixed, out + first, x.ld, sums) &&
            !set_apart(x, r, first, count, to_fixed, out, sums))
            return false;
        for (int p = 0; p < digits; ++p) x.starts[(size_t(r) * digits + p) * x.stretches + s] = -offset * sums[p];
        x.unit[size_t(r) * x.stretches + s] =
            top ? float_from_bits(uint32_t(127 - 6 - digit_bits + exponent) << 23) * weight_unit : 0.0f;
    }
    return true;
}

inline bool fix_row(const FixedRows& x, int r, int offset, float weight_unit) {
    if (x.stretch == 64) return fix_row<64>(x, r, offset, weight_unit);
    if (x.stretch == 32) return fix_row<32>(x, r, offset, weight_unit);
    if (x.stretch == 16) return fix_row<16>(x, r, offset, weight_unit);
    return fix_row<0>(x, r, offset, weight_unit);
}

inline FixedRows fix_rows(const Weights& w, const float* x_factor, const Call& call, int offset) {
    FixedRows x;
    x.padded_k = w.at.padded_k(), x.ld = spread_stride(x.padded_k);
    x.stretch = w.scale_kind == ScaleKind::none ? stretch_k : w.group_size;
    x.stretches = int((x.padded_k + x.stretch - 1) / x.stretch);
    const size_t rows = call.m, lone = FixedRows::most_lone(x.padded_k);
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

// Σ_p sum[p] · 256^(1 - p), rounded twice.
inline F32 value_of_digits(const I32 (&sum)[digits]) {
    const F32 high = to_float(add(shift_left<digit_bits>(sum[0]), sum[1]));
    return fma(high, to_float(sum[2]), f32_all(1.0f / 256));
}

// MT rows times NT adjacent tiles of 16 outputs, all of k: what digits hold.
template <int MT, int NT>
inline void multiply_fixed(const Weights& w, const IntegerTable& table, const FixedRows& x, int row, int tile,
                           float* sums, size_t ld) {
    const size_t tiles_k = w.at.tiles_k(), stretch_tiles = x.stretch / tile_k;
    const bool grouped = w.scale_kind != ScaleKind::none;
    const uint8_t* codes = w.codes + tile * tiles_k * tile_bytes;
    F32 total[MT][NT];
    each<MT, NT>([&](int i, int t) { total[i][t] = f32_zero(); });
    for (int s = 0; s < x.stretches; ++s) {
        if (grouped && s >= w.groups) break;  // only padding is left
        const size_t begin = s * stretch_tiles;
        const size_t end = begin + stretch_tiles < tiles_k ? begin + stretch_tiles : tiles_k;
        I32 acc[NT][MT][digits];
        each<MT, digits>([&](int i, int p) {
            const I32 start = i32_all(x.starts[(size_t(row + i) * digits + p) * x.stretches + s]);
            each<NT>([&](int t) { acc[t][i][p] = start; });
        });
        for (size_t kt = begin; kt < end; ++kt) {
            const int8_t* xs = x.row(row) + kt * tile_k;
            each<NT>([&](int t) {
                const Tile codes_16x8 = stream_tile(codes + (t * tiles_k + kt) * tile_bytes);
                const Bytes low = decode_low(codes_16x8, table.bytes), high = decode_high(codes_16x8, table.bytes);
                each<MT, digits>([&](int i, int p) {
                    const int8_t* of_digit = xs + (i * digits + p) * x.ld;
                    acc[t][i][p] = dot4(dot4(acc[t][i][p], low, of_digit), high, of_digit + 4);
                });
            });
        }
        each<NT>([&](int t) {
            const uint8_t* scales = w.group_scale + (size_t(tile + t) * w.groups + s) * tile_n;
            const F32 scale = grouped ? load_scales(w.scale_kind, scales) : f32_all(1.0f);
            each<MT>([&](int i) {
                const F32 unit = f32_all(x.unit[size_t(row + i) * x.stretches + s]);
                total[i][t] = fma(total[i][t], mul(value_of_digits(acc[t][i]), unit), scale);
            });
        });
    }
    each<MT, NT>([&](int i, int t) { store(sums + i * ld + t * tile_n, total[i][t]); });
}

// Adds to the sums of a tile what digits do not hold.
inline void add_lone(const Weights& w, const FloatTable& table, const FixedRows& x, int row, int tile, float* sums) {
    const int* lone = x.lone + row * FixedRows::most_lone(x.padded_k);
    F32 total = load(sums);
    for (int i = 0; i < x.lone_count[row]; ++i) {
        const int k = lone[i], kt = k / tile_k, nibble = 2 * (k % 4) + k % tile_k / 4;
        const Tile codes = load_tile(w.codes + (tile * w.at.tiles_k() + kt) * tile_bytes);
        F32 column = decode_column(codes, table, nibble);
        if (w.scale_kind != ScaleKind::none) column = mul(column, scales_of_tile(w, tile, kt));
        total = fma(total, column, x.floats + row * x.padded_k + k);
    }
    store(sums, total);
}

inline void few_fixed(const Weights& w, const Call& call, const FixedRows& x, int begin, int end) {
    const IntegerTable table(w.element);
    const FloatTable floats = float_table(w.element);
    const FloatRows as_floats{x.floats, x.padded_k};
    constexpr size_t ld = fixed_tiles * tile_n;
    float sums[fixed_rows * ld];
    for (int tile = begin; tile < end; tile += fixed_tiles) {
        const int tiles = end - tile < fixed_tiles ? end - tile : fixed_tiles;
        for (int row = 0; row < call.m;)
            row += with_block<fixed_rows>(call.m - row, [&](auto mt) {
                constexpr int width = digits * mt <= 6 ? 3 : 2;
                for (int t = 0; t < tiles;)
                    t += with_block<width>(tiles - t, [&](auto nt) {
                        multiply_fixed<mt, nt>(w, table, x, row, tile + t, sums + row * ld + t * tile_n, ld);
                    });
            });
        for (int row = 0; row < call.m; ++row)
            for (int t = 0; t < tiles; ++t) {
                float* of_tile = sums + row * ld + t * tile_n;
                if (x.lone_count[row] < 0)
                    multiply_float_fused<1, 1>(w, floats, as_floats, row, tile + t, of_tile, ld);
                else if (x.lone_count[row])
                    add_lone(w, floats, x, row, tile + t, of_tile);
            }
        finish_float_rows(w, call, nullptr, 0, call.m, tile * tile_n, outputs_from(w, tile, tiles), sums, ld);
    }
}

// Products with an x_factor are fp32 numbers.
inline bool takes_fixed(const Weights& w, const Call& call) {
    return call.m <= fixed_rows && call.dtype != Dtype::f32 && !w.smoothed && w.group_size <= longest_stretch;
}

inline void w4a16_fixed(const Weights& w, const float* x_factor, const Call& call) {
    const FixedRows x = fix_rows(w, x_factor, call, IntegerTable(w.element).offset);
    parallel_ranges(useful_threads(w, call), long(w.at.tiles_n()),
                    [&](long begin, long end) { few_fixed(w, call, x, int(begin), int(end)); });
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
