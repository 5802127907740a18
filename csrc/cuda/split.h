// x [m, k] → operands [m · planes, padded k] of 16 bits, where x itself is none: bf16 parts that sum up to
// x · factor, to 2^-17 with two planes and exactly with four (three parts and zeros); or x as it is, padded (one
// plane).
#pragma once
#include "blocks.h"
#include "device.h"

namespace llmfp4::cuda {

struct Split {
    const void* x;  // [m, k] contiguous
    Dtype dtype;
    int m, k, padded_k, planes;
    uint16_t* parts;      // [planes · m, padded_k]; row planes·m + p is plane p of token m
    int blocked_rows;     // not 0: they lie as blocks.h says, so many rows of them
    const float* factor;  // [padded_k] or null
};

__device__ inline void split_token(const Split& q) {
    let_next_kernel_start();
    const int token = blockIdx.x;
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < q.padded_k; i += gridDim.y * blockDim.x) {
        const size_t at = size_t(token) * q.k + i;
        auto part_of = [&](int plane) -> uint16_t& {
            const int row = token * q.planes + plane;
            if (q.blocked_rows == 0) return q.parts[size_t(row) * q.padded_k + i];
            char* word =
                reinterpret_cast<char*>(q.parts) + block_at(q.blocked_rows, 2, row, i) + i % 16 / 2 * block_bytes;
            return reinterpret_cast<uint16_t*>(word)[i % 2];
        };
        if (q.planes == 1) {
            part_of(0) = i < q.k ? static_cast<const uint16_t*>(q.x)[at] : 0;
            continue;
        }
        float rest = 0;
        if (i < q.k)
            rest = q.dtype == Dtype::f32 ? static_cast<const float*>(q.x)[at]
                                         : widen(static_cast<const uint16_t*>(q.x)[at], q.dtype);
        if (q.factor) rest = mul(rest, q.factor[i]);
        for (int plane = 0; plane < q.planes; ++plane) {
            uint16_t part = plane == 3 ? 0 : nearest_bf16(rest);
            // Beyond bf16's largest number the nearest is Inf: the one before it, and a rest, are exact.
            if (is_finite(rest) && !is_finite(widen(part, Dtype::bf16))) --part;
            part_of(plane) = part;
            rest = is_finite(widen(part, Dtype::bf16)) ? sub(rest, widen(part, Dtype::bf16)) : 0.0f;
        }
    }
}

}  // namespace llmfp4::cuda
