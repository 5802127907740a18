// W4A16 for few rows without floats: a stretch of 64 activations (or of a group of weights) shares an exponent, and
// each is a fixed-point number of digits to the base 256 (fixed_rows.h). 16-bit numbers have three digits, up to 3 rows
// of them multiply so; fp32 numbers have five, and one row does.
//
// Digits are int8 operands of exact sums: a tile of codes costs 5 + 6 instructions a row, or 5 + 10, in place of 23,
// and sums round once a stretch in place of once an input. What digits do not hold is multiplied as floats afterwards.
#pragma once
#include "fixed_rows.h"
#include "gemm_w4a16.h"

namespace llmfp4::cpu::LLMFP4_ISA {

constexpr int fixed_tiles = 6, fixed_rows = 3;

// Σ_p sum[p] · 256^(1 - p), rounded twice, or four times.
template <int digits>
inline F32 value_of_digits(const I32 (&sum)[digits]) {
    const auto pair = [&](int p) { return to_float(add(shift_left<digit_bits>(sum[p]), sum[p + 1])); };
    if constexpr (digits == 3) return fma(pair(0), to_float(sum[2]), f32_all(1.0f / 256));
    return fma(fma(pair(0), pair(digits - 3), f32_all(0x1p-16f)), to_float(sum[digits - 1]), f32_all(0x1p-24f));
}

// MT rows times NT adjacent tiles of 16 outputs, all of k: what digits hold.
template <int MT, int NT, int digits>
inline void multiply_fixed(const Weights& w, const IntegerTable& table, const FixedRows<digits>& x, int row, int tile,
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
            const Ahead ahead(kt, tiles_k, NT);
            each<NT>([&](int t) {
                const Tile codes_16x8 = stream_tile(codes + (t * tiles_k + kt) * tile_bytes, ahead);
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
template <int digits>
inline void add_lone(const Weights& w, const FloatTable& table, const FixedRows<digits>& x, int row, int tile,
                     float* sums) {
    const int* lone = x.lone + row * FixedRows<digits>::most_lone(x.padded_k);
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

template <int digits>
inline void few_fixed(const Weights& w, const Call& call, const FixedRows<digits>& x, int begin, int end) {
    const IntegerTable table(w.element);
    const FloatTable floats = float_table(w.element);
    const FloatRows as_floats{x.floats, x.padded_k, nullptr};
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

template <int digits>
inline void w4a16_with_digits(const Weights& w, const float* x_factor, const Call& call) {
    const auto x = fix_rows<digits>(w, x_factor, call, IntegerTable(w.element).offset);
    parallel_ranges(call.threads, long(w.at.tiles_n()),
                    [&](long begin, long end) { few_fixed(w, call, x, int(begin), int(end)); });
}

// Products with an x_factor are fp32 numbers. One row of them pays, more do not.
inline bool needs_five(const Weights& w, const Call& call) { return call.dtype == Dtype::f32 || w.smoothed; }

inline bool takes_fixed(const Weights& w, const Call& call) {
    return call.m <= (needs_five(w, call) ? 1 : fixed_rows) && w.group_size <= longest_stretch;
}

inline void w4a16_fixed(const Weights& w, const float* x_factor, const Call& call) {
    (needs_five(w, call) ? w4a16_with_digits<5> : w4a16_with_digits<3>)(w, x_factor, call);
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
