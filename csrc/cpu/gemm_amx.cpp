// The equations of gemm_w4a4.h and gemm_w4a16.h on AMX tiles, for enough rows to fill them.
//
// W4A16 multiplies in bf16 without rounding anything: every element times group scale is exact in bf16 (≤ 6 significant
// bits), and activations are sums of bf16 parts (parts.h), each multiplied with the same decoded weights.
#include "amx_product.h"
#include "gemm_grouped.h"
#include "kernels.h"
#include "parts.h"
#include "peak.h"

namespace llmfp4::cpu {
namespace amx {

// Integer operands in A-tile order, a plane for each part.
inline TileRows integer_tiles(const Weights& w, const Activation& a, const Call& call, IntegerRows& numbers) {
    const size_t padded_k = w.at.padded_k(), part = TileRows::bytes(call.m, padded_k);
    numbers = integer_rows(a, call, planes_of(a) * part);
    const TileRows x{reinterpret_cast<char*>(numbers.at), int(padded_k) / step_bytes, numbers.planes, part};
    const auto scratch = [&] { return static_cast<int8_t*>(workspace(slot_accumulators, 2 * padded_k)); };
    quantize_rows(
        w, a, call, numbers, [&](int) { return std::make_pair(scratch(), scratch() + padded_k); },
        [&](int m) {
            for (int p = 0; p < x.parts; ++p) x.place(p, m, scratch() + p * padded_k);
        });
    return x;
}

// The same as bf16 numbers, of which each int8 number is one.
inline TileRows integer_bf16_tiles(const Weights& w, const Activation& a, const Call& call, IntegerRows& numbers) {
    const size_t padded_k = w.at.padded_k(), part = TileRows::bytes(call.m, 2 * padded_k);
    numbers = integer_rows(a, call, part);
    const TileRows x{reinterpret_cast<char*>(numbers.at), int(2 * padded_k) / step_bytes, 1, part};
    const auto scratch = [&] { return static_cast<int8_t*>(workspace(slot_accumulators, 4 * padded_k)); };
    quantize_rows(
        w, a, call, numbers, [&](int) { return std::make_pair(scratch(), scratch() + padded_k); },
        [&](int m) {
            const int8_t* __restrict from = scratch();
            auto* __restrict to = reinterpret_cast<uint16_t*>(scratch() + 2 * padded_k);
            for (size_t i = 0; i < padded_k; ++i) to[i] = uint16_t(bits_of(float(from[i])) >> 16);
            x.place(0, m, to);
        });
    return x;
}

inline TileRows bf16_tiles(const Weights& w, const float* x_factor, const Call& call) {
    const size_t padded_k = w.at.padded_k(), part = TileRows::bytes(call.m, 2 * padded_k);
    const int parts = parts_of(call.dtype, w.smoothed),
              threads = threads_to_convert(long(call.m) * w.at.k, call.threads);
    const TileRows x{static_cast<char*>(workspace(slot_rows, parts * part)), int(2 * padded_k) / step_bytes, parts,
                     part};
    with_dtype(call.dtype, [&](auto type) {
        const auto* source = static_cast<const decltype(type)*>(call.x);
        parallel_ranges(threads, call.m, [&](long begin, long end) {
            auto* row = static_cast<uint16_t*>(workspace(slot_accumulators, 2 * parts * padded_k));
            for (int m = int(begin); m < int(end); ++m) {
                with_block<3>(parts, [&](auto count) {
                    split_row<count>(source + m * call.ldx, w.at.k, int(padded_k), x_factor, row);
                });
                for (int p = 0; p < parts; ++p) x.place(p, m, row + p * padded_k);
            }
        });
    });
    return x;
}

// 8 tiles of 8 inputs to a B tile of bytes.
struct DecodeBytes {
    const Weights& w;
    IntegerTable table;

    LLMFP4_INLINE void operator()(int tile, int step, uint8_t* out) const {
        constexpr int tiles = step_bytes / tile_k;
        decode_panel(w, table, tile, 1, size_t(step) * tiles, 2 * tiles, out, 0);
    }
};

template <int even, int odd>
inline void decode_pair(Tile codes, const FloatTable& table, F32 scale, uint8_t* row) {
    store_bytes(row,
                pack_bf16(mul(decode_column<even>(codes, table), scale), mul(decode_column<odd>(codes, table), scale)));
}

// 4 tiles of 8 inputs to a B tile of pairs of bf16 numbers, which weights without group scales are by themselves.
struct DecodeBf16 {
    const Weights& w;
    Bf16Table table;

