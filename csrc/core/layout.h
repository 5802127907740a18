// Where code (n, k) lives: row order on disk, tile order under the CPU kernels.
//
// Tile order: a tile is 16 outputs by 8 inputs in 64 bytes, one cache line, one AVX-512 register.
// Tiles of the same 16 outputs follow each other along k, so that a kernel streams memory forwards.
//
//     byte 4·(n%16) + k%4 of a tile:   low nibble  k%8 = 0..3        n →  0        1        2    ...
//                                      high nibble k%8 = 4..7      k%4 →  0 1 2 3  0 1 2 3  0 ...
//
// Low nibbles of a tile, decoded to bytes, are the operand of a 4-way int8 dot product (VNNI, AMX B tile);
// seen as 16 32-bit lanes, nibble i of every lane is one column of 16 outputs for a float kernel.
// Rows are padded to 16, inputs to 64, both with code 0.
#pragma once
#include <cstddef>
#include <cstdint>

#include "element.h"

namespace llmfp4 {

constexpr int tile_n = 16, tile_k = 8, tile_bytes = 64, pad_k = 64;

LLMFP4_CONSTEXPR size_t round_up(size_t x, size_t unit) { return (x + unit - 1) / unit * unit; }

// Input index k%8 of nibble i of a 32-bit lane.
LLMFP4_CONSTEXPR int k_of_nibble(int i) { return (i & 1) * 4 + (i >> 1); }

struct TileLayout {
    int n, k;

    LLMFP4_CONSTEXPR size_t tiles_n() const { return round_up(n, tile_n) / tile_n; }
    LLMFP4_CONSTEXPR size_t tiles_k() const { return round_up(k, pad_k) / tile_k; }
    LLMFP4_CONSTEXPR size_t padded_k() const { return round_up(k, pad_k); }
    LLMFP4_CONSTEXPR size_t row_bytes() const { return (size_t(k) + 1) / 2; }
    LLMFP4_CONSTEXPR size_t bytes() const { return tiles_n() * tiles_k() * tile_bytes; }

    LLMFP4_CONSTEXPR size_t byte_of(size_t in, size_t ik) const {
        return ((in / tile_n) * tiles_k() + ik / tile_k) * tile_bytes + (in % tile_n) * 4 + ik % 4;
    }
    LLMFP4_CONSTEXPR static int nibble_of(size_t ik) { return int(ik % tile_k / 4); }

    // Group scales follow the same 16 outputs: [n/16][group][16] bytes.
    LLMFP4_CONSTEXPR static size_t scale_of(size_t in, size_t group, size_t groups) {
        return ((in / tile_n) * groups + group) * tile_n + in % tile_n;
    }
};

// Row order [n, ceil(k/2)] → tile order, both zero-padded.
static inline void shuffle(const uint8_t* rows, uint8_t* tiles, TileLayout at) {
    for (size_t b = 0; b < at.bytes(); ++b) tiles[b] = 0;
    for (int n = 0; n < at.n; ++n) {
        const uint8_t* row = rows + n * at.row_bytes();
        for (int k = 0; k < at.k; ++k) {
            const int code = row[k / 2] >> (k % 2 * 4) & 15;
            tiles[at.byte_of(n, k)] |= uint8_t(code << (4 * at.nibble_of(k)));
        }
    }
}

// Tile order → row order; an odd k leaves code 0 in the last high nibble.
static inline void unshuffle(const uint8_t* tiles, uint8_t* rows, TileLayout at) {
    for (int n = 0; n < at.n; ++n) {
        uint8_t* row = rows + n * at.row_bytes();
        for (int k = 0; k < at.k; ++k) {
            const int code = tiles[at.byte_of(n, k)] >> (4 * at.nibble_of(k)) & 15;
            if (k % 2 == 0) row[k / 2] = 0;
            row[k / 2] |= uint8_t(code << (k % 2 * 4));
        }
    }
}

static inline void shuffle_scales(const uint8_t* rows, uint8_t* tiles, TileLayout at, int groups) {
    for (size_t b = 0; b < at.tiles_n() * groups * tile_n; ++b) tiles[b] = 0;
    for (int n = 0; n < at.n; ++n)
        for (int g = 0; g < groups; ++g) tiles[at.scale_of(n, g, groups)] = rows[size_t(n) * groups + g];
}

}  // namespace llmfp4
