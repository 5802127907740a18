// Packed codes to E4M3, which holds every value of the three elements: the A operands of sm_90's products of 8-bit
// floats.
#pragma once
#include "decode.h"

namespace llmfp4::cuda {

struct Fp8 {
    struct Table {
        uint32_t magnitudes[2];

        explicit Table(Element e) : magnitudes{} {
            for (int code = 1; code < 8; ++code)  // all normal numbers
                magnitudes[code / 4] |= ((llmfp4::bits_of(e.value(code)) >> 20) - (120u << 3)) << (8 * (code % 4));
        }
    };
    using Sum = float;
    static constexpr int bytes = 1, x_bytes = unit_k;
    uint32_t a[2][4];

    // One word → four bytes of outputs g (low) and four of outputs g + 8 (high): 7 instructions for 8 codes.
    __device__ static void decode(uint32_t word, const Table& t, uint32_t& low, uint32_t& high) {
        const uint32_t magnitudes = word & 0x77777777u;
        low = permute(t.magnitudes[0], t.magnitudes[1], magnitudes) | (word & 0x80808080u);
        high = permute(t.magnitudes[0], t.magnitudes[1], magnitudes >> 16) | (word << 4 & 0x80808080u);
    }
    __device__ Fp8(const uint4& codes, const Table& t) {
        decode(codes.x, t, a[0][0], a[0][1]);
        decode(codes.y, t, a[0][2], a[0][3]);
        decode(codes.z, t, a[1][0], a[1][1]);
        decode(codes.w, t, a[1][2], a[1][3]);
    }
};

}  // namespace llmfp4::cuda
