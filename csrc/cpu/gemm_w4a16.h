// Y[m,n] = (Σ_k x[m,k] · 2^(-shift[k]) · element(code[n,k]) · group_scale[n,k/G]) · row_scale[n] + bias[n] in fp32;
// activations of 16 or 32 bits are not rounded.
#pragma once
#include "gemm_w4a4.h"

namespace llmfp4::cpu::LLMFP4_ISA {

constexpr int float_panel_k = 128;  // 64 outputs x 128 inputs of fp32: 32 KiB
// 192 rows x 256 activations of fp32 and the sums of 192 x 512 outputs stay in the second-level cache, where a row of
// all k would not (m = 128 to 512: 1.1-1.19 times as long).
constexpr int float_stretch_k = 256, float_task_tiles = 32;

struct FloatRows {
    const float* at;
    size_t ld;
    const float* weight_factor;  // [k]: what decoded weights are multiplied by, or null
    const float* row(int r) const { return at + r * ld; }
};

template <class Table = FloatTable>
inline Table float_table(Element e, float unit = 1.0f) {
    float table[16];
    for (int code = 0; code < 16; ++code) table[code] = e.value(code) * unit;
    return Table(table);
}

inline FloatRows convert_rows(const Weights& w, const float* x_factor, const Call& call) {
    const int padded_k = int(w.at.padded_k());
    const size_t ld = spread_stride(padded_k * sizeof(float)) / sizeof(float);
    auto* rows = static_cast<float*>(workspace(slot_rows, call.m * ld * sizeof(float)));
    const int threads = threads_to_convert(long(call.m) * padded_k, call.threads);
    with_dtype(call.dtype, [&](auto type) {
        const auto* source = static_cast<const decltype(type)*>(call.x);
        parallel_ranges(threads, call.m, [&](long begin, long end) {
            for (long m = begin; m < end; ++m)
                convert_row(source + m * call.ldx, w.at.k, padded_k, x_factor, rows + m * ld);
        });
    });
    return {rows, ld, nullptr};
}

// The rows of many tokens: themselves where they are fp32 numbers that fill their tiles. Their factors go into the
// decoded weights then, and no copy is made (m = 512: 192 x 576 1.09 times as fast, 512 x 11008 1.1), but where rows
// a multiple of a page apart would share few cache sets (4096 x 4096: 0.93 of torch's fp32 against 1.0).
inline FloatRows rows_of_many(const Weights& w, const float* x_factor, const Call& call) {
    constexpr size_t page = 4096;
    const bool whole_tiles = size_t(w.at.k) == w.at.padded_k();
    if (call.dtype != Dtype::f32 || !w.foldable || !whole_tiles || call.ldx * sizeof(float) % page == 0)
        return convert_rows(w, x_factor, call);
    return {static_cast<const float*>(call.x), call.ldx, x_factor};
}

// x_scale [m], or null where the activations are themselves.
inline void finish_float_rows(const Weights& w, const Call& call, const float* x_scale, int m0, int rows, int n0,
                              int count, const float* sums, size_t ld) {
    with_dtype(call.dtype, [&](auto type) {
        using T = decltype(type);
        with_count(count, [&](auto outputs) {
            for (int r = 0; r < rows; ++r)
                finish_float_row(sums + r * ld, x_scale ? x_scale[m0 + r] : 1.0f, w.row_scale + n0,
                                 w.bias ? w.bias + n0 : nullptr, static_cast<T*>(call.y) + size_t(m0 + r) * w.at.n + n0,
                                 outputs);
        });
    });
}

template <int chains, int MT, int nibble>
inline void multiply_column(Tile codes, const FloatTable& table, const float* xs, size_t ldx, F32 (&acc)[chains][MT]) {
    const F32 column = decode_column<nibble>(codes, table);
    constexpr int c = nibble % chains;
    each<MT>([&](int i) { acc[c][i] = fma(acc[c][i], column, xs + i * ldx + k_of_nibble(nibble)); });
}

// MT rows times one tile of 8 inputs.
template <int chains, int MT>
inline void multiply_tile(Tile codes, const FloatTable& table, const float* xs, size_t ldx, F32 (&acc)[chains][MT]) {
    multiply_column<chains, MT, 0>(codes, table, xs, ldx, acc);
    multiply_column<chains, MT, 1>(codes, table, xs, ldx, acc);
    multiply_column<chains, MT, 2>(codes, table, xs, ldx, acc);
    multiply_column<chains, MT, 3>(codes, table, xs, ldx, acc);
    multiply_column<chains, MT, 4>(codes, table, xs, ldx, acc);
    multiply_column<chains, MT, 5>(codes, table, xs, ldx, acc);
    multiply_column<chains, MT, 6>(codes, table, xs, ldx, acc);
    multiply_column<chains, MT, 7>(codes, table, xs, ldx, acc);
}

// MT rows times NT tiles of 16 outputs, all of k, one group after the other.
template <int MT, int NT>
inline void multiply_float_fused(const Weights& w, const FloatTable& table, const FloatRows& x, int row, int tile,
                                 float* sums, size_t ld) {
    constexpr int chains = MT * NT <= most_chained ? 2 : 1;
    const size_t tiles_k = w.at.tiles_k();
    const bool grouped = w.scale_kind != ScaleKind::none;
    const size_t group_tiles = grouped ? w.group_size / tile_k : tiles_k;
    F32 total[NT][MT];
    each<NT, MT>([&](int t, int i) { total[t][i] = f32_zero(); });
    for (size_t group = 0, begin = 0; begin < tiles_k; ++group, begin += group_tiles) {
        if (grouped && int(group) >= w.groups) break;  // only padding is left
        const size_t end = begin + group_tiles < tiles_k ? begin + group_tiles : tiles_k;
        F32 acc[NT][chains][MT];
        each<NT, MT>([&](int t, int i) {
            for (auto& chain : acc[t]) chain[i] = f32_zero();
        });
        for (size_t kt = begin; kt < end; ++kt) {
            const Ahead ahead(kt, tiles_k, NT);
            each<NT>([&](int t) {
                const Tile codes = stream_tile(w.codes + ((tile + t) * tiles_k + kt) * tile_bytes, ahead);
                multiply_tile<chains, MT>(codes, table, x.row(row) + kt * tile_k, x.ld, acc[t]);
            });
        }
        each<NT, MT>([&](int t, int i) {
            if (chains == 2) acc[t][0][i] = add(acc[t][0][i], acc[t][chains - 1][i]);
        });
        each<NT>([&](int t) {
            if (!grouped) {
                each<MT>([&](int i) { total[t][i] = acc[t][0][i]; });
                return;
            }
            const F32 scale = load_scales(w.scale_kind, w.group_scale + (size_t(tile + t) * w.groups + group) * tile_n);
            each<MT>([&](int i) { total[t][i] = fma(total[t][i], acc[t][0][i], scale); });
        });
    }
    each<NT, MT>([&](int t, int i) { store(sums + i * ld + t * tile_n, total[t][i]); });
}

template <int nibble>
inline void decode_float_column(Tile codes, const FloatTable& table, bool grouped, F32 scale, const float* factor,
                                float* out, size_t k_stride) {
    constexpr int k = k_of_nibble(nibble);
    F32 column = decode_column<nibble>(codes, table);
    if (grouped) column = mul(column, scale);
    if (factor) column = mul(column, f32_all(factor[k]));
    store(out + k * k_stride, column);
}

// Group scales of the 16 outputs of a tile; zeros without groups and where only padding is left.
inline F32 scales_of_tile(const Weights& w, size_t tile, size_t kt) {
    if (w.scale_kind == ScaleKind::none) return f32_zero();
    const size_t group = kt * tile_k / w.group_size;
    if (int(group) >= w.groups) return f32_zero();
    return load_scales(w.scale_kind, w.group_scale + (tile * w.groups + group) * tile_n);
}

// [k][tiles][16] floats, group scales and factors (foldable, or null) multiplied in: at most 2 + 4 significant
// bits, exact.
inline void decode_float_panel(const Weights& w, const FloatTable& table, const float* factor, int tile, int tiles,
                               size_t kt0, int count, float* panel, size_t k_stride) {
    const bool grouped = w.scale_kind != ScaleKind::none;
    for (int t = 0; t < tiles; ++t)
        for (int c = 0; c < count; ++c) {
            const Tile codes = stream_tile(w.codes + ((tile + t) * w.at.tiles_k() + kt0 + c) * tile_bytes);
            const F32 scale = scales_of_tile(w, tile + t, kt0 + c);
            float* out = panel + c * tile_k * k_stride + t * tile_n;
            const float* of_tile = factor ? factor + (kt0 + c) * tile_k : nullptr;
            decode_float_column<0>(codes, table, grouped, scale, of_tile, out, k_stride);
            decode_float_column<1>(codes, table, grouped, scale, of_tile, out, k_stride);
            decode_float_column<2>(codes, table, grouped, scale, of_tile, out, k_stride);
            decode_float_column<3>(codes, table, grouped, scale, of_tile, out, k_stride);
            decode_float_column<4>(codes, table, grouped, scale, of_tile, out, k_stride);
            decode_float_column<5>(codes, table, grouped, scale, of_tile, out, k_stride);
            decode_float_column<6>(codes, table, grouped, scale, of_tile, out, k_stride);
            decode_float_column<7>(codes, table, grouped, scale, of_tile, out, k_stride);
        }
}

template <int MT, int NT>
LLMFP4_APART void multiply_float_panel(const float* panel, size_t k_stride, int k, const float* xs, size_t ldx,
                                       float* sums, size_t ld) {
    F32 acc[MT][NT];
    each<MT, NT>([&](int i, int t) { acc[i][t] = load(sums + i * ld + t * tile_n); });
    for (int j = 0; j < k; ++j) {
        F32 w[NT];
        each<NT>([&](int t) { w[t] = load(panel + j * k_stride + t * tile_n); });
        each<MT, NT>([&](int i, int t) { acc[i][t] = fma(acc[i][t], w[t], xs + i * ldx + j); });
    }
    each<MT, NT>([&](int i, int t) { store(sums + i * ld + t * tile_n, acc[i][t]); });
}

inline void few_float(const Weights& w, const Call& call, const FloatRows& x, int begin, int end) {
    const FloatTable table = float_table(w.element);
    constexpr size_t ld = float_fused_tiles * tile_n;
    float sums[few_float_rows * ld];
    for (int tile = begin; tile < end;)
        tile += with_block<float_fused_tiles>(end - tile, [&](auto nt) {
            for (int row = 0; row < call.m;)
                row += with_block<fused_rows>(call.m - row, [&](auto mt) {
                    multiply_float_fused<mt, nt>(w, table, x, row, tile, sums + row * ld, ld);
                });
            finish_float_rows(w, call, nullptr, 0, call.m, tile * tile_n, outputs_from(w, tile, nt), sums, ld);
        });
}

// Rows m0..m0+m times `tiles` (≤ float_tiles) tiles and inputs begin..end; adds to sums, and finishes rows at the end
// of all inputs.
LLMFP4_INLINE void multiply_float_stretch(const Weights& w, const Call& call, const FloatTable& table,
                                          const FloatRows& x, int m0, int m, int tile, int tiles, int begin, int end,
                                          float* sums) {
    constexpr size_t ld = float_tiles * tile_n;
    const int outputs = outputs_from(w, tile, tiles);
    auto* panel = static_cast<float*>(workspace(slot_panel, float_panel_k * ld * sizeof(float)));
    for (int k = begin; k < end; k += float_panel_k) {
        const int chunk = end - k < float_panel_k ? end - k : float_panel_k;
        const bool last = k + chunk == int(w.at.padded_k());
        decode_float_panel(w, table, x.weight_factor, tile, tiles, k / tile_k, chunk / tile_k, panel, ld);
        with_block<float_tiles>(tiles, [&](auto nt) {
            for (int r = 0; r < m;)
                r += with_block<float_rows>(m - r, [&](auto mt) {
                    if (last) prefetch_outputs(w, call, m0 + r + mt, mt, tile, tiles);
                    multiply_float_panel<mt, nt>(panel, ld, chunk, x.row(m0 + r) + k, x.ld, sums + r * ld, ld);
                    if (last)
                        finish_float_rows(w, call, nullptr, m0 + r, mt, tile * tile_n, outputs, sums + r * ld, ld);
                });
        });
    }
}

// One task: rows m0..m0+m times `tiles` tiles. sums [panels][m][float_tiles · 16]
inline void many_float(const Weights& w, const Call& call, const FloatRows& x, int m0, int m, int tile, int tiles,
                       const FloatTable& table) {
    constexpr size_t ld = float_tiles * tile_n;
    const int padded_k = int(w.at.padded_k()), panels = (tiles + float_tiles - 1) / float_tiles;
    auto* sums = static_cast<float*>(workspace(slot_accumulators, panels * m * ld * sizeof(float)));
    for (size_t i = 0; i < panels * m * ld; ++i) sums[i] = 0.0f;
    for (int k = 0; k < padded_k; k += float_stretch_k)
        for (int t = 0; t < tiles; t += float_tiles) {
            const int end = padded_k - k < float_stretch_k ? padded_k : k + float_stretch_k;
            multiply_float_stretch(w, call, table, x, m0, m, tile + t,
                                   tiles - t < float_tiles ? tiles - t : float_tiles, k, end,
                                   sums + size_t(t) * tile_n * m);
        }
}

inline void w4a16(const Weights& w, const float* x_factor, const Call& call) {
    const bool few = call.m <= few_float_rows;
    const FloatRows x = few ? convert_rows(w, x_factor, call) : rows_of_many(w, x_factor, call);
    const int threads = call.threads, tiles = int(w.at.tiles_n());
    if (few)
        return parallel_ranges(threads, tiles,
                               [&](long begin, long end) { few_float(w, call, x, int(begin), int(end)); });
    const FloatTable table = float_table(w.element);
    const int rows = share_rows(threads, call.m, (tiles + float_tiles - 1) / float_tiles, rows_per_task);
    const bool split = (call.m + rows - 1) / rows % threads != 0;
    const int share = split ? (tiles + threads - 1) / threads : tiles;
    const int tasks = (share + float_task_tiles - 1) / float_task_tiles;
    const int task_tiles = int(round_up((share + tasks - 1) / tasks, float_tiles));
    for_panels(threads, call.m, rows, tiles, task_tiles,
               [&](int m0, int m, int tile, int count) { many_float(w, call, x, m0, m, tile, count, table); });
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
