// Any number of rows: y = epilogue(Σ_k x[row, k] · weight[n, k]) in tiles, weights as operand A of the tensor cores.
//
// A block takes 64·strips outputs by 8·rows8 rows: each of its four warps `strips` strips of 16 outputs and all rows,
// so every code is decoded once per block. `stages` steps of 64 inputs are under way from global to shared memory:
//
//     stage   codes  [4 · strips][512]           one unit each, as it lies in memory
//             scales [4 · strips][4][8][2]       with group scales: those of inputs 0, 16, 32 and 48 of the unit
//             shift  [64]                        where weights take it
//             x      [8 · rows8][64]             int8: a quarter warp reads two rows, 128 bytes side by side.
//                                                16 bits: it reads every other 16 bytes of two rows, so odd rows have
//                                                neighbouring pieces swapped. Codes: four rows side by side. No bank
//                                                conflicts any way.
//
// blockIdx.x counts tiles of rows, so that blocks running together share codes in L2; blockIdx.z splits k.
#pragma once
#include "decode.h"
#include "epilogue.h"

namespace llmfp4::cuda {

constexpr int gemm_warps = 4, gemm_threads = gemm_warps * warp_size, gemm_stages = 4, gemm_batch_rows = 32;

template <class Operand>
struct Gemm {
    Product<Operand> product;
    Output out;
};

template <class Operand, bool grouped, int strips, int rows8>
struct GemmTile {
    static constexpr int outs = gemm_warps * strips * unit_n, rows = 8 * rows8;
    static constexpr int row_bytes = Operand::x_bytes, pieces = row_bytes / 16;
    static constexpr int codes_bytes = gemm_warps * strips * unit_bytes, x_bytes = rows * row_bytes;
    static constexpr int scale_bytes = grouped ? gemm_warps * strips * 64 : 0;
    static constexpr int shift_bytes = Operand::shifted ? unit_k : 0, shift_at = codes_bytes + scale_bytes;
    static constexpr int stage_bytes = shift_at + shift_bytes + x_bytes;
    static constexpr int batch_bytes = gemm_batch_rows * outs * 4, pipeline_bytes = gemm_stages * stage_bytes;
    static constexpr int shared_bytes = pipeline_bytes > batch_bytes ? pipeline_bytes : batch_bytes;
    static_assert(rows % gemm_batch_rows == 0, "the epilogue takes whole batches of rows");

