// Y[m,n] = (fp32(Σ_k xi[m,k] · wi[n,k]) · x_scale) · row_scale[n] + bias[n], with int8 operands and exact int32 sums.
//
// Weight integers are decoded with an offset that makes them unsigned, where the dot product is u8 x s8; starting each
// sum at -offset · Σ_k xi[m,k] takes it out again. Rows: up to `few_rows` multiply tiles as they are decoded; more of
// them share a panel of decoded bytes.
#pragma once
#include "integer_rows.h"
#include "panels.h"

namespace llmfp4::cpu::LLMFP4_ISA {

constexpr int few_rows = 8, fused_rows = 4, fused_tiles = 4;

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
        with_count(count, [&](auto outputs) {
            for (int r = 0; r < rows; ++r) {
                const int m = m0 + r;
                const int32_t* low = sums + r * ld;
                const bool split = x.planes == 2;
                finish_integer_row(low, -offset * x.sums[m], split ? low + plane_stride : nullptr,
                                   split ? -offset * x.sums[x.m + m] : 0, x.scale[m], w.row_scale + n0,
                                   w.bias ? w.bias + n0 : nullptr, static_cast<T*>(call.y) + size_t(m) * w.at.n + n0,
                                   outputs);
            }
        });
    });
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

template <int MT>
inline void start_sums(const int32_t* of_rows, int offset, int32_t* sums) {
    each<MT, panel_tiles>(
        [&](int i, int t) { store(sums + (i * panel_tiles + t) * tile_n, i32_all(-offset * of_rows[i])); });
}

// One task: rows m0..m0+m of every plane times `tiles` (≤ panel_tiles) tiles.
inline void many(const Weights& w, const Call& call, const IntegerRows& x, int m0, int m, int tile, int tiles,
                 const IntegerTable& table) {
    constexpr size_t tile_stride = size_t(most_panel_k) * tile_n;
    const int total = int(w.at.padded_k()), step = inputs_of_panel(w, tile_k), outputs = outputs_from(w, tile, tiles);
    auto* panel = static_cast<uint8_t*>(workspace(slot_panel, panel_tiles * tile_stride));
    const TaskSums<int32_t> sums(step >= total, x.planes, m);
    prefetch_outputs(w, call, m0, panel_rows, tile, tiles);
    for (int k = 0; k < total; k += step) {
        const int k4 = (total - k < step ? total - k : step) / 4;
        decode_panel(w, table, tile, tiles, k / tile_k, k4, panel, tile_stride);
        const bool last = k + step >= total;
        with_block<panel_tiles>(tiles, [&](auto nt) {
            for (int r = 0; r < m;)
                r += with_block<panel_rows>(m - r, [&](auto mt) {
                    if (last) prefetch_outputs(w, call, m0 + r + mt, mt, tile, tiles);
                    for (int p = 0; p < x.planes; ++p) {
                        if (k == 0) start_sums<mt>(x.sums + p * x.m + m0 + r, table.offset, sums.row(r, p));
                        multiply_panel<mt, nt>(panel, tile_stride, k4, x.row(p * x.m + m0 + r) + k, x.ld,
                                               sums.row(r, p), sums.ld);
                    }
                    if (last)
                        finish_rows(w, call, x, m0 + r, mt, tile * tile_n, outputs, sums.row(r), sums.ld,
                                    sums.plane_stride(), 0);
                });
        });
    }
}

inline void w4a4(const Weights& w, const Activation& a, const Call& call) {
    const IntegerRows x = quantize_rows(w, a, call);
    const int threads = call.threads, tiles = int(w.at.tiles_n());
    if (x.rows() <= few_rows)
        return parallel_ranges(threads, tiles, [&](long begin, long end) { few(w, call, x, int(begin), int(end)); });
    const IntegerTable table(w.element);
    const int rows = share_rows(threads, call.m, (tiles + panel_tiles - 1) / panel_tiles, most_rows(w));
    for_panels(threads, call.m, rows, tiles, panel_tiles,
               [&](int m0, int m, int tile, int count) { many(w, call, x, m0, m, tile, count, table); });
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
