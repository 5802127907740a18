// The equations of gemm_w4a4.h and gemm_w4a16.h on AMX tiles, for enough rows to fill them.
//
// W4A16 multiplies in bf16 without rounding anything: every element times group scale is exact in bf16 (≤ 6 significant
// bits), and activations are sums of bf16 parts (parts.h), each multiplied with the same decoded weights.
#include "amx.h"
#include "gemm_grouped.h"
#include "kernels.h"
#include "parts.h"
#include "peak.h"

namespace llmfp4::cpu {
namespace amx {

constexpr int step_bytes = 64;  // of k in one tile row
constexpr int panel_steps =
    16;  // 64 outputs x 1 KiB of k: 64 KiB decoded, second-level cache; sums leave the tiles rarely
constexpr int amx_panel_tiles = 4;
constexpr size_t block_bytes = 3 << 19;  // of activations that stay in the second-level cache while all weights pass
constexpr size_t sums_ld = amx_panel_tiles * tile_n;

// A decoded panel is [tile][step][16 rows][64]: one B tile after the other.
constexpr size_t b_tile_bytes = 16 * step_bytes, panel_stride = panel_steps * b_tile_bytes;

// MT x NT tiles of sums over `steps` steps of k and `parts` left sides that share the right side.
template <class Op, int MT, int NT>
inline void multiply_block(const char* a, size_t lda, size_t part_stride, int parts, const uint8_t* panel, int steps,
                           void* sums, bool first) {
    constexpr size_t stride = sums_ld * 4;
    char* c = static_cast<char*>(sums);
    if (!first) {
        load_sum<0, 0>(c, stride);
        if constexpr (NT > 1) load_sum<0, 1>(c + 64, stride);
        if constexpr (MT > 1) load_sum<1, 0>(c + 16 * stride, stride);
        if constexpr (MT > 1 && NT > 1) load_sum<1, 1>(c + 16 * stride + 64, stride);
    } else {
        zero_sum<0, 0>();
        zero_sum<0, 1>();
        zero_sum<1, 0>();
        zero_sum<1, 1>();
    }
    for (int s = 0; s < steps; ++s) {
        load_b<0>(panel + s * b_tile_bytes);
        if constexpr (NT > 1) load_b<1>(panel + panel_stride + s * b_tile_bytes);
        for (int p = 0; p < parts; ++p) {
            const char* rows = a + p * part_stride + s * step_bytes;
            load_a<0>(rows, lda);
            Op::template multiply<0, 0>();
            if constexpr (NT > 1) Op::template multiply<0, 1>();
            if constexpr (MT > 1) {
                load_a<1>(rows + 16 * lda, lda);
                Op::template multiply<1, 0>();
                if constexpr (NT > 1) Op::template multiply<1, 1>();
            }
        }
    }
    store_sum<0, 0>(c, stride);
    if constexpr (NT > 1) store_sum<0, 1>(c + 64, stride);
    if constexpr (MT > 1) store_sum<1, 0>(c + 16 * stride, stride);
    if constexpr (MT > 1 && NT > 1) store_sum<1, 1>(c + 16 * stride + 64, stride);
}

// All of a block of rows times one decoded panel. Row counts round up to 16: buffers are padded, the surplus is never
// read.
template <class Op>
inline void multiply_panel(const char* a, size_t lda, size_t part_stride, int parts, int rows, const uint8_t* panel,
                           int tiles, int steps, char* sums, bool first) {
    for (int r = 0; r < rows;)
        r += 16 * with_block<2>((rows - r + 15) / 16, [&](auto mt) {
                 for (int t = 0; t < tiles;)
                     t += with_block<2>(tiles - t, [&](auto nt) {
                         multiply_block<Op, mt, nt>(a + r * lda, lda, part_stride, parts, panel + t * panel_stride,
                                                    steps, sums + (r * sums_ld + t * tile_n) * 4, first);
                     });
             });
}

inline int rows_of_block(size_t row_bytes) {
    const int rows = int(block_bytes / row_bytes / 32) * 32;
    return rows < 64 ? 64 : rows > 256 ? 256 : rows;
}

template <class F>
inline void for_blocks(const Weights& w, const Call& call, size_t row_bytes, F&& task) {
    const int rows = rows_of_block(row_bytes);
    const int tiles = int(w.at.tiles_n());
    const long blocks_m = (call.m + rows - 1) / rows, blocks_n = (tiles + amx_panel_tiles - 1) / amx_panel_tiles;
    parallel_ranges(useful_threads(w, call), blocks_m * blocks_n, [&](long begin, long end) {
        const TileSession session;
        for (long i = begin; i < end; ++i) {
            const int m0 = int(i / blocks_n) * rows, tile = int(i % blocks_n) * amx_panel_tiles;
            task(m0, call.m - m0 < rows ? call.m - m0 : rows, tile,
                 tiles - tile < amx_panel_tiles ? tiles - tile : amx_panel_tiles);
        }
    });
}

inline void integer_task(const Weights& w, const Call& call, const IntegerRows& x, const IntegerTable& table, int m0,
                         int m, int tile, int tiles) {
    auto* panel = static_cast<uint8_t*>(workspace(slot_panel, amx_panel_tiles * panel_stride));
    const size_t plane = (size_t(m) + 15) / 16 * 16 * sums_ld;
    auto* sums = static_cast<int32_t*>(workspace(slot_accumulators, x.planes * plane * sizeof(int32_t)));
    const int total = int(w.at.padded_k()) / step_bytes;
    for (int s = 0; s < total; s += panel_steps) {
        const int steps = total - s < panel_steps ? total - s : panel_steps;
        decode_panel(w, table, tile, tiles, s * step_bytes / tile_k, steps * 16, panel, panel_stride);
        for (int p = 0; p < x.planes; ++p)
            multiply_panel<SignedByUnsigned>(reinterpret_cast<const char*>(x.row(p * x.m + m0)) + s * step_bytes, x.ld,
                                             0, 1, m, panel, tiles, steps, reinterpret_cast<char*>(sums + p * plane),
                                             s == 0);
    }
    finish_rows(w, call, x, m0, m, tile * tile_n, outputs_from(w, tile, tiles), sums, sums_ld, plane, table.offset);
}

inline PartRows integers_to_bf16(const Weights& w, const Call& call, const IntegerRows& integers) {
    PartRows x;
    const size_t padded_k = w.at.padded_k();
    x.parts = 1;
    x.ld = spread_stride(padded_k * 2);
    x.part_stride = 0;
    x.at = static_cast<char*>(workspace(slot_sums, (round_up(call.m, 16) + 16) * x.ld));  // whole tiles may be read
    parallel_ranges(call.threads, call.m, [&](long begin, long end) {
        for (long m = begin; m < end; ++m) {
            const int8_t* __restrict from = integers.row(int(m));
            auto* __restrict to = reinterpret_cast<uint16_t*>(x.at + m * x.ld);
            for (size_t i = 0; i < padded_k; ++i) to[i] = uint16_t(bits_of(float(from[i])) >> 16);
        }
    });
    return x;
}

template <int even, int odd>
inline void decode_pair(Tile codes, const FloatTable& table, bool grouped, F32 scale, uint8_t* row) {
    F32 a = decode_column<even>(codes, table), b = decode_column<odd>(codes, table);
    if (grouped) a = mul(a, scale), b = mul(b, scale);
    store_bytes(row, pack_bf16(a, b));
}

// `count` tiles of 8 inputs to 4 B rows each.
inline void decode_bf16_panel(const Weights& w, const FloatTable& table, int tile, int tiles, size_t kt0, int count,
                              uint8_t* panel) {
    const bool grouped = w.scale_kind != ScaleKind::none;
    for (int t = 0; t < tiles; ++t)
        for (int c = 0; c < count; ++c) {
            const uint8_t* at = w.codes + ((tile + t) * w.at.tiles_k() + kt0 + c) * tile_bytes;
            prefetch_codes(at);
            const Tile codes = load_tile(at);
            const F32 scale = scales_of_tile(w, tile + t, kt0 + c);
            uint8_t* row = panel + t * panel_stride + c * 4 * step_bytes;
            decode_pair<0, 2>(codes, table, grouped, scale, row);
            decode_pair<4, 6>(codes, table, grouped, scale, row + step_bytes);
            decode_pair<1, 3>(codes, table, grouped, scale, row + 2 * step_bytes);
            decode_pair<5, 7>(codes, table, grouped, scale, row + 3 * step_bytes);
        }
}

// x_scale [m], or null where the activations are themselves.
inline void float_task(const Weights& w, const Call& call, const PartRows& x, const float* x_scale,
                       const FloatTable& table, int m0, int m, int tile, int tiles) {
    auto* panel = static_cast<uint8_t*>(workspace(slot_panel, amx_panel_tiles * panel_stride));
    auto* sums =
        static_cast<float*>(workspace(slot_accumulators, (size_t(m) + 15) / 16 * 16 * sums_ld * sizeof(float)));
    constexpr int k_of_step = step_bytes / 2;
    const int total = int(w.at.padded_k()) / k_of_step;
    for (int s = 0; s < total; s += panel_steps) {
        const int steps = total - s < panel_steps ? total - s : panel_steps;
        decode_bf16_panel(w, table, tile, tiles, size_t(s) * k_of_step / tile_k, steps * k_of_step / tile_k, panel);
        multiply_panel<Bf16Pairs>(x.row(m0) + s * step_bytes, x.ld, x.part_stride, x.parts, m, panel, tiles, steps,
                                  reinterpret_cast<char*>(sums), s == 0);
    }
    finish_float_rows(w, call, x_scale, m0, m, tile * tile_n, outputs_from(w, tile, tiles), sums, sums_ld);
}

}  // namespace amx

void w4a4_amx(const Weights& w, const Activation& a, const Call& call) {
    const amx::IntegerRows x = amx::quantize_rows(w, a, call);
    const amx::IntegerTable table(w.element);
    amx::for_blocks(w, call, x.ld, [&](int m0, int m, int tile, int tiles) {
        amx::integer_task(w, call, x, table, m0, m, tile, tiles);
    });
}

// An int8 number is one in bf16, and so is an integer element times its group's scale (6 significant bits).
void w4a8_grouped_amx(const Weights& w, const Activation& a, const Call& call) {
    const amx::IntegerRows integers = amx::quantize_rows(w, a, call);
    const amx::PartRows x = amx::integers_to_bf16(w, call, integers);
    const amx::FloatTable table = amx::float_table(w.element, float(w.element.integer_scale()));
    amx::for_blocks(w, call, x.parts * x.ld, [&](int m0, int m, int tile, int tiles) {
        amx::float_task(w, call, x, integers.scale, table, m0, m, tile, tiles);
    });
}

void w4a16_amx(const Weights& w, const float* x_factor, const Call& call) {
    const amx::PartRows x = amx::split_rows(w, x_factor, call);
    const amx::FloatTable table = amx::float_table(w.element);
    amx::for_blocks(w, call, x.parts * x.ld, [&](int m0, int m, int tile, int tiles) {
        amx::float_task(w, call, x, nullptr, table, m0, m, tile, tiles);
    });
}

double peak_amx(Unit unit, double seconds) {
    if (unit == Unit::fp32) return amx::peak_float(seconds);
    const amx::TileSession session;
    const double operations = 4.0 * 2 * 16 * 16 * (unit == Unit::int8 ? 64 : 32);
    return unit == Unit::int8 ? amx::best_rate(seconds, operations, amx::multiply_all<amx::SignedByUnsigned>)
                              : amx::best_rate(seconds, operations, amx::multiply_all<amx::Bf16Pairs>);
}

}  // namespace llmfp4::cpu
