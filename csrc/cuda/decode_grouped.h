// int8 activations and weights with a scale per group: the sum of a group is exact in int32, its product with the scale
// is added to a float: the bits of csrc/cpu/gemm_grouped.h where one warp adds all groups. Groups of more than 64
// inputs are added in parts of 64.
//
// A product must not mix groups, and lane t of units.h holds inputs of one group of 16. So the four lanes of a quad
// exchange words first, and quantize.h writes activations in the order that they hold then:
//
//     inputs of lane t    0..3          4..7          8..11         12..15        of its 16
//     units.h             16·t + 0..3   16·t + 4..7   16·t + 8..11  16·t + 12..15
//     here                4·t + 0..3    4·t + 16..19  4·t + 32..35  4·t + 48..51
#pragma once
#include "decode.h"

namespace llmfp4::cuda {

// Word t of each of the four lanes of this quad.
__device__ inline uint4 transposed(const uint4& v) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    const uint32_t r0 = from_lane_xor(odd ? v.x : v.y, 1), r1 = from_lane_xor(odd ? v.z : v.w, 1);
    const uint32_t w0 = odd ? r0 : v.x, w1 = odd ? v.y : r0, w2 = odd ? r1 : v.z, w3 = odd ? v.w : r1;
    const uint32_t s0 = from_lane_xor(upper ? w0 : w2, 2), s1 = from_lane_xor(upper ? w1 : w3, 2);
    return upper ? uint4{s0, s1, w2, w3} : uint4{w0, w1, s0, s1};
}

// E4M3's bits in fp32's lowest exponents, times 2^120: subnormals too.
__device__ inline float scale_value(uint32_t byte, ScaleKind kind) {
    if (kind == ScaleKind::e4m3) return mul(float_of((byte & 0x7fu) << 20 | (byte & 0x80u) << 24), power_of_two(120));
    return float_of(byte == 0 ? 0x00400000u : byte << 23);
}

struct GroupedInt8 {
    struct Table {
        Int8::Table codes;
        int group_shift;  // a group is 16 << group_shift inputs
    };
    using Sum = float;
    static constexpr int bytes = 1, vectors = 1, x_bytes = unit_k;
    static constexpr bool shifted = false, packed = false;
    // The bits of 1.5 · 2^23: a sum below 2^22 that starts here is, read as fp32, this number plus the sum.
    static constexpr int32_t start = 0x4b400000;
    Int8 weights;
    int group_shift;
    float low[4], high[4];  // scales of outputs g and g + 8 for the inputs 16·j .. 16·j + 15 of the unit

    __device__ GroupedInt8(const uint4& codes, const Table& t)
        : weights(transposed(codes), t.codes), group_shift(t.group_shift) {}

    // The scales of the group that holds inputs 16·t of the unit.
    __device__ void scale(ScalePair pair, ScaleKind kind) {
        const float mine[2] = {scale_value(pair & 0xffu, kind), scale_value(pair >> 8, kind)};
#pragma unroll
        for (int j = 0; j < 4; ++j) low[j] = from_quad_lane(mine[0], j), high[j] = from_quad_lane(mine[1], j);
    }
    __device__ void add_group(Sum (&d)[4], int32_t (&sum)[4], int j) const {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float whole = sub(float_of(uint32_t(sum[e])), float_of(uint32_t(start)));
            d[e] = fused(whole, e / 2 ? high[j] : low[j], d[e]);
            sum[e] = start;
        }
    }
    __device__ void multiply(Sum (&d)[4], const uint4 (&x)[vectors]) const {
        int32_t sum[4] = {start, start, start, start};
        if (group_shift == 0) {
            const uint32_t words[4] = {x[0].x, x[0].y, x[0].z, x[0].w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                multiply_add(sum, weights.a[j / 2][j % 2 * 2], weights.a[j / 2][j % 2 * 2 + 1], words[j]);
                add_group(d, sum, j);
            }
        } else {
            multiply_add(sum, weights.a[0], x[0].x, x[0].y);
            if (group_shift == 1) add_group(d, sum, 0);
            multiply_add(sum, weights.a[1], x[0].z, x[0].w);
            add_group(d, sum, 2);
        }
    }
};

}  // namespace llmfp4::cuda
