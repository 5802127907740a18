// What the AMX kernels share: rows in A-tile order times weights that are decoded to B tiles on the way.
//
// Blocks of rows meet panels of decoded weights. A panel is decoded a B tile at a time between the products with the
// panel before it, and rows leave as soon as their last panel is multiplied: tiles multiply in a unit of their own,
// meanwhile the others decode, fetch and finish.
//
//     panels   | decode 0 | decode 1      | decode 2      | ...
//     products            | rows x 0      | rows x 1      | ...      the last of a block of rows: finish
#pragma once
#include "amx.h"
#include "gemm_w4a4.h"

namespace llmfp4::cpu::amx {

constexpr int step_bytes = 64;  // of k in one tile row
constexpr size_t tile_register_bytes = 16 * step_bytes;
constexpr int amx_panel_tiles = 4, panel_steps = 32;  // 64 outputs x 2 KiB of k: 128 KiB; sums leave the tiles rarely
constexpr size_t sums_ld = amx_panel_tiles * tile_n;
constexpr size_t block_bytes = 3 << 19;  // of activations that stay in the second-level cache while all weights pass

// The left side: [part][16 rows][step][row][64 bytes].
struct TileRows {
    char* at;
    int steps, parts;
    size_t part_stride;

    static size_t bytes(int m, size_t row_bytes) { return round_up(m, 16) * row_bytes; }
    const char* tile(int part, int m) const { return at + part * part_stride + size_t(m) * steps * step_bytes; }
    // Row m from memory in a row.
    void place(int part, int m, const void* row) const {
        const auto* from = static_cast<const uint8_t*>(row);
        auto* to = reinterpret_cast<uint8_t*>(at) + part * part_stride + size_t(m / 16) * steps * tile_register_bytes +
                   m % 16 * step_bytes;
        for (int s = 0; s < steps; ++s) store_bytes(to + s * tile_register_bytes, load_bytes(from + s * step_bytes));
    }
};

// MT x NT tiles of sums over `steps` steps of k and `parts` left sides that share the right side. `meanwhile` is called
// once a step.
template <class Op, int MT, int NT, class F>
inline void multiply_block(const TileRows& x, int part, int parts, int m, int step, const uint8_t* panel,
                           size_t panel_stride, int steps, void* sums, bool first, F&& meanwhile) {
    constexpr size_t stride = sums_ld * 4;
    const char* a = x.tile(part, m) + step * tile_register_bytes;
    const size_t next_rows = size_t(x.steps) * tile_register_bytes;
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
        load_b<0>(panel + s * tile_register_bytes);
        if constexpr (NT > 1) load_b<1>(panel + panel_stride + s * tile_register_bytes);
        for (int p = 0; p < parts; ++p) {
            const char* rows = a + p * x.part_stride + s * tile_register_bytes;
            load_a<0>(rows, step_bytes);
            Op::template multiply<0, 0>();
            if constexpr (NT > 1) Op::template multiply<0, 1>();
            if constexpr (MT > 1) {
                load_a<1>(rows + next_rows, step_bytes);
                Op::template multiply<1, 0>();
                if constexpr (NT > 1) Op::template multiply<1, 1>();
            }
        }
        meanwhile();
    }
    store_sum<0, 0>(c, stride);
    if constexpr (NT > 1) store_sum<0, 1>(c + 64, stride);
    if constexpr (MT > 1) store_sum<1, 0>(c + 16 * stride, stride);
    if constexpr (MT > 1 && NT > 1) store_sum<1, 1>(c + 16 * stride + 64, stride);
}

struct Panel {
    int m0, rows, tile, tiles, step, steps;
    bool last;  // of these rows and tiles
};

// How the panels of a product follow each other: blocks of rows, in them blocks of tiles, in them stretches of k.
struct Panels {
    int m, tiles, steps, rows, blocks_n, chunks, chunk_steps;
    long count;

