// Sums on their way out: from the tensor cores through shared memory to y [m, n], or, where blocks share a sum over k,
// to `partial`, from which the block that comes last adds them in order: the same bits in every run.
#pragma once
#include "device.h"

namespace llmfp4::cuda {

constexpr int32_t plane_weight = 128;  // of the second int8 plane of an integer operand, see quantize.h

struct Output {
    void* y;               // [m, columns] contiguous
    const void* residual;  // the same, or null
    Dtype dtype;
    bool gated;  // outputs are eight gates, then their eight ups: y = silu(gate) · up
    int m, n;
    const float* row_scale;  // [n]
    const float* bias;       // [n] or null
    const float* x_scale;    // [m]: what one unit of a sum is worth, NaN for a token with NaN or Inf; null: 1
    int planes;              // of activations: row planes·m + p of the products is plane p of token m
    int splits;              // blocks that share a sum over k
    void* partial;           // [splits][planes · m][n], only with splits > 1
    unsigned* arrived;       // one counter per tile, all 0 between kernels

    __host__ __device__ int columns() const { return gated ? n / 2 : n; }
};

inline Output output_of(const Weight& w, const Plan& plan, const Call& call) {
    char* partial = call.workspace + plan.x_bytes + plan.scale_bytes;
    const float* x_scale = plan.scale_bytes ? reinterpret_cast<const float*>(call.workspace + plan.x_bytes) : nullptr;
    return {call.y, call.residual, Dtype(call.dtype), call.gated,  call.m,  w.n,         w.row_scale,
            w.bias, x_scale,       plan.planes,       plan.splits, partial, call.arrived};
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

// e^x for |x| up to 87 (beyond, that of ±87) to 2 units, by operations that every machine rounds alike:
// 2^n · e^r with n = x / ln 2 to nearest and r by Cephes' polynomial. epilogue.py has the same.
__device__ inline float exponential(float x) {
    x = fminf(fmaxf(x, -87.0f), 87.0f);
    const float n = nearest_even(mul(x, 1.44269504f));
    const float r = sub(sub(x, mul(n, 0.693359375f)), mul(n, -2.12194440e-4f));
    float p = 1.9875691500e-4f;
    p = add(mul(p, r), 1.3981999507e-3f);
    p = add(mul(p, r), 8.3334519073e-3f);
    p = add(mul(p, r), 4.1665795894e-2f);
    p = add(mul(p, r), 1.6666665459e-1f);
    p = add(mul(p, r), 5.0000001201e-1f);
    return mul(add(add(mul(mul(p, r), r), r), 1.0f), power_of_two(truncate(n)));
}

// Below -87, where it is 0 to 1e-36, that of -87.
__device__ inline float silu(float x) {
    x = x < -87.0f ? -87.0f : x;
    return divide(x, add(1.0f, exponential(-x)));
}

// Output o of a token in fp32: its sum scaled, and the bias.
template <class Sum>
__device__ inline float linear_output(const Output& out, const Sum* sum, size_t row_stride, int token, int o) {
    const float v = scaled(out, sum, row_stride, token, o);
    return out.bias ? add(v, out.bias[o]) : v;
}

// A template, so that the division by `outs` is one by a constant.
template <bool gated, class Team, class Sum>
__device__ inline void finish_as(const Output& out, const Tile<Sum>& tile) {
    const int outs = gated ? tile.outs / 2 : tile.outs, columns = out.columns();
    for (int i = Team::thread(); i < tile.rows / out.planes * outs; i += Team::threads()) {
        const int row = i / outs * out.planes, column = i % outs, token = (tile.row0 + row) / out.planes;
        const int o = gated ? column / 8 * 16 + column % 8 : column;
        if (token >= out.m || tile.out0 + o >= out.n) continue;
        const Sum* sum = tile.at + row * tile.row_stride + o;
        float v = linear_output(out, sum, tile.row_stride, token, tile.out0 + o);
        if (gated) v = mul(silu(v), linear_output(out, sum + 8, tile.row_stride, token, tile.out0 + o + 8));
        const size_t at = size_t(token) * columns + (gated ? tile.out0 / 2 : tile.out0) + column;
        if (out.residual) v = add(v, load_wide(out.residual, out.dtype, at));
        store_rounded(out.y, out.dtype, at, v);
    }
}

// y of a whole tile, gates and residual included, rounded once; consecutive threads take consecutive columns.
template <class Team = WholeBlock, class Sum>
__device__ inline void finish(const Output& out, const Tile<Sum>& tile) {
    out.gated ? finish_as<true, Team>(out, tile) : finish_as<false, Team>(out, tile);
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
