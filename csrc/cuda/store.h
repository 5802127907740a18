// What quantization writes: integers, integers in decode_grouped.h's order, codes in decode_shift.h's, or integers and
// E4M3 in blocks.h's.
#pragma once
#include "blocks.h"
#include "device.h"

namespace llmfp4::cuda {

constexpr int chunk_k = 16, quantize_threads_limit = 512, plane_limit = 64, plane_unit = 128;

// The part of an E4M3 activation that is an operand: all of OCP's. Of LLM-FP4's half, for its largest value, 480, is a
// NaN in the tensor core's E4M3, 240 is not; of multiples of 2^-9 below 2^-5, odd ones become the even neighbour.
inline float fp8_part(Element e) { return e.nan_codes ? 1.0f : 0.5f; }

enum class Form : int { integers, transposed, codes, blocked };

struct Quantize {
    const void* x;  // [m, k] contiguous
    Dtype dtype;
    int m, k, padded_k, planes;
    char* out;  // int8 [planes · m, padded_k]; row planes·m + p is plane p of token m; codes: half of it
    Form form;
    int blocked_rows;              // of blocked operands
    bool fp8;                      // operands are bytes of E4M3, not integers
    float* x_scale;                // [m]
    const uint8_t* shift;          // [padded_k] or null
    const float* x_factor;         // [padded_k] or null
    float static_scale;            // 0: dynamic
    float unit;                    // worth of one unit of an integer sum, before x_scale
    int shift_top;                 // max_shift if the integers carry 2^(max_shift - shift), else 0
    int group_size;                // of a dynamic activation: 0, or 16 · 2^i up to 512
    float top, most_factor;        // largest element; largest factor of a group
    float integer_scale;           // 1 for codes
    uint32_t to_anchor, smallest;  // of the rounding, see `rounded`

    void set_element(Element e) {
        top = float(e.max_integer()) / float(e.integer_scale());
        most_factor = float(127 / e.max_integer());
        integer_scale = form == Form::codes ? 1.0f : float(e.integer_scale());
        to_anchor = uint32_t(23 - e.mantissa_bits) << 23;
        smallest = uint32_t(127 + 1 - e.bias) << 23;
    }
};

__device__ inline uint32_t pack_bytes(int a, int b, int c, int d) {
    return permute(permute(uint32_t(a), uint32_t(b), 0x0040), permute(uint32_t(c), uint32_t(d), 0x0040), 0x5410);
}

__device__ inline void store_plane(const Quantize& q, int row, int k0, const int (&v)[chunk_k]) {
    const uint4 bytes{pack_bytes(v[0], v[1], v[2], v[3]), pack_bytes(v[4], v[5], v[6], v[7]),
                      pack_bytes(v[8], v[9], v[10], v[11]), pack_bytes(v[12], v[13], v[14], v[15])};
    if (q.form == Form::blocked) {
        uint32_t* word = reinterpret_cast<uint32_t*>(q.out + block_at(q.blocked_rows, 1, row, k0));
        word[0] = bytes.x, word[block_words] = bytes.y, word[2 * block_words] = bytes.z,
        word[3 * block_words] = bytes.w;
        return;
    }
    char* to = q.out + size_t(row) * q.padded_k;
    if (q.form == Form::integers) {
        *reinterpret_cast<uint4*>(to + k0) = bytes;
        return;
    }
    uint32_t* words = reinterpret_cast<uint32_t*>(to + k0 / unit_k * unit_k) + k0 % unit_k / chunk_k;
    words[0] = bytes.x, words[4] = bytes.y, words[8] = bytes.z, words[12] = bytes.w;
}

// The code without its sign of an element: linear up to the second binade.
__device__ inline uint32_t magnitude_code(float element, const Quantize& q) {
    const uint32_t bits = bits_of(element) & 0x7fffffffu, mantissa_shift = q.to_anchor >> 23;
    const uint32_t one = 1u << (23 - mantissa_shift);  // code of the smallest normal number
    if (bits >= q.smallest) return ((bits - q.smallest) >> mantissa_shift) + one;
    return uint32_t(truncate(mul(divide(float_of(bits), float_of(q.smallest)), float(int(one)))));
}

__device__ inline void store_codes(const Quantize& q, int row, int k0, const float (&v)[chunk_k]) {
    uint32_t words[2] = {};
#pragma unroll
    for (int i = 0; i < chunk_k; ++i) {
        const int input = i % 4, half = i / 4 % 2;
        words[i / 8] |= magnitude_code(v[i], q) << (16 * half + 4 * input) | (bits_of(v[i]) >> 31)
                                                                                 << (8 * input + (half ? 3 : 7));
    }
    *reinterpret_cast<uint2*>(q.out + (size_t(row) * q.padded_k + k0) / 2) = uint2{words[0], words[1]};
}

// A multiple of 2^-10 that E4M3 holds, or lies between two of its subnormals: the byte, ties to even.
__device__ inline int e4m3_byte(float v) {
    const uint32_t magnitude = bits_of(v) & 0x7fffffffu, smallest_normal = 121u << 23;
    const uint32_t byte = magnitude >= smallest_normal ? (magnitude >> 20) - (120u << 3)
                                                       : uint32_t(truncate(nearest_even(mul(fabsf(v), 512.0f))));
    return int(byte | bits_of(v) >> 31 << 7);
}

// An integer beyond int8 is split into planes, low + 128 · high. Only E3M0 with a shift needs two: its values are
// single powers of two up to 64·2^7, so one plane of each is zero and both fit.
__device__ inline void store_integers(const Quantize& q, int token, int k0, const float (&v)[chunk_k]) {
    if (q.form == Form::codes) return store_codes(q, token, k0, v);
    int low[chunk_k], high[chunk_k];
#pragma unroll
    for (int i = 0; i < chunk_k; ++i) {
        const int integer = q.fp8 ? e4m3_byte(v[i]) : truncate(v[i]);
        const bool large = q.planes == 2 && (integer > plane_limit || integer < -plane_limit);
        low[i] = large ? 0 : integer, high[i] = large ? integer / plane_unit : 0;
    }
    store_plane(q, token * q.planes, k0, low);
    if (q.planes == 2) store_plane(q, token * q.planes + 1, k0, high);
}

}  // namespace llmfp4::cuda
