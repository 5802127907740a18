// Y[m,n] = ((Σ_g fp32(Σ_{k in g} xi[m,k] · wi[n,k]) · group_scale[n,g]) · x_scale[m]) · row_scale[n] + bias[n]: int8
// activations and weights with a scale per group.
//
// Sums of a group are exact in int32. Below 2^20 (E2M1 and int8: groups up to 688) their products with a scale of 4
// significant bits are exact, too, so only the sum over groups rounds, in their order: the same bits whatever the
// instruction set, the number of rows and the split.
#pragma once
#include "gemm_w4a16.h"

namespace llmfp4::cpu::LLMFP4_ISA {

// -offset · Σ_{k in g} xi[m,k]: what the sum of group g of row m starts at, see IntegerTable. [groups][rows]
struct GroupStarts {
    int32_t* at;
    int rows;
    const int32_t* group(int g) const { return at + size_t(g) * rows; }
};

// Sums of each group of a row times `factor`; zeros follow the row. A width that is known fills vectors.
template <int width>
inline void group_sums(const int8_t* __restrict row, const Weights& w, int factor, int32_t* __restrict out,
                       size_t stride) {
    const int padded_k = int(w.at.padded_k());
    for (int g = 0, i = 0; g < w.groups; ++g, i += w.group_size) {
        const int left = padded_k - i, size = width ? width : left < w.group_size ? left : w.group_size;
        int32_t sum = 0;
        for (int j = 0; j < size; ++j) sum += row[i + j];
        out[g * stride] = factor * sum;
    }
}

inline GroupStarts group_starts(const Weights& w, const Call& call, const IntegerRows& x, int offset) {
    GroupStarts starts{static_cast<int32_t*>(workspace(slot_sums, x.rows() * size_t(w.groups) * sizeof(int32_t))),
                       x.rows()};
    const int threads = threads_to_convert(long(call.m) * w.at.k, call.threads);
    parallel_ranges(threads, x.rows(), [&](long begin, long end) {
        for (int r = int(begin); r < int(end); ++r)
            if (w.group_size == 16)
                group_sums<16>(x.row(r), w, -offset, starts.at + r, starts.rows);
            else if (w.group_size == 32)
                group_sums<32>(x.row(r), w, -offset, starts.at + r, starts.rows);
            else
                group_sums<0>(x.row(r), w, -offset, starts.at + r, starts.rows);
    });
    return starts;
}

// MT rows times NT adjacent tiles of 16 outputs, all of k, decoded on the way.
template <int MT, int NT>
inline void multiply_grouped_fused(const Weights& w, const IntegerTable& table, const IntegerRows& x,
                                   const GroupStarts& starts, int row, int tile, float* sums, size_t ld) {
    const size_t tiles_k = w.at.tiles_k(), group_tiles = w.group_size / tile_k;
    F32 total[MT][NT];
    each<MT, NT>([&](int i, int t) { total[i][t] = f32_zero(); });
    const uint8_t* codes = w.codes + tile * tiles_k * tile_bytes;
    const uint8_t* scales = w.group_scale + size_t(tile) * w.groups * tile_n;
    for (int g = 0; g < w.groups; ++g) {
        const size_t begin = g * group_tiles, end = begin + group_tiles < tiles_k ? begin + group_tiles : tiles_k;
        I32 acc[MT][NT];
        each<MT, NT>([&](int i, int t) { acc[i][t] = i32_all(starts.group(g)[row + i]); });
        for (size_t kt = begin; kt < end; ++kt) {
            const int8_t* xs = x.row(row) + kt * tile_k;
            const Ahead ahead(kt, tiles_k, NT);
            each<NT>([&](int t) {
                const Tile codes_16x8 = stream_tile(codes + (t * tiles_k + kt) * tile_bytes, ahead);
                const Bytes low = decode_low(codes_16x8, table.bytes), high = decode_high(codes_16x8, table.bytes);
                each<MT>(
                    [&](int i) { acc[i][t] = dot4(dot4(acc[i][t], low, xs + i * x.ld), high, xs + i * x.ld + 4); });
            });
        }
        each<NT>([&](int t) {
            const F32 scale = load_scales(w.scale_kind, scales + (size_t(t) * w.groups + g) * tile_n);
            each<MT>([&](int i) { total[i][t] = fma(total[i][t], to_float(acc[i][t]), scale); });
        });
    }
    each<MT, NT>([&](int i, int t) { store(sums + i * ld + t * tile_n, total[i][t]); });
}

// The groups of a stretch of k: decoded bytes [tiles][k4][64] with tile_stride, scales [groups][tiles][16].
struct GroupPanel {
    const uint8_t* bytes;
    size_t tile_stride;
    const float* scales;
    int tiles, k4, group_k4;
};

// MT rows times NT tiles of a panel; adds to sums. `starts` are those of the panel's first group and the first row.
template <int MT, int NT>
LLMFP4_APART void multiply_grouped_panel(const GroupPanel p, const int32_t* starts, int rows, const int8_t* xs,
                                         size_t ldx, float* __restrict sums) {
    constexpr size_t ld = panel_tiles * tile_n;
    const size_t group_bytes = size_t(p.group_k4) * tile_bytes;
    const uint8_t* bytes = p.bytes;
    const uint8_t* const panel_end = bytes + size_t(p.k4) * tile_bytes;
    for (const float* scales = p.scales; bytes < panel_end; starts += rows, scales += p.tiles * tile_n) {
        const uint8_t* const end = size_t(panel_end - bytes) < group_bytes ? panel_end : bytes + group_bytes;
        I32 acc[MT][NT];
        each<MT, NT>([&](int i, int t) { acc[i][t] = i32_all(starts[i]); });
        for (; bytes < end; bytes += tile_bytes, xs += 4) {
            Bytes w[NT];
            each<NT>([&](int t) { w[t] = load_bytes(bytes + t * p.tile_stride); });
            each<MT, NT>([&](int i, int t) { acc[i][t] = dot4(acc[i][t], w[t], xs + i * ldx); });
        }
        each<NT>([&](int t) {
            const F32 scale = load(scales + t * tile_n);
            each<MT>([&](int i) {
                float* sum = sums + i * ld + t * tile_n;
                store(sum, fma(load(sum), to_float(acc[i][t]), scale));
            });
        });
    }
}

inline void few_grouped(const Weights& w, const Call& call, const IntegerRows& x, const GroupStarts& starts, int begin,
                        int end) {
    const IntegerTable table(w.element);
    constexpr size_t ld = fused_tiles * tile_n;
    float sums[few_rows * ld];
    for (int tile = begin; tile < end;)
        tile += with_block<grouped_fused_tiles>(end - tile, [&](auto nt) {
            for (int row = 0; row < call.m;)
                row += with_block<fused_rows>(call.m - row, [&](auto mt) {
                    multiply_grouped_fused<mt, nt>(w, table, x, starts, row, tile, sums + row * ld, ld);
                });
            finish_float_rows(w, call, x.scale, 0, call.m, tile * tile_n, outputs_from(w, tile, nt), sums, ld);
        });
}

// One task: rows m0..m0+m times `tiles` (≤ panel_tiles) tiles. A panel holds whole groups.
inline void many_grouped(const Weights& w, const Call& call, const IntegerRows& x, const GroupStarts& starts, int m0,
                         int m, int tile, int tiles, const IntegerTable& table) {
    const int stretch = inputs_of_panel(w, w.group_size) / 4, groups = 4 * stretch / w.group_size;
    const size_t tile_stride = size_t(stretch) * tile_bytes;
    auto* panel = static_cast<uint8_t*>(workspace(slot_panel, panel_tiles * (tile_stride + groups * tile_n * 4)));
    auto* scales = reinterpret_cast<float*>(panel + panel_tiles * tile_stride);
    const TaskSums<float> sums(groups >= w.groups, 1, m);
    const int total_k4 = int(w.at.padded_k()) / 4, outputs = outputs_from(w, tile, tiles);
    prefetch_outputs(w, call, m0, panel_rows, tile, tiles);
    for (int g0 = 0, k4 = 0; g0 < w.groups; g0 += groups, k4 += stretch) {
        const int chunk = total_k4 - k4 < stretch ? total_k4 - k4 : stretch;
        const int here = w.groups - g0 < groups ? w.groups - g0 : groups;
        decode_panel(w, table, tile, tiles, k4 / 2, chunk, panel, tile_stride);
        for (int g = 0; g < here; ++g)
            for (int t = 0; t < tiles; ++t)
                store(scales + (g * tiles + t) * tile_n,
                      load_scales(w.scale_kind, w.group_scale + (size_t(tile + t) * w.groups + g0 + g) * tile_n));
        const int group_k4 = w.group_size / 4, k4_end = here * group_k4 < chunk ? here * group_k4 : chunk;
        const GroupPanel p{panel, tile_stride, scales, tiles, k4_end, group_k4};
        const bool last = g0 + groups >= w.groups;
        with_block<panel_tiles>(tiles, [&](auto nt) {
            for (int r = 0; r < m;)
                r += with_block<panel_rows>(m - r, [&](auto mt) {
                    if (last) prefetch_outputs(w, call, m0 + r + mt, mt, tile, tiles);
                    if (g0 == 0)
                        each<mt, panel_tiles>(
                            [&](int i, int t) { store(sums.row(r) + i * sums.ld + t * tile_n, f32_zero()); });
                    multiply_grouped_panel<mt, nt>(p, starts.group(g0) + m0 + r, starts.rows, x.row(m0 + r) + 4 * k4,
                                                   x.ld, sums.row(r));
                    if (last)
                        finish_float_rows(w, call, x.scale, m0 + r, mt, tile * tile_n, outputs, sums.row(r), sums.ld);
                });
        });
    }
}

inline void w4a8_grouped(const Weights& w, const Activation& a, const Call& call) {
    const IntegerRows x = quantize_rows(w, a, call);
    const IntegerTable table(w.element);
    const GroupStarts starts = group_starts(w, call, x, table.offset);
    const int threads = call.threads, tiles = int(w.at.tiles_n());
    if (call.m <= few_rows)
        return parallel_ranges(threads, tiles,
                               [&](long begin, long end) { few_grouped(w, call, x, starts, int(begin), int(end)); });
    const int rows = share_rows(threads, call.m, (tiles + panel_tiles - 1) / panel_tiles, most_rows(w));
    for_panels(threads, call.m, rows, tiles, panel_tiles, [&](int m0, int m, int tile, int count) {
        many_grouped(w, call, x, starts, m0, m, tile, count, table);
    });
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
