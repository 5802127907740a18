// Tiles of a product among blocks that all run at once. First come whole tiles, as many for every block. The units of k
// of the tiles that are left are one sequence, tile after tile, of which each sharer takes an even piece (stream-K).
// Ten tiles of 9 units, four blocks:
//
//     block            0            1            2            3
//     whole tiles      0            1            2            3
//                      4            5            6            7
//     the rest         8 8 8 8 8    8 8 8 8 9    9 9 9 9      9 9 9 9
//
// Blocks that have parts of one tile keep their sums; whoever comes last adds them in the order of k. So no block waits
// for another, and sums have the same bits in every run.
#pragma once
#include "device.h"

namespace llmfp4::cuda {

struct StreamK {
    unsigned blocks;        // of the grid
    unsigned units;         // of a tile
    unsigned row_tiles;     // tile t is the t % row_tiles'th along the rows: blocks running together share codes in L2
    unsigned whole, turns;  // tiles taken whole; so many by each block where others are shared
    unsigned shared;        // units of the others together
    unsigned each, more;    // units of a sharer; the first `more` take one more

    __device__ unsigned begin_of(unsigned block) const { return min(block * each + min(block, more), shared); }
    // Who takes this unit of those that are shared.
    __device__ unsigned sharer_of(unsigned unit) const {
        const unsigned wide = more * (each + 1);
        return unit < wide ? unit / (each + 1) : more + (unit - wide) / each;
    }
};

inline StreamK stream_k(const Plan& plan, unsigned tiles, unsigned row_tiles, unsigned units) {
    const unsigned whole = plan.whole, shared = (tiles - whole) * units, sharers = plan.sharers ? plan.sharers : 1;
    return {plan.grid[0], units, row_tiles, whole, whole / plan.grid[0], shared, shared / sharers, shared % sharers};
}

// The units of one tile that a block takes one after the other: `count` from `begin` on.
struct Range {
    unsigned tile, begin, count;

    __device__ int row_tile(const StreamK& share) const { return tile % share.row_tiles; }
    __device__ int out_tile(const StreamK& share) const { return tile / share.row_tiles; }

    // That which holds the i-th unit of this block; count is 0 where the block has less.
    __device__ Range(const StreamK& share, unsigned i) : begin(0), count(share.units) {
        tile = blockIdx.x + i / share.units * share.blocks;
        if (tile < share.whole) return;
        const unsigned first = share.begin_of(blockIdx.x), end = share.begin_of(blockIdx.x + 1);
        const unsigned at = first + i - share.turns * share.units, start = at - at % share.units;
        tile = share.whole + at / share.units;
        begin = first > start ? first - start : 0;
        count = at < end ? min(end - start, share.units) - begin : 0;
    }
};

// The units of a block, one after the other.
struct Units {
    const StreamK& share;
    unsigned taken = 0, unit = 0, end = 0;
    int row_tile, out_tile;

    __device__ explicit Units(const StreamK& share) : share(share) {}

    // To the next; false where there is none.
    __device__ bool next() {
        if (++unit >= end) {
            const Range range(share, taken);
            if (range.count == 0) return false;
            row_tile = range.row_tile(share), out_tile = range.out_tile(share);
            unit = range.begin, end = range.begin + range.count;
        }
        ++taken;
        return true;
    }
};

// The parts that blocks have of a shared tile. Those of all tiles are numbered through, block + tile: from one to the
// next either is another, or both are.
struct Parts {
    unsigned tile;  // the first of those that are shared is 0
    unsigned mine;  // this block's number

    __device__ Parts(const StreamK& share, const Range& range)
        : tile(range.tile - share.whole), mine(blockIdx.x + tile) {}

    __device__ unsigned first(const StreamK& share) const { return share.sharer_of(tile * share.units) + tile; }
    __device__ unsigned last(const StreamK& share) const {
        return share.sharer_of((tile + 1) * share.units - 1) + tile;
    }
};

}  // namespace llmfp4::cuda
