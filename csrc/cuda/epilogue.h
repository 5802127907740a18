// Sums on their way out: from the tensor cores through shared memory to y [m, n], or, where blocks share a sum over k,
// to `partial`, from which the block that comes last adds them in order: the same bits in every run.
#pragma once
#include "device.h"

namespace llmfp4::cuda {

constexpr int32_t plane_weight = 128;  // of the second int8 plane of an integer operand, see quantize.h

struct Output {
    void* y;  // [m, n] contiguous
    Dtype dtype;
    int m, n;
    const float* row_scale;  // [n]
    const float* bias;       // [n] or null
    const float* x_scale;    // [m]: what one unit of a sum is worth, NaN for a token with NaN or Inf; null: 1
    int planes;              // of activations: row planes·m + p of the products is plane p of token m
    int splits;              // blocks that share a sum over k
    void* partial;           // [splits][planes · m][n], only with splits > 1
    unsigned* arrived;       // one counter per tile, all 0 between kernels
};

inline Output output_of(const Weight& w, const Plan& plan, const Call& call) {
    char* partial = call.workspace + plan.x_bytes + plan.scale_bytes;
    const float* x_scale = plan.scale_bytes ? reinterpret_cast<const float*>(call.workspace + plan.x_bytes) : nullptr;
    return {call.y,  Dtype(call.dtype), call.m,      w.n,     w.row_scale, w.bias,
            x_scale, plan.planes,       plan.splits, partial, call.arrived};
}

// Sums of `rows` rows of products (a whole number of tokens) from row0 on and `outs` outputs from out0 on: the sum of
// row r and output o at at[r · row_stride + o].
template <class Sum>
struct Tile {
    const Sum* at;
    size_t row_stride;
    int row0, rows, out0, outs;
};

__device__ inline float scaled(const Output& out, const int32_t* sum, size_t row_stride, int token, int o) {
    const float whole =
        out.planes == 2 ? to_float(int64_t(sum[0]) + int64_t(plane_weight) * sum[row_stride]) : to_float(sum[0]);
    return mul(mul(whole, out.x_scale[token]), out.row_scale[o]);
}

__device__ inline float scaled(const Output& out, const float* sum, size_t row_stride, int token, int o) {
    float whole = sum[0];
    for (int plane = 1; plane < out.planes; ++plane) whole = add(whole, sum[plane * row_stride]);
    if (out.x_scale) whole = mul(whole, out.x_scale[token]);
    return mul(whole, out.row_scale[o]);
}

// y[token, o] for a whole tile; consecutive threads take consecutive outputs.
template <class Sum>
__device__ inline void finish(const Output& out, const Tile<Sum>& tile) {
    for (int i = threadIdx.x; i < tile.rows / out.planes * tile.outs; i += blockDim.x) {
        const int row = i / tile.outs * out.planes, o = i % tile.outs, token = (tile.row0 + row) / out.planes;
        if (token >= out.m || tile.out0 + o >= out.n) continue;
        float v = scaled(out, tile.at + row * tile.row_stride + o, tile.row_stride, token, tile.out0 + o);
        if (out.bias) v = add(v, out.bias[tile.out0 + o]);
        store_rounded(out.y, out.dtype, size_t(token) * out.n + tile.out0 + o, v);
    }
}

template <class Sum>
__device__ inline Sum* partial_at(const Output& out, int split, int row, int o) {
    return static_cast<Sum*>(out.partial) + (size_t(split) * out.planes * out.m + row) * out.n + o;
}

template <class Sum>
__device__ inline void keep(const Output& out, const Tile<Sum>& tile, int split) {
    for (int i = threadIdx.x; i < tile.rows * tile.outs; i += blockDim.x) {
        const int r = i / tile.outs, o = i % tile.outs;
        if (tile.row0 + r < out.planes * out.m && tile.out0 + o < out.n)
            *partial_at<Sum>(out, split, tile.row0 + r, tile.out0 + o) = tile.at[r * tile.row_stride + o];
    }
}

// Adds what all splits have kept of a tile, split 0 first, in the memory of split 0, and finishes it.
template <class Sum>
__device__ inline void add_kept(const Output& out, int row0, int rows, int out0, int outs) {
    rows = min(rows, out.planes * out.m - row0), outs = min(outs, out.n - out0);
    for (int i = threadIdx.x; i < rows * outs; i += blockDim.x) {
        Sum* first = partial_at<Sum>(out, 0, row0 + i / outs, out0 + i % outs);
        Sum sum = *first;
        for (int split = 1; split < out.splits; ++split)
            sum = add(sum, *partial_at<Sum>(out, split, row0 + i / outs, out0 + i % outs));
        *first = sum;
    }
    block_barrier();
    finish(out, Tile<Sum>{partial_at<Sum>(out, 0, row0, out0), size_t(out.n), row0, rows, out0, outs});
}

}  // namespace llmfp4::cuda
