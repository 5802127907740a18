// Y[m,n] = (fp32(Σ_k xi[m,k] · wi[n,k]) · x_scale) · row_scale[n] + bias[n], with int8 operands and exact int32 sums.
//
// Weight integers are decoded with an offset that makes them unsigned, where the dot product is u8 x s8; starting each
// sum at -offset · Σ_k xi[m,k] takes it out again. Rows: up to `few_rows` multiply tiles as they are decoded; more of
// them share a panel of decoded bytes.
#pragma once
#include "integer_rows.h"

namespace llmfp4::cpu::LLMFP4_ISA {

constexpr int few_rows = 8, fused_rows = 4, fused_tiles = 4;
// 64 outputs x 512 inputs: 32 KiB, about the first-level cache. Rows of up to 640 are not worth a second panel and its
// rounds of sums (576 x 576, m = 512: 1.03 times as long).
constexpr int panel_k = 512, most_panel_k = 640;
constexpr int rows_per_task = 192;

struct IntegerTable {
    int offset;
    ByteTable bytes;

    static ByteTable make(Element e, int offset) {
        uint8_t table[16];
        for (int code = 0; code < 16; ++code) table[code] = uint8_t(e.integer(code) + offset);
        return ByteTable(table);
    }
    explicit IntegerTable(Element e) : offset(signed_bytes ? 0 : e.max_integer()), bytes(make(e, offset)) {}
};

// sums [planes][rows][ld]: finish rows m0.. of the call for `count` outputs from n0. `offset` is what the weights were
// decoded with, if the sums were not started with its correction.
inline void finish_rows(const Weights& w, const Call& call, const IntegerRows& x, int m0, int rows, int n0, int count,
                        const int32_t* sums, size_t ld, size_t plane_stride, int offset) {
    with_dtype(call.dtype, [&](auto type) {
        using T = decltype(type);
        for (int r = 0; r < rows; ++r) {
            const int m = m0 + r;
            const int32_t* low = sums + r * ld;
            const bool split = x.planes == 2;
            finish_integer_row(low, -offset * x.sums[m], split ? low + plane_stride : nullptr,
                               split ? -offset * x.sums[x.m + m] : 0, x.scale[m], w.row_scale + n0,
                               w.bias ? w.bias + n0 : nullptr, static_cast<T*>(call.y) + size_t(m) * w.at.n + n0,
                               count);
        }
    });
}

// Reads what is written next: rows m0.. of a panel of `tiles` tiles and of the panel beside it. Stores to lines that no
// cache holds keep everything behind them waiting (m = 512, y in memory: 1.3-1.5 times as long; 1.1-1.4 without the
// panel beside, which comes much later). Always inlined: gcc 12 takes calls of what only prefetches for useless.
LLMFP4_INLINE void prefetch_outputs(const Weights& w, const Call& call, int m0, int rows, int tile, int tiles) {
    const size_t size = call.dtype == Dtype::f32 ? 4 : 2;
    const int n0 = tile * tile_n, left = w.at.n - n0, count = left < 2 * tiles * tile_n ? left : 2 * tiles * tile_n;
    for (int m = m0; m < m0 + rows && m < call.m; ++m) {
        const char* y = static_cast<const char*>(call.y) + (size_t(m) * w.at.n + n0) * size;
        for (size_t b = 0; b < count * size; b += 64) __builtin_prefetch(y + b, 1, 2);
    }
}

// MT rows times NT adjacent tiles of 16 outputs, all of k, decoded on the way. Short accumulator blocks use two chains.
template <int MT, int NT>
inline void multiply_fused(const Weights& w, const IntegerTable& table, const IntegerRows& x, int row, int tile,
                           int32_t* sums, size_t ld) {
    constexpr int chains = MT * NT <= 8 ? 2 : 1;
    I32 acc[chains][MT][NT];
    each<MT, NT>([&](int i, int t) {
        acc[0][i][t] = i32_all(-table.offset * x.sums[row + i]);
        if (chains == 2) acc[chains - 1][i][t] = i32_all(0);
    });
    const size_t tiles_k = w.at.tiles_k();
    const uint8_t* codes = w.codes + tile * tiles_k * tile_bytes;
    const int8_t* xs = x.row(row);
    for (size_t kt = 0; kt < tiles_k; ++kt, xs += tile_k) {
        const Ahead ahead(kt, tiles_k, NT);
        each<NT>([&](int t) {
            const Tile codes_16x8 = stream_tile(codes + (t * tiles_k + kt) * tile_bytes, ahead);
            const Bytes low = decode_low(codes_16x8, table.bytes), high = decode_high(codes_16x8, table.bytes);
            each<MT>([&](int i) {
                acc[0][i][t] = dot4(acc[0][i][t], low, xs + i * x.ld);
                acc[chains - 1][i][t] = dot4(acc[chains - 1][i][t], high, xs + i * x.ld + 4);
            });
        });
    }
    each<MT, NT>([&](int i, int t) {
        store(sums + i * ld + t * tile_n, chains == 2 ? add(acc[0][i][t], acc[1][i][t]) : acc[0][i][t]);
    });
}

// MT rows times NT tiles of a decoded panel [NT][k4][64], `k4` groups of 4 inputs; adds to sums.
template <int MT, int NT>
LLMFP4_APART void multiply_panel(const uint8_t* panel, size_t tile_stride, int k4, const int8_t* xs, size_t ldx,
                                 int32_t* sums, size_t ld) {
    I32 acc[MT][NT];
    each<MT, NT>([&](int i, int t) { acc[i][t] = load(sums + i * ld + t * tile_n); });
    for (int g = 0; g < k4; ++g) {
        Bytes w[NT];
        each<NT>([&](int t) { w[t] = load_bytes(panel + t * tile_stride + size_t(g) * tile_bytes); });
        each<MT, NT>([&](int i, int t) { acc[i][t] = dot4(acc[i][t], w[t], xs + i * ldx + 4 * g); });
    }
    each<MT, NT>([&](int i, int t) { store(sums + i * ld + t * tile_n, acc[i][t]); });
}

// Calls f with the largest compile-time size ≤ Max that fits `left`.
template <int Max, class F>
inline int with_block(int left, F&& f) {
    if constexpr (Max == 1) {
        f(std::integral_constant<int, 1>{});
        return 1;
    } else {
        if (left < Max) return with_block<Max - 1>(left, f);
        f(std::integral_constant<int, Max>{});
        return Max;
    }
}

// Decode `k4`/2 tiles of each of `tiles` rows of tiles from tile kt0 on into [tiles][k4][64] bytes.
inline void decode_panel(const Weights& w, const IntegerTable& table, int tile, int tiles, size_t kt0, int k4,
                         uint8_t* panel, size_t tile_stride) {
    for (int t = 0; t < tiles; ++t) {
        const uint8_t* codes = w.codes + ((tile + t) * w.at.tiles_k() + kt0) * tile_bytes;
        uint8_t* out = panel + t * tile_stride;
        for (int g = 0; g < k4; g += 2, codes += tile_bytes, out += 2 * tile_bytes) {
            const Tile codes_16x8 = stream_tile(codes);
            store_bytes(out, decode_low(codes_16x8, table.bytes));
            store_bytes(out + tile_bytes, decode_high(codes_16x8, table.bytes));
        }
    }
}

inline int outputs_from(const Weights& w, int tile, int tiles) {
    const int left = w.at.n - tile * tile_n;
    return left < tiles * tile_n ? left : tiles * tile_n;
}

inline void few(const Weights& w, const Call& call, const IntegerRows& x, int begin, int end) {
    const IntegerTable table(w.element);
    constexpr size_t ld = fused_tiles * tile_n;
    int32_t sums[2 * few_rows * ld];
    for (int tile = begin; tile < end;)
        tile += with_block<fused_tiles>(end - tile, [&](auto nt) {
            for (int row = 0; row < x.rows();)
                row += with_block<fused_rows>(x.rows() - row, [&](auto mt) {
                    multiply_fused<mt, nt>(w, table, x, row, tile, sums + row * ld, ld);
                });
            finish_rows(w, call, x, 0, x.m, tile * tile_n, outputs_from(w, tile, nt), sums, ld, x.m * ld, 0);
        });
}

// Inputs of a panel, a multiple of `unit`: all panels are about as long, for while the last is multiplied the outputs
// must arrive.
inline int inputs_of_panel(const Weights& w, int unit) {
    const int total = int(w.at.padded_k()), panels = total <= most_panel_k ? 1 : (total + panel_k - 1) / panel_k;
    const int inputs = int(round_up((total + panels - 1) / panels, unit));
    return inputs > most_panel_k && inputs > unit ? inputs - unit : inputs;
}

// One task: rows m0..m0+m of every plane times `tiles` (≤ panel_tiles) tiles.
inline void many(const Weights& w, const Call& call, const IntegerRows& x, int m0, int m, int tile, int tiles,
                 const IntegerTable& table) {
    constexpr size_t ld = panel_tiles * tile_n, tile_stride = size_t(most_panel_k) * tile_n;
    auto* panel = static_cast<uint8_t*>(workspace(slot_panel, panel_tiles * tile_stride));
    auto* sums = static_cast<int32_t*>(workspace(slot_accumulators, size_t(x.planes) * m * ld * sizeof(int32_t)));
    for (int p = 0; p < x.planes; ++p)
        for (int r = 0; r < m; ++r) {
            const I32 start = i32_all(-table.offset * x.sums[p * x.m + m0 + r]);
            each<panel_tiles>([&](int t) { store(sums + (p * m + r) * ld + t * tile_n, start); });
        }
    const int total = int(w.at.padded_k()), step = inputs_of_panel(w, tile_k), outputs = outputs_from(w, tile, tiles);
    prefetch_outputs(w, call, m0, panel_rows, tile, tiles);
    for (int k = 0; k < total; k += step) {
        const int k4 = (total - k < step ? total - k : step) / 4;
        decode_panel(w, table, tile, tiles, k / tile_k, k4, panel, tile_stride);
        const bool last = k + step >= total;
        with_block<panel_tiles>(tiles, [&](auto nt) {
            for (int r = 0; r < m;)
                r += with_block<panel_rows>(m - r, [&](auto mt) {
                    if (last) prefetch_outputs(w, call, m0 + r + mt, mt, tile, tiles);
                    for (int p = 0; p < x.planes; ++p)
                        multiply_panel<mt, nt>(panel, tile_stride, k4, x.row(p * x.m + m0 + r) + k, x.ld,
                                               sums + (p * m + r) * ld, ld);
                    if (last) finish_rows(w, call, x, m0 + r, mt, tile * tile_n, outputs, sums + r * ld, ld, m * ld, 0);
                });
        });
    }
}

// Rows of a block, `rows_per_task` at most. More blocks, as many for each thread, where that makes the longest share of
// blocks times panels shorter: one takes as long as its rows and some 10 more, in which it decodes the panel.
inline int share_rows(int threads, int m, int panels) {
    constexpr int decode_rows = 10;
    const auto length = [&](int blocks) {
        return (long(blocks) * panels + threads - 1) / threads * ((m + blocks - 1) / blocks + decode_rows);
    };
    const int fewest = (m + rows_per_task - 1) / rows_per_task, even = int(round_up(fewest, threads));
    const int blocks = length(even) < length(fewest) ? even : fewest;
    return int(round_up((m + blocks - 1) / blocks, panel_rows));
}

// task(m0, rows, tile, tiles) for blocks of at most `rows` rows and `width` tiles; those of the same rows follow each
// other.
template <class F>
inline void for_panels(int threads, int m, int rows, int tiles, int width, F&& task) {
    const long blocks_m = (m + rows - 1) / rows, blocks_n = (tiles + width - 1) / width;
    parallel_ranges(threads, blocks_m * blocks_n, [&](long begin, long end) {
        for (long i = begin; i < end; ++i) {
            const int m0 = int(i / blocks_n) * rows, tile = int(i % blocks_n) * width;
            task(m0, m - m0 < rows ? m - m0 : rows, tile, tiles - tile < width ? tiles - tile : width);
        }
    });
}

inline void w4a4(const Weights& w, const Activation& a, const Call& call) {
    const IntegerRows x = quantize_rows(w, a, call);
    const int threads = call.threads, tiles = int(w.at.tiles_n());
    if (x.rows() <= few_rows)
        return parallel_ranges(threads, tiles, [&](long begin, long end) { few(w, call, x, int(begin), int(end)); });
    const IntegerTable table(w.element);
    const int rows = share_rows(threads, call.m, (tiles + panel_tiles - 1) / panel_tiles);
    for_panels(threads, call.m, rows, tiles, panel_tiles,
               [&](int m0, int m, int tile, int count) { many(w, call, x, m0, m, tile, count, table); });
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
