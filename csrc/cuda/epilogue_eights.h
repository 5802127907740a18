// `finish` (epilogue.h) for rows that can be written 16 bytes at a time: eight columns of a token a thread.
#pragma once
#include "epilogue.h"

namespace llmfp4::cuda {

__device__ inline bool takes_eights(const Output& out) {
    return out.planes == 1 && out.columns() % 8 == 0 && reinterpret_cast<uintptr_t>(out.y) % 16 == 0;
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

// Outputs o .. o + 3 of a token; `sums` is a multiple of 16 bytes.
template <class Sum>
__device__ inline void linear_four(const Output& out, const Sum* sums, int token, int o, float* v) {
    union {
        uint4 vector;
        Sum sums[4];
    } at;
    at.vector = *reinterpret_cast<const uint4*>(sums);
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = linear_output(out, &at.sums[j], 0, token, o + j);
}

template <bool gated, class Team, class Sum>
__device__ inline void finish_eights_as(const Output& out, const Tile<Sum>& tile) {
    const int step = gated ? 16 : 8, eights = tile.outs / step;
    for (int i = Team::thread(); i < tile.rows * eights; i += Team::threads()) {
        const int r = i / eights, token = tile.row0 + r, o = tile.out0 + i % eights * step;
        if (token >= out.m || o >= out.n) continue;
        const Sum* sums = tile.at + r * tile.row_stride + i % eights * step;
        float v[8];
#pragma unroll
        for (int half = 0; half < 8; half += 4) {
            linear_four(out, sums + half, token, o + half, v + half);
            if (!gated) continue;
            float up[4];
            linear_four(out, sums + 8 + half, token, o + 8 + half, up);
#pragma unroll
            for (int j = 0; j < 4; ++j) v[half + j] = mul(silu(v[half + j]), up[j]);
        }
        const size_t at = size_t(token) * out.columns() + (gated ? o / 2 : o);
        if (out.residual)
#pragma unroll
            for (int j = 0; j < 8; ++j) v[j] = add(v[j], load_wide(out.residual, out.dtype, at + j));
        store_eight(out.y, out.dtype, at, v);
    }
}

// The sums of a row lie at multiples of 16 bytes; consecutive threads take consecutive columns.
template <class Team, class Sum>
__device__ inline void finish_eights(const Output& out, const Tile<Sum>& tile) {
    out.gated ? finish_eights_as<true, Team>(out, tile) : finish_eights_as<false, Team>(out, tile);
}

}  // namespace llmfp4::cuda