    LLMFP4_INLINE void operator()(int tile, int step, uint8_t* out) const {
        constexpr int tiles = step_bytes / 2 / tile_k;
        const uint8_t* codes = w.codes + (tile * w.at.tiles_k() + size_t(step) * tiles) * tile_bytes;
        for (int c = 0; c < tiles; ++c, codes += tile_bytes, out += 4 * step_bytes) {
            const Tile low = stream_tile(codes), high = high_nibbles(low);
            store_bytes(out, decode_bf16<0>(low, table));
            store_bytes(out + step_bytes, decode_bf16<1>(low, table));
            store_bytes(out + 2 * step_bytes, decode_bf16<0>(high, table));
            store_bytes(out + 3 * step_bytes, decode_bf16<1>(high, table));
        }
    }
};

// The same of weights times their groups' scales.
struct DecodeScaledBf16 {
    const Weights& w;
    FloatTable table;

    LLMFP4_INLINE void operator()(int tile, int step, uint8_t* out) const {
        constexpr int tiles = step_bytes / 2 / tile_k;
        for (int c = 0; c < tiles; ++c, out += 4 * step_bytes) {
            const size_t kt = size_t(step) * tiles + c;
            const Tile codes = stream_tile(w.codes + (tile * w.at.tiles_k() + kt) * tile_bytes);
            const F32 scale = scales_of_tile(w, tile, kt);
            decode_pair<0, 2>(codes, table, scale, out);
            decode_pair<4, 6>(codes, table, scale, out + step_bytes);
            decode_pair<1, 3>(codes, table, scale, out + 2 * step_bytes);
            decode_pair<5, 7>(codes, table, scale, out + 3 * step_bytes);
        }
    }
};

// x_scale [m], or null where the activations are themselves.
inline void multiply_floats(const Weights& w, const Call& call, const TileRows& x, const float* x_scale, float unit) {
    const auto finish = [&](int m0, int rows, int tile, int tiles, const void* sums) {
        finish_float_rows(w, call, x_scale, m0, rows, tile * tile_n, outputs_from(w, tile, tiles),
                          static_cast<const float*>(sums), sums_ld);
    };
    const auto multiply = [&](const auto& decode) {
        multiply_tiles<Bf16Pairs>(call.threads, call.m, int(w.at.tiles_n()), x, false, decode, finish);
    };
    if (w.scale_kind == ScaleKind::none)
        multiply(DecodeBf16{w, float_table<Bf16Table>(w.element, unit)});
    else
        multiply(DecodeScaledBf16{w, float_table(w.element, unit)});
}

}  // namespace amx

void w4a4_amx(const Weights& w, const Activation& a, const Call& call) {
    amx::IntegerRows numbers;
    const amx::TileRows x = amx::integer_tiles(w, a, call, numbers);
    const amx::DecodeBytes decode{w, amx::IntegerTable(w.element)};
    const auto finish = [&](int m0, int rows, int tile, int tiles, const void* sums) {
        amx::finish_rows(w, call, numbers, m0, rows, tile * tile_n, amx::outputs_from(w, tile, tiles),
                         static_cast<const int32_t*>(sums), amx::sums_ld, 32 * amx::sums_ld, decode.table.offset);
    };
    amx::multiply_tiles<amx::SignedByUnsigned>(call.threads, call.m, int(w.at.tiles_n()), x, true, decode, finish);
}

// An integer element times its group's scale is a bf16 number, too (6 significant bits).
void w4a8_grouped_amx(const Weights& w, const Activation& a, const Call& call) {
    amx::IntegerRows numbers;
    const amx::TileRows x = amx::integer_bf16_tiles(w, a, call, numbers);
    amx::multiply_floats(w, call, x, numbers.scale, float(w.element.integer_scale()));
}

void w4a16_amx(const Weights& w, const float* x_factor, const Call& call) {
    amx::multiply_floats(w, call, amx::bf16_tiles(w, x_factor, call), nullptr, 1.0f);
}

double peak_amx(Unit unit, double seconds) {
    if (unit == Unit::fp32) return amx::peak_float(seconds);
    const amx::TileSession session;
    const double operations = 4.0 * 2 * 16 * 16 * (unit == Unit::int8 ? 64 : 32);
    return unit == Unit::int8 ? amx::best_rate(seconds, operations, amx::multiply_all<amx::SignedByUnsigned>)
                              : amx::best_rate(seconds, operations, amx::multiply_all<amx::Bf16Pairs>);
}

}  // namespace llmfp4::cpu
