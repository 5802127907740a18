// Packed codes to E4M3, which holds every value of the three elements: the A operands of sm_90's products of 8-bit
// floats.
#pragma once
#include "decode.h"

namespace llmfp4::cuda {

// Operands are element · 2^exponent. E8M0 scales of groups, which are 1 at most (a row's largest), lower the exponent:
// so it begins as the largest that OCP's E4M3, up to 448, holds.
inline int fp8_exponent(Element e, ScaleKind kind) {
    int exponent = 0;
    while (kind != ScaleKind::none && (e.max_integer() << (exponent + 1)) <= 448 * e.integer_scale()) ++exponent;
    return exponent;
}

struct Fp8 {
    struct Table {
        uint32_t magnitudes[2];

        explicit Table(Element e, ScaleKind kind = ScaleKind::none) : magnitudes{} {
            for (int code = 1; code < 8; ++code) {  // all normal numbers
                const uint32_t byte = (llmfp4::bits_of(e.value(code)) >> 20) - (120u << 3);
                magnitudes[code / 4] |= (byte + 8u * uint32_t(fp8_exponent(e, kind))) << (8 * (code % 4));
            }
        }
    };
    using Sum = float;
    static constexpr int bytes = 1, x_bytes = unit_k;
    uint32_t a[2][4];

    // One word → four bytes of outputs g (low) and four of outputs g + 8 (high), by a table each: 7 instructions for 8
    // codes.
    __device__ static void decode(uint32_t word, const uint32_t (&t)[2], const uint32_t (&t8)[2], uint32_t& low,
                                  uint32_t& high) {
        const uint32_t magnitudes = word & 0x77777777u;
        low = permute(t[0], t[1], magnitudes) | (word & 0x80808080u);
        high = permute(t8[0], t8[1], magnitudes >> 16) | (word << 4 & 0x80808080u);
    }
    __device__ void decode(const uint4& codes, const uint32_t (&t)[2], const uint32_t (&t8)[2]) {
        decode(codes.x, t, t8, a[0][0], a[0][1]);
        decode(codes.y, t, t8, a[0][2], a[0][3]);
        decode(codes.z, t, t8, a[1][0], a[1][1]);
        decode(codes.w, t, t8, a[1][2], a[1][3]);
    }
    Fp8() = default;
    __device__ Fp8(const uint4& codes, const Table& t) { decode(codes, t.magnitudes, t.magnitudes); }
};

// Sums stay in the tensor core from the first input to the last.
struct FastFp8 : Fp8 {
    using Fp8::Fp8;
};

// A group's power of two is taken off the exponents of the table, entry 0 excepted, before it is looked up. Exact as
// long as the smallest element stays a normal number, which backends/cuda_sm90.py asks for.
struct GroupedFp8 : Fp8 {
    uint4 codes;
    Table table;

    __device__ GroupedFp8(const uint4& codes, const Table& t) : codes(codes), table(t) {}
    __device__ void scale(ScalePair pair, ScaleKind) {
        const uint32_t low = 127u - (pair & 0xffu), high = 127u - (pair >> 8);
        const uint32_t t[2] = {table.magnitudes[0] - low * 0x08080800u, table.magnitudes[1] - low * 0x08080808u};
        const uint32_t t8[2] = {table.magnitudes[0] - high * 0x08080800u, table.magnitudes[1] - high * 0x08080808u};
        decode(codes, t, t8);
    }
};

}  // namespace llmfp4::cuda
