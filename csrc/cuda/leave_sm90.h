// How sums leave the registers of sm_90's products: those of a part of a tile to memory, where the last block of the
// tile finds them, those of a whole tile through shared memory to y.
#pragma once
#include "device_sm90.h"
#include "epilogue_eights.h"
#include "stream_k.h"

namespace llmfp4::cuda {

constexpr int sm90_warps = 8, sm90_threads = (sm90_warps + 1) * warp_size, sm90_outs = sm90_warps * unit_n;
constexpr int sm90_batch_rows = 32;
// Sums of neighbouring rows lie 4 words apart in the banks: a warp's 32 stores meet none twice.
constexpr int sm90_sum_stride = sm90_outs + 4, sm90_sums_bytes = sm90_batch_rows * sm90_sum_stride * 4;
using Multipliers = FirstThreads<sm90_warps * warp_size>;

// Four sums that go to memory at once.
template <class Sum>
struct __align__(16) Four {
    Sum at[4];
};

// Keeps the sums of one part of a tile of so many rows and, where the other blocks have kept theirs, puts those of all
// parts in their place, added in the order of k, and returns true. They are kept as registers hold them: 16 bytes a
// thread, in turn.
template <int rows8, class Sum>
__device__ inline bool gather_parts(const Output& out, const StreamK& share, const Range& range, int rows,
                                    Sum (&acc)[rows8][4]) {
    constexpr int step8 = rows8 > 8 ? rows8 / 8 : 1;  // rows are a multiple of 8 · step8: fewer questions, no spills
    const Parts parts(share, range);
    auto kept = [&](unsigned part) {
        return static_cast<Four<Sum>*>(out.partial) + size_t(part) * rows * (Multipliers::threads() / 8) + threadIdx.x;
    };
    Four<Sum>* mine = kept(parts.mine);
#pragma unroll
    for (int i = 0; i < rows8; ++i)
        if (8 * (i - i % step8) < rows) mine[i * Multipliers::threads()] = {acc[i][0], acc[i][1], acc[i][2], acc[i][3]};
    __shared__ unsigned last;
    const unsigned first = parts.first(share), end = parts.last(share) + 1;
    if (!arrives_last<Multipliers>(out.arrived + parts.tile, end - first, &last)) return false;
#pragma unroll
    for (int i = 0; i < rows8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][e] = 0;
#pragma unroll 1
    for (unsigned part = first; part < end; ++part) {
        const Four<Sum>* from = kept(part);
#pragma unroll
        for (int i = 0; i < rows8; ++i) {
            if (8 * (i - i % step8) >= rows) continue;
            const Four<Sum> sums = from[i * Multipliers::threads()];
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[i][e] = add(acc[i][e], sums.at[e]);
        }
    }
    return true;
}

// The sums of a tile of so many rows leave through shared memory, sm90_batch_rows rows at a time. All multipliers come
// here.
template <int rows8, class Sum>
__device__ inline void leave(const Output& out, const Sum (&acc)[rows8][4], Sum* sums, int row0, int rows, int out0) {
    constexpr int batch8 = sm90_batch_rows / 8;
    constexpr int batches = rows8 / batch8;
    auto leave_batch = [&](int batch) {
        const int thread = Multipliers::thread(), warp = thread / warp_size, g = thread % warp_size / 4, t = thread % 4;
        Multipliers::barrier();
        Sum* mine = sums + 2 * t * sm90_sum_stride + warp * unit_n + g;
#pragma unroll
        for (int i = 0; i < rows8; ++i)
            if (i / batch8 == batch)
#pragma unroll
                for (int e = 0; e < 4; ++e) mine[(8 * (i % batch8) + e % 2) * sm90_sum_stride + e / 2 * 8] = acc[i][e];
        Multipliers::barrier();
        const int left = min(rows - batch * sm90_batch_rows, sm90_batch_rows);
        const Tile<Sum> tile{sums, sm90_sum_stride, row0 + batch * sm90_batch_rows, left, out0, sm90_outs};
        takes_eights(out) ? finish_eights<Multipliers>(out, tile) : finish<Multipliers>(out, tile);
    };
    if constexpr (batches != 4) {  // beside the sums of 64 and 256 rows there are no registers for a loop
#pragma unroll
        for (int batch = 0; batch < batches; ++batch) leave_batch(batch);
    } else {
#pragma unroll 1
        for (int batch = 0; batch * sm90_batch_rows < rows; ++batch) leave_batch(batch);
    }
}

}  // namespace llmfp4::cuda