    Panels(int m, int tiles, const TileRows& x)
        : m(m), tiles(tiles), steps(x.steps), chunks((x.steps + panel_steps - 1) / panel_steps) {
        chunk_steps = (steps + chunks - 1) / chunks;
        rows = int(block_bytes / (size_t(x.steps) * step_bytes * x.parts) / 32) * 32;
        rows = rows < 64 ? 64 : rows > 256 ? 256 : rows;
        blocks_n = (tiles + amx_panel_tiles - 1) / amx_panel_tiles;
        count = long(m + rows - 1) / rows * blocks_n;
    }
    size_t panel_stride() const { return chunk_steps * tile_register_bytes; }
    Panel operator[](long i) const {
        const int chunk = int(i % chunks), m0 = int(i / chunks / blocks_n) * rows;
        const int tile = int(i / chunks % blocks_n) * amx_panel_tiles, step = chunk * chunk_steps;
        return {m0,
                m - m0 < rows ? m - m0 : rows,
                tile,
                tiles - tile < amx_panel_tiles ? tiles - tile : amx_panel_tiles,
                step,
                steps - step < chunk_steps ? steps - step : chunk_steps,
                chunk == chunks - 1};
    }
};

// Decodes the next panel, evenly spread over `calls`.
template <class Decode>
struct Meanwhile {
    const Decode& decode;
    Panel p;
    uint8_t* panel;
    size_t stride;
    int calls, units, credit = 0, tile = 0, step = 0;

    Meanwhile(const Decode& decode, const Panel& p, uint8_t* panel, size_t stride, int calls)
        : decode(decode), p(p), panel(panel), stride(stride), calls(calls), units(p.tiles * p.steps) {}
    LLMFP4_INLINE void unit() {
        decode(p.tile + tile, p.step + step, panel + tile * stride + step * tile_register_bytes);
        if (++step == p.steps) step = 0, ++tile;
    }
    LLMFP4_INLINE void operator()() {
        for (credit += units; credit >= calls; credit -= calls) unit();
    }
};

// x · decoded weights [16 · tiles outputs]. decode(tile, step, out) makes one B tile; finish(m0, rows, tile, tiles,
// sums) takes the sums of up to 32 rows, [part if separate][rows, to 16][sums_ld]. Parts have sums in common or of
// their own (`separate`).
template <class Op, class Decode, class Finish>
inline void multiply_tiles(int threads, int m, int tiles, const TileRows& x, bool separate, const Decode& decode,
                           const Finish& finish) {
    const Panels panels(m, tiles, x);
    const int sets = separate ? x.parts : 1, parts = separate ? 1 : x.parts;
    constexpr size_t rows_bytes = 32 * sums_ld * 4;
    const size_t stride = panels.panel_stride(), panel_bytes = amx_panel_tiles * stride;
    parallel_ranges(threads, panels.count, [&](long begin, long end) {
        const TileSession session;
        auto* memory = static_cast<uint8_t*>(workspace(slot_panel, 2 * panel_bytes));
        auto* all_sums = static_cast<char*>(workspace(slot_accumulators, sets * size_t(panels.rows) * sums_ld * 4));
        const long first = begin * panels.chunks, last = end * panels.chunks;
        for (Meanwhile<Decode> all(decode, panels[first], memory, stride, 1); all.tile < all.p.tiles;) all.unit();
        for (long i = first; i < last; ++i) {
            const Panel p = panels[i];
            const uint8_t* panel = memory + (i - first) % 2 * panel_bytes;
            const int calls = (p.rows + 31) / 32 * sets * ((p.tiles + 1) / 2) * p.steps;
            Panel next = panels[i + 1 < last ? i + 1 : i];
            if (i + 1 == last) next.tiles = 0;
            Meanwhile<Decode> meanwhile(decode, next, memory + (i + 1 - first) % 2 * panel_bytes, stride, calls);
            for (int r = 0; r < p.rows; r += 32) {
                char* sums = all_sums + r / 32 * sets * rows_bytes;
                for (int set = 0; set < sets; ++set)
                    with_block<2>((p.rows - r + 15) / 16, [&](auto mt) {
                        for (int t = 0; t < p.tiles;)
                            t += with_block<2>(p.tiles - t, [&](auto nt) {
                                multiply_block<Op, mt, nt>(x, set, parts, p.m0 + r, p.step, panel + t * stride, stride,
                                                           p.steps, sums + set * rows_bytes + t * tile_n * 4,
                                                           p.step == 0, meanwhile);
                            });
                    });
                if (p.last) finish(p.m0 + r, p.rows - r < 32 ? p.rows - r : 32, p.tile, p.tiles, sums);
            }
        }
    });
}

}  // namespace llmfp4::cpu::amx
