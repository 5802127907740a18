// Up to 16 rows of activations: y = epilogue(Σ_k x[row, k] · weight[n, k]), weights as operand A of the tensor cores.
//
// A warp streams one strip of 16 outputs over a slice of k, `depth` loads of 16 bytes a lane under way, straight from
// global memory: nothing is read twice. A block is warps_n strips times warps_k slices, blockIdx.y another split of k;
// warps that share a slice find its activations in L1.
#pragma once
#include "decode.h"
#include "epilogue.h"

namespace llmfp4::cuda {

constexpr int gemv_warps = 8, gemv_threads = gemv_warps * warp_size, gemv_depth = 4;
static_assert(gemv_depth % 2 == 0, "activations alternate between two sets of registers");

template <class Operand>
struct Gemv {
    Product<Operand> product;
    Output out;
    int warps_n;
};

// Which strip and which units [begin, end) this warp takes.
struct WarpShare {
    int strip_in_block, slice, strip, begin, end;

    __device__ WarpShare(int warps_n, int strips, int units_k) {
        const int warp = threadIdx.x / warp_size, warps_k = gemv_warps / warps_n;
        strip_in_block = warp % warps_n, slice = warp / warps_n;
        strip = blockIdx.x * warps_n + strip_in_block;
        const int index = blockIdx.y * warps_k + slice, slices = warps_k * gridDim.y;
        begin = int(int64_t(units_k) * index / slices), end = int(int64_t(units_k) * (index + 1) / slices);
        if (strip >= strips) end = begin;
    }
};

// The warps' sums → y: added over slices in order, then over blocks.
template <int tokens8, class Sum>
__device__ inline void gather(const Output& out, int used_rows, int warps_n, const WarpShare& share,
                              const Sum (&acc)[tokens8][4], Sum* sums) {
    constexpr int rows = 8 * tokens8;
    const int lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4, outs = warps_n * unit_n;
    // Sums of one slice lie side by side: [slice][row][warps_n · 16 outputs].
    Sum* mine = sums + share.slice * rows * outs + share.strip_in_block * unit_n;
#pragma unroll
    for (int i = 0; i < tokens8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) mine[(8 * i + 2 * t + e % 2) * outs + g + e / 2 * 8] = acc[i][e];
    block_barrier();
    for (int i = threadIdx.x; i < rows * outs; i += blockDim.x) {
        Sum sum = sums[i];
        for (int slice = 1; slice < gemv_warps / warps_n; ++slice) sum = add(sum, sums[slice * rows * outs + i]);
        sums[i] = sum;
    }
    block_barrier();
    const Tile<Sum> tile{sums, size_t(outs), 0, used_rows, int(blockIdx.x) * outs, outs};
    if (out.splits == 1) return finish(out, tile);
    keep(out, tile, blockIdx.y);
    __shared__ unsigned last;
    if (arrives_last(out.arrived + blockIdx.x, out.splits, &last)) add_kept<Sum>(out, 0, used_rows, tile.out0, outs);
}

// Lane 4·g + t's inputs of a row in a unit: operands B of the products, the same 16 inputs as its codes.
template <class Operand>
__device__ inline void load_x(const Product<Operand>& p, int row, int unit, int t, uint4 (&x)[Operand::vectors]) {
    const int at = (unit * unit_k + 16 * t) * Operand::bytes;
#pragma unroll
    for (int v = 0; v < Operand::vectors; ++v)
        x[v] = row < p.rows && at + 16 * v < p.k_bytes
                   ? *reinterpret_cast<const uint4*>(p.x + row * p.x_stride + at + 16 * v)
                   : uint4{};
}

template <class Operand, bool grouped, int tokens8>
__device__ inline void gemv_block(const Gemv<Operand>& kernel) {
    extern __shared__ __align__(16) char sums[];
    const Product<Operand>& p = kernel.product;
    const WarpShare share(kernel.warps_n, p.strips, p.units_k);
    const int lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
    const uint4* codes = p.codes + size_t(share.strip) * p.units_k * warp_size + lane;

    typename Operand::Sum acc[tokens8][4] = {};
    uint4 ahead[gemv_depth];
    ScalePair scale[gemv_depth] = {};
    auto load_ahead = [&](int i, int unit) {
        const bool inside = unit < share.end;
        ahead[i] = inside ? load_stream(codes + unit * warp_size) : uint4{};
        if (grouped) scale[i] = inside ? *scales_at(p, share.strip, unit, g, t) : ScalePair(0);
    };
#pragma unroll
    for (int i = 0; i < gemv_depth; ++i) load_ahead(i, share.begin + i);
    wait_for_previous_kernel();  // weights do not depend on it
    uint4 x[2][tokens8][Operand::vectors], shifts[2] = {};
    auto load_next = [&](int i, int unit) {
        if (Operand::shifted && p.shift && unit < share.end)
            shifts[i % 2] = *reinterpret_cast<const uint4*>(p.shift + unit * unit_k + 16 * t);
#pragma unroll
        for (int j = 0; j < tokens8; ++j) load_x(p, unit < share.end ? 8 * j + g : p.rows, unit, t, x[i % 2][j]);
    };
    load_next(0, share.begin);
#pragma unroll 1
    for (int unit = share.begin; unit < share.end; unit += gemv_depth) {
#pragma unroll
        for (int i = 0; i < gemv_depth; ++i) {
            load_next(i + 1, unit + i + 1);
            Operand weights = decoded(p, ahead[i], shifts[i % 2]);
            if constexpr (grouped) weights.scale(scale[i], p.scale_kind);
            load_ahead(i, unit + gemv_depth + i);
#pragma unroll
            for (int j = 0; j < tokens8; ++j) weights.multiply(acc[j], x[i % 2][j]);
        }
    }
    gather(kernel.out, min(8 * tokens8, p.rows), kernel.warps_n, share, acc,
           reinterpret_cast<typename Operand::Sum*>(sums));
}

}  // namespace llmfp4::cuda