    // Where piece `piece` of row `row` of x lies in its stage.
    __device__ static int piece_at(int row, int piece) {
        return shift_at + shift_bytes + row * row_bytes + (Operand::vectors == 2 ? piece ^ (row & 1) : piece) * 16;
    }
};

// The block's sums leave through shared memory, gemm_batch_rows rows at a time: [row][outs].
template <class T, int strips, int rows8, class Sum>
__device__ inline void leave(const Output& out, const Sum (&acc)[strips][rows8][4], Sum* sums, int row0, int out0) {
    const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int batch = 0; batch < T::rows / gemm_batch_rows; ++batch) {
        block_barrier();
#pragma unroll
        for (int s = 0; s < strips; ++s)
#pragma unroll
            for (int i = 0; i < gemm_batch_rows / 8; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    sums[(8 * i + 2 * t + e % 2) * T::outs + (warp * strips + s) * unit_n + g + e / 2 * 8] =
                        acc[s][batch * (gemm_batch_rows / 8) + i][e];
        block_barrier();
        const Tile<Sum> tile{sums, T::outs, row0 + batch * gemm_batch_rows, gemm_batch_rows, out0, T::outs};
        if (out.splits == 1)
            finish(out, tile);
        else
            keep(out, tile, blockIdx.z);
    }
    if (out.splits == 1) return;
    __shared__ unsigned last;
    if (arrives_last(out.arrived + blockIdx.y * gridDim.x + blockIdx.x, out.splits, &last))
        add_kept<Sum>(out, row0, T::rows, out0, T::outs);
}

template <class Operand, bool grouped, int strips, int rows8>
__device__ inline void gemm_block(const Gemm<Operand>& kernel) {
    using T = GemmTile<Operand, grouped, strips, rows8>;
    extern __shared__ __align__(128) char stages[];
    const Product<Operand>& p = kernel.product;
    const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
    const int row0 = blockIdx.x * T::rows, strip0 = blockIdx.y * gemm_warps * strips;
    const int begin = int(int64_t(p.units_k) * blockIdx.z / gridDim.z);
    const int end = int(int64_t(p.units_k) * (blockIdx.z + 1) / gridDim.z);
    auto stage_of = [&](int unit) { return stages + unsigned(unit - begin) % gemm_stages * T::stage_bytes; };

    auto fetch_weights = [&](int unit) {
        char* stage = stage_of(unit);
#pragma unroll
        for (int s = 0; s < strips; ++s) {
            const int strip = strip0 + s * gemm_warps + warp;
            const bool inside = unit < end && strip < p.strips;
            copy_async(stage + (s * gemm_warps + warp) * unit_bytes + lane * 16,
                       inside ? p.codes + (size_t(strip) * p.units_k + unit) * warp_size + lane : p.codes, inside);
        }
        if (grouped && threadIdx.x < gemm_warps * strips * 4) {
            const int strip = strip0 + threadIdx.x / 4;
            const bool inside = unit < end && strip < p.strips;
            copy_async(stage + T::codes_bytes + threadIdx.x * 16,
                       inside ? scales_at(p, strip, unit, 0, threadIdx.x % 4) : p.scales, inside);
        }
        if (Operand::shifted && threadIdx.x < T::shift_bytes / 16) {
            const bool inside = unit < end && p.shift;
            copy_async(stage + T::shift_at + threadIdx.x * 16,
                       inside ? p.shift + unit * unit_k + threadIdx.x * 16 : static_cast<const void*>(p.codes), inside);
        }
    };
    auto fetch_x = [&](int unit) {
        char* stage = stage_of(unit);
#pragma unroll
        for (int i = 0; i < (T::rows * T::pieces + gemm_threads - 1) / gemm_threads; ++i) {
            const int at = threadIdx.x + i * gemm_threads, r = at / T::pieces, piece = at % T::pieces;
            if (r >= T::rows) break;
            const int offset = unit * T::row_bytes + piece * 16;
            const bool inside = unit < end && row0 + r < p.rows && offset < p.k_bytes;
            copy_async(stage + T::piece_at(r, piece), inside ? p.x + (row0 + r) * p.x_stride + offset : p.x, inside);
        }
    };
    typename Operand::Sum acc[strips][rows8][4] = {};
    auto weights_of = [&](const char* stage, int strip) {
        const uint4 shifts = Operand::shifted ? reinterpret_cast<const uint4*>(stage + T::shift_at)[t] : uint4{};
        Operand weights = decoded(p, reinterpret_cast<const uint4*>(stage + strip * unit_bytes)[lane], shifts);
        if constexpr (grouped)
            weights.scale(reinterpret_cast<const ScalePair*>(stage + T::codes_bytes + strip * 64)[8 * t + g],
                          p.scale_kind);
        return weights;
    };
    auto multiply = [&](const char* stage) {
        const Operand first = weights_of(stage, warp * strips), second = weights_of(stage, warp * strips + strips - 1);
#pragma unroll
        for (int i = 0; i < rows8; ++i) {
            uint4 x[Operand::vectors];
            if constexpr (Operand::packed)
                x[0] = Operand::inputs(reinterpret_cast<const uint2*>(stage + T::piece_at(8 * i + g, 0))[t], p.table);
            else
#pragma unroll
                for (int v = 0; v < Operand::vectors; ++v)
                    x[v] = *reinterpret_cast<const uint4*>(stage + T::piece_at(8 * i + g, Operand::vectors * t + v));
            first.multiply(acc[0][i], x);
            if constexpr (strips == 2) second.multiply(acc[1][i], x);
        }
    };

    // Weights of the first stages are fetched before x, which the kernel before may still be writing.
#pragma unroll
    for (int i = 0; i < gemm_stages - 1; ++i) fetch_weights(begin + i);
    wait_for_previous_kernel();
#pragma unroll
    for (int i = 0; i < gemm_stages - 1; ++i) {
        fetch_x(begin + i);
        end_of_copies();
    }
    for (int unit = begin; unit < end; ++unit) {
        wait_for_copies<gemm_stages - 2>();  // and every warp has left the stage that is filled next
        fetch_weights(unit + gemm_stages - 1);
        fetch_x(unit + gemm_stages - 1);
        end_of_copies();
        multiply(stage_of(unit));
    }
    wait_for_copies<0>();
    leave<T>(kernel.out, acc, reinterpret_cast<typename Operand::Sum*>(stages), row0, strip0 * unit_n);
}

}  // namespace llmfp4::cuda
