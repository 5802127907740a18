// x [m, k] → E2M1 codes [m][padded k / 2], block scales [m][padded k / block] and the worth of one unit [m]; rounded as
// llmfp4_kernels/reference.py does, bit by bit.
//
//     static     code = element(x · 2^shift / x_scale)                  scale 4 · 2^(max_shift - shift)
//     dynamic    code = element(x · x_factor / x_scale)                 scale 4
//     integers   code = element(x · x_factor / x_scale / group)         scale 4 · group
//     blocks     code = element(x · x_factor / x_scale / scale)         scale from the block's largest value
//
// The factor 4 makes sums the integers of the other kernels (both elements doubled) where weights have no group scales.
// Codes of 128 places are 16 words of eight, stored as products read them: words t, 4 + t, 8 + t, 12 + t side by side.
#pragma once
#include "decode_grouped.h"
#include "device_sm120.h"
#include "linear_sm120.h"
#include "quantize.h"

namespace llmfp4::cuda {

constexpr int shift_block = 32;  // places with one shift

struct QuantizeBlocks {
    Quantize q;  // shift and shift_top as the name says, shift by blocks
    XGroups groups;
    ScaleKind kind;
    const int32_t* channel;
    uint8_t* scales;
};

__device__ inline void load_places(const QuantizeBlocks& p, int token, int k0, float (&v)[chunk_k]) {
    if (!p.channel) return load_chunk(p.q, token, k0, v);
#pragma unroll
    for (int i = 0; i < chunk_k; ++i) {
        const int channel = p.channel[k0 + i];
        const size_t at = size_t(token) * p.q.k + channel;
        v[i] = 0;
        if (channel >= 0)
            v[i] = p.q.dtype == Dtype::f32 ? static_cast<const float*>(p.q.x)[at]
                                           : widen(static_cast<const uint16_t*>(p.q.x)[at], p.q.dtype);
    }
}

// The byte of a scale that its format holds.
__device__ inline uint8_t scale_byte(float scale, ScaleKind kind) {
    return kind == ScaleKind::e8m0 ? uint8_t(bits_of(scale) >> 23) : nearest_e4m3(scale);
}

// The scale byte of a block whose largest value is this. E8M0: one binade more from 1.75 on; 1 for zeros.
__device__ inline uint8_t byte_for(float largest, float x_scale, const QuantizeBlocks& p) {
    if (p.kind == ScaleKind::e4m3) {
        const float scale = divide(divide(largest, p.q.top), x_scale);
        return nearest_e4m3(fminf(fmaxf(scale, power_of_two(-9)), 448.0f));
    }
    constexpr int largest_exponent = 2;  // of E2M1
    const int exponent = int((bits_of(largest) + (1u << 21)) >> 23) - largest_exponent;
    return largest == 0 ? 127 : uint8_t(min(max(exponent, 0), 254));
}

// v → elements; returns the block's scale byte. All lanes of the warp come here.
__device__ inline uint8_t quantize_chunk(const QuantizeBlocks& p, int k0, float x_scale, float (&v)[chunk_k]) {
    const Quantize& q = p.q;
    const float inverse = reciprocal(x_scale);
    if (p.groups == XGroups::none) {
        const int shift = q.shift && k0 < q.padded_k ? q.shift[k0 / shift_block] : 0;
        const float by = mul(inverse, power_of_two(shift));
#pragma unroll
        for (int i = 0; i < chunk_k; ++i) v[i] = rounded(mul(v[i], by), q);
        return scale_byte(power_of_two(2 + q.shift_top - shift), p.kind);
    }
    uint32_t largest = largest_bits(v);
    if (p.kind == ScaleKind::e8m0) largest = max(largest, from_lane_xor(largest, 1));
#pragma unroll
    for (int i = 0; i < chunk_k; ++i) v[i] = mul(v[i], inverse);
    float factor;
    uint8_t byte;
    if (p.groups == XGroups::integers) {
        float integers[chunk_k];
#pragma unroll
        for (int i = 0; i < chunk_k; ++i) integers[i] = v[i];
        factor = quantize_best(q, integers), byte = scale_byte(mul(4.0f, factor), p.kind);
    } else {
        byte = byte_for(float_of(largest), x_scale, p), factor = scale_value(byte, p.kind);
    }
    const float by = reciprocal(factor);
#pragma unroll
    for (int i = 0; i < chunk_k; ++i) v[i] = rounded(mul(v[i], by), q);
    return byte;
}

__device__ inline void store_elements(const Quantize& q, int token, int k0, const float (&v)[chunk_k]) {
    uint32_t words[2] = {};
#pragma unroll
    for (int i = 0; i < chunk_k; ++i)
        words[i / 8] |= (magnitude_code(v[i], q) | bits_of(v[i]) >> 31 << 3) << (4 * (i % 8));
    const int word = k0 % 128 / 8;  // even
    uint32_t* to = reinterpret_cast<uint32_t*>(q.out + (size_t(token) * q.padded_k + k0 / 128 * 128) / 2);
    to[word % 4 * 4 + word / 4] = words[0], to[(word + 1) % 4 * 4 + word / 4] = words[1];
}

__device__ inline void quantize_blocks(const QuantizeBlocks& p) {
    __shared__ uint32_t shared[32];
    let_next_kernel_start();
    const Quantize& q = p.q;
    const int token = blockIdx.x, step = blockDim.x * chunk_k, mine = threadIdx.x * chunk_k;
    const int block = p.kind == ScaleKind::e8m0 ? 32 : 16;
    float v[chunk_k] = {};
    uint32_t largest = 0;
    for (int k0 = mine; k0 < q.padded_k; k0 += step) {
        load_places(p, token, k0, v);
        largest = max(largest, largest_bits(v));
    }
    largest = block_max(largest, shared);
    const bool special = largest >= 0x7f800000u;
    float x_scale = 1.0f;  // of E8M0 blocks
    if (q.static_scale != 0)
        x_scale = q.static_scale;
    else if (p.groups != XGroups::blocks || p.kind == ScaleKind::e4m3) {
        const float of_group = p.groups == XGroups::integers ? q.most_factor : 448.0f;
        const float reach = p.groups == XGroups::none ? q.top : mul(q.top, of_group);
        x_scale = divide(fmaxf(float_of(largest), power_of_two(-100)), reach);
    }
    for (int first = 0; first < q.padded_k; first += step) {
        const int k0 = first + mine;
        const bool inside = k0 < q.padded_k;
#pragma unroll
        for (int i = 0; i < chunk_k; ++i) v[i] = 0;
        if (inside && !special) load_places(p, token, k0, v);
        const uint8_t byte = quantize_chunk(p, k0, x_scale, v);
        if (!inside) continue;
        store_elements(q, token, k0, v);
        if (k0 % block == 0) p.scales[(size_t(token) * q.padded_k + k0) / block] = byte;
    }
    if (threadIdx.x == 0) q.x_scale[token] = special ? float_of(0x7fc00000u) : mul(x_scale, q.unit);
}

}  // namespace llmfp4::cuda
