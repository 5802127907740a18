// Weights that take the shift of their input as they are decoded, for activations that come without it.
//
//     int8    element · 2^(max_shift - shift), int8 still; activations as int8 or as packed codes
//     bf16    element · 2^-shift, exact; activations as they are
//
// The same products are added, so sums keep their bits.
#pragma once
#include "decode.h"

namespace llmfp4::cuda {

// Four bytes, each -v where its mask is 1; 0 ≤ v ≤ 127, so that no byte borrows.
__device__ inline uint32_t negated_where(uint32_t mask, uint32_t v) {
    return select(mask, (0x80808080u - v) ^ 0x80808080u, v);
}

struct ShiftedInt8 : Int8 {
    // The eight magnitudes, and max_shift in four bytes: 0 without a shift.
    struct Table {
        uint32_t positive[2], top;

        Table(Element e, int max_shift) : positive{}, top(0x01010101u * uint32_t(max_shift)) {
            for (int code = 0; code < 8; ++code) positive[code / 4] |= uint32_t(e.integer(code)) << (8 * (code % 4));
        }
    };
    static constexpr bool shifted = true;

    // Magnitudes times 2^e, e in 0..3 in each byte: up to 12 · 8 = 96, so that no byte carries. Bits of e come as
    // masks.
    __device__ static uint32_t times_power(uint32_t magnitudes, uint32_t bit0, uint32_t bit1) {
        magnitudes += magnitudes & bit0;
        return magnitudes + 3 * (magnitudes & bit1);
    }
    // As Int8's, for the shifts of the word's four inputs: 23 instructions for 8 codes.
    __device__ static void decode(uint32_t word, const Table& t, uint32_t shifts, uint32_t& low, uint32_t& high) {
        const uint32_t magnitudes = word & 0x77777777u, e = t.top - shifts;
        const uint32_t bit0 = sign_masks(e << 7), bit1 = sign_masks(e << 6);
        low =
            negated_where(sign_masks(word), times_power(permute(t.positive[0], t.positive[1], magnitudes), bit0, bit1));
        high = negated_where(sign_masks(word << 4),
                             times_power(permute(t.positive[0], t.positive[1], magnitudes >> 16), bit0, bit1));
    }
    __device__ ShiftedInt8(const uint4& codes, const Table& t, const uint4& shifts) {
        decode(codes.x, t, shifts.x, a[0][0], a[0][1]);
        decode(codes.y, t, shifts.y, a[0][2], a[0][3]);
        decode(codes.z, t, shifts.z, a[1][0], a[1][1]);
        decode(codes.w, t, shifts.w, a[1][2], a[1][3]);
    }
};

struct ShiftedBf16 : Halves<Bf16> {
    static constexpr bool shifted = true;

    // 2^-s of two of the word's four inputs, which the permute's selector puts into one half each.
    __device__ static uint32_t powers(uint32_t shifts, uint32_t selector) {
        return 0x3f803f80u - (permute(shifts, 0, selector) << 7);
    }
    __device__ ShiftedBf16(const uint4& codes, const Table& t, const uint4& shifts) : Halves(codes, t) {
        const uint32_t words[4] = {shifts.x, shifts.y, shifts.z, shifts.w};
#pragma unroll
        for (int q = 0; q < 4; ++q)
#pragma unroll
            for (int i = 0; i < 4; ++i) a[q][i] = Bf16::scale(a[q][i], powers(words[q], i < 2 ? 0x4140 : 0x4342));
    }
};

// Activations come as codes, 32 bytes for 64: lane t's 16 in two words. A word has the bit order of units.h, inputs
// 8·h .. 8·h + 3 in the place of output g and the next four in that of g + 8. Every warp decodes them for itself.
struct PackedInt8 : ShiftedInt8 {
    struct Table {
        ShiftedInt8::Table weights;
        Int8::Table inputs;
    };
    static constexpr int x_bytes = unit_k / 2;
    static constexpr bool packed = true;

    __device__ PackedInt8(const uint4& codes, const Table& t, const uint4& shifts)
        : ShiftedInt8(codes, t.weights, shifts) {}
    __device__ static uint4 inputs(const uint2& words, const Table& t) {
        uint4 x;
        Int8::decode(words.x, t.inputs, x.x, x.y);
        Int8::decode(words.y, t.inputs, x.z, x.w);
        return x;
    }
};

}  // namespace llmfp4::cuda
