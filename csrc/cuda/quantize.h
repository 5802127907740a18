// x [m, k] → integers [m · planes, padded k] as the tensor cores take them, and the worth of one unit [m]; rounded as
// llmfp4_kernels/reference.py does, bit by bit. csrc/cpu/quantize.h is the same in C++.
//
//     static    integer = element(x · 2^shift / x_scale) · integer_scale · 2^(max_shift - shift)
//     dynamic   integer = element(x · x_factor / x_scale / group) · integer_scale · group,   x_scale of the token
//
// A block per token, 16 inputs a thread at a time: a group of 16 is one thread's, one of 32 that of two lanes.
#pragma once
#include "store.h"

namespace llmfp4::cuda {

// The element nearest to v: saturating, ties to the even step.
__device__ inline float rounded(float v, const Quantize& q) {
    const uint32_t sign = bits_of(v) & 0x80000000u;
    const float magnitude = fabsf(v) < q.top ? fabsf(v) : q.top;
    const uint32_t binade = max(bits_of(magnitude) & 0x7f800000u, q.smallest);
    // 1.5·2^23 steps of this binade: adding it rounds to a whole step, ties to even.
    const float anchor = float_of((binade + q.to_anchor) | 0x00400000u);
    return float_of(bits_of(sub(add(magnitude, anchor), anchor)) | sign);
}

// 16 inputs of a token from k0 on as floats times x_factor; zeros beyond k.
__device__ inline void load_chunk(const Quantize& q, int token, int k0, float (&v)[chunk_k]) {
    const size_t at = size_t(token) * q.k + k0;
    const char* from = static_cast<const char*>(q.x) + at * bytes_of(q.dtype);
    if (k0 + chunk_k <= q.k && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
        const uint4* vectors = reinterpret_cast<const uint4*>(from);
        if (q.dtype == Dtype::f32) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint4 word = vectors[i];
                v[4 * i] = float_of(word.x), v[4 * i + 1] = float_of(word.y);
                v[4 * i + 2] = float_of(word.z), v[4 * i + 3] = float_of(word.w);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint4 vector = vectors[i];
                const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    v[8 * i + 2 * j] = widen(uint16_t(words[j]), q.dtype);
                    v[8 * i + 2 * j + 1] = widen(uint16_t(words[j] >> 16), q.dtype);
                }
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < chunk_k; ++i) {
            v[i] = 0;
            if (k0 + i < q.k)
                v[i] = q.dtype == Dtype::f32 ? static_cast<const float*>(q.x)[at + i]
                                             : widen(static_cast<const uint16_t*>(q.x)[at + i], q.dtype);
        }
    }
    if (q.x_factor)
#pragma unroll
        for (int i = 0; i < chunk_k; i += 4) {
            const float4 f = *reinterpret_cast<const float4*>(q.x_factor + k0 + i);
            v[i] = mul(v[i], f.x), v[i + 1] = mul(v[i + 1], f.y), v[i + 2] = mul(v[i + 2], f.z),
            v[i + 3] = mul(v[i + 3], f.w);
        }
}

__device__ inline uint32_t largest_bits(const float (&v)[chunk_k]) {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < chunk_k; ++i) largest = max(largest, bits_of(v[i]) & 0x7fffffffu);
    return largest;
}

// Integers of a group at `factor`; returns Σ of squared errors in 1/64 of a unit, which are integers themselves.
__device__ inline int32_t quantize_group(const Quantize& q, const float (&v)[chunk_k], float factor,
                                         float (&integers)[chunk_k]) {
    const float inverse = reciprocal(factor), residual = q.integer_scale * 64, scale = q.integer_scale * factor;
    int32_t error = 0;
#pragma unroll
    for (int i = 0; i < chunk_k; ++i) {
        integers[i] = mul(rounded(mul(v[i], inverse), q), scale);
        const int32_t e = truncate(nearest_even(mul(v[i], residual))) - truncate(integers[i]) * 64;
        error += e * e;
    }
    return error;
}

