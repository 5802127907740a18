// `finish` (epilogue.h) for rows that can be written 16 bytes at a time: eight outputs of a token a thread.
#pragma once
#include "epilogue.h"

namespace llmfp4::cuda {

__device__ inline bool takes_eights(const Output& out) {
    return out.planes == 1 && out.n % 8 == 0 && reinterpret_cast<uintptr_t>(out.y) % 16 == 0;
}

__device__ inline uint32_t rounded_pair(float low, float high, Dtype dtype) {
    if (dtype == Dtype::bf16) return nearest_bf16(low) | uint32_t(nearest_bf16(high)) << 16;
    return nearest_fp16(low) | uint32_t(nearest_fp16(high)) << 16;
}

__device__ inline void store_eight(void* y, Dtype dtype, size_t at, const float (&v)[8]) {
    if (dtype == Dtype::f32) {
        float4* to = reinterpret_cast<float4*>(static_cast<float*>(y) + at);
        to[0] = float4{v[0], v[1], v[2], v[3]}, to[1] = float4{v[4], v[5], v[6], v[7]};
    } else {
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(y) + at) =
            uint4{rounded_pair(v[0], v[1], dtype), rounded_pair(v[2], v[3], dtype), rounded_pair(v[4], v[5], dtype),
                  rounded_pair(v[6], v[7], dtype)};
    }
}

// The sums of a row lie at multiples of 16 bytes; consecutive threads take consecutive outputs.
template <class Sum>
__device__ inline void finish_eights(const Output& out, const Tile<Sum>& tile) {
    const int eights = tile.outs / 8;
    for (int i = threadIdx.x; i < tile.rows * eights; i += blockDim.x) {
        const int r = i / eights, token = tile.row0 + r, o = tile.out0 + i % eights * 8;
        if (token >= out.m || o >= out.n) continue;
        union {
            uint4 vectors[2];
            Sum sums[8];
        } at;
        const uint4* from = reinterpret_cast<const uint4*>(tile.at + r * tile.row_stride + i % eights * 8);
        at.vectors[0] = from[0], at.vectors[1] = from[1];
        float v[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            v[j] = scaled(out, &at.sums[j], 0, token, o + j);
            if (out.bias) v[j] = add(v[j], out.bias[o + j]);
        }
        store_eight(out.y, out.dtype, size_t(token) * out.n + o, v);
    }
}

}  // namespace llmfp4::cuda