// v in units of the token → integers, with the least factor that holds the group's largest value, or the one below if
// that errs less; returns that factor. The lanes of a group are neighbours; all lanes of the warp come here.
__device__ inline float quantize_best(const Quantize& q, float (&v)[chunk_k]) {
    uint32_t largest = largest_bits(v);
    for (int lanes = 1; lanes < q.group_size / chunk_k; lanes *= 2)
        largest = max(largest, from_lane_xor(largest, lanes));
    const float needed = round_up_float(divide(float_of(largest), q.top));
    const float holds = fminf(fmaxf(needed, 1.0f), q.most_factor), below = fmaxf(holds - 1.0f, 1.0f);
    float with_holds[chunk_k], with_below[chunk_k];
    int32_t gain = quantize_group(q, v, holds, with_holds) - quantize_group(q, v, below, with_below);
    for (int lanes = 1; lanes < q.group_size / chunk_k; lanes *= 2) gain += from_lane_xor(gain, lanes);
#pragma unroll
    for (int i = 0; i < chunk_k; ++i) v[i] = gain > 0 ? with_below[i] : with_holds[i];
    return gain > 0 ? below : holds;
}

__device__ inline void quantize_static(const Quantize& q, int k0, float (&v)[chunk_k]) {
    const float inverse = reciprocal(q.static_scale);
    uint4 shifts{};
    if (q.shift) shifts = *reinterpret_cast<const uint4*>(q.shift + k0);
    const uint32_t words[4] = {shifts.x, shifts.y, shifts.z, shifts.w};
#pragma unroll
    for (int i = 0; i < chunk_k; ++i) {
        const int shift = int(words[i / 4] >> (8 * (i % 4)) & 0xffu);
        const float element = rounded(mul(v[i], mul(inverse, power_of_two(shift))), q);
        v[i] = mul(element, q.integer_scale * power_of_two(q.shift_top ? q.shift_top - shift : 0));
    }
}

// The largest of all threads' values; `shared` holds 32.
__device__ inline uint32_t block_max(uint32_t value, uint32_t* shared) {
    value = warp_max(value);
    if (threadIdx.x % warp_size == 0) shared[threadIdx.x / warp_size] = value;
    block_barrier();
    uint32_t largest = 0;
    for (unsigned w = 0; w < blockDim.x / warp_size; ++w) largest = max(largest, shared[w]);
    return largest;
}

__device__ inline void quantize_token(const Quantize& q) {
    __shared__ uint32_t shared[32];
    let_next_kernel_start();
    const int token = blockIdx.x, step = blockDim.x * chunk_k, first = threadIdx.x * chunk_k;
    float v[chunk_k] = {};
    uint32_t largest = 0;
    // The last chunk that this pass reads is the first one that the next needs: up to 8192 inputs are read once.
    const int rounds = (q.padded_k + step - 1) / step;
    for (int r = rounds - 1; r >= 0; --r)
        if (first + r * step < q.padded_k) {
            load_chunk(q, token, first + r * step, v);
            largest = max(largest, largest_bits(v));
        }
    largest = block_max(largest, shared);
    const bool special = largest >= 0x7f800000u;
    const float reach = q.group_size ? q.top * q.most_factor : q.top;
    const float dynamic_scale = divide(fmaxf(float_of(largest), power_of_two(-100)), reach);
    const float inverse = reciprocal(dynamic_scale);
    for (int r = 0; r < rounds; ++r) {
        const int k0 = first + r * step;
        if (r > 0 && k0 < q.padded_k) load_chunk(q, token, k0, v);
        if (q.static_scale != 0) {
            if (k0 < q.padded_k) quantize_static(q, k0, v);
        } else {
#pragma unroll
            for (int i = 0; i < chunk_k; ++i) v[i] = mul(v[i], inverse);
            if (q.group_size) {
                if (k0 >= q.padded_k)
#pragma unroll
                    for (int i = 0; i < chunk_k; ++i) v[i] = 0;
                quantize_best(q, v);
            } else {
#pragma unroll
                for (int i = 0; i < chunk_k; ++i) v[i] = mul(rounded(v[i], q), q.integer_scale);
            }
        }
        if (k0 < q.padded_k) {
            if (special)
#pragma unroll
                for (int i = 0; i < chunk_k; ++i) v[i] = 0;
            store_integers(q, token, k0, v);
        }
    }
    if (threadIdx.x == 0) {
        const float x_scale = q.static_scale != 0 ? q.static_scale : dynamic_scale;
        q.x_scale[token] = special ? float_of(0x7fc00000u) : mul(x_scale, q.unit);
    }
}

}  // namespace llmfp4::cuda
