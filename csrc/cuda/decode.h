// Packed codes to the A operands of mma.sync by table lookup: one permute looks up four codes. csrc/core/units.h has
// the bit order. Tables come as kernel arguments, so one compiled kernel serves E2M1, E1M2 and E3M0.
//
// An operand type says what a kernel multiplies: its table, its sums, the A operands of one unit (of a lane), the
// activations that meet them (`vectors` times 16 bytes a lane, x_bytes of a row in memory), and how; whether weights
// take the shift (decode_shift.h).
#pragma once
#include "../core/half.h"
#include "../core/scale.h"
#include "../core/units.h"
#include "device.h"

namespace llmfp4::cuda {

// Scales of one group for outputs g and g + 8 of a lane, as bytes.
using ScalePair = uint16_t;

struct Int8 {
    // element · integer_scale of the eight magnitudes, and its negative.
    struct Table {
        uint32_t positive[2], negative[2];

        explicit Table(Element e) : positive{}, negative{} {
            for (int code = 0; code < 8; ++code) {
                const uint32_t v = uint32_t(e.integer(code));
                positive[code / 4] |= v << (8 * (code % 4));
                negative[code / 4] |= ((0u - v) & 0xffu) << (8 * (code % 4));
            }
        }
    };
    using Sum = int32_t;
    static constexpr int bytes = 1, vectors = 1, x_bytes = unit_k;
    static constexpr bool shifted = false, packed = false;
    uint32_t a[2][4];  // of two m16n8k32

    // One word → four int8 of outputs g (low) and four of outputs g + 8 (high): 11 instructions for 8 codes.
    __device__ static void decode(uint32_t word, const Table& t, uint32_t& low, uint32_t& high) {
        const uint32_t magnitudes = word & 0x77777777u, upper = magnitudes >> 16;
        low = select(sign_masks(word), permute(t.negative[0], t.negative[1], magnitudes),
                     permute(t.positive[0], t.positive[1], magnitudes));
        high = select(sign_masks(word << 4), permute(t.negative[0], t.negative[1], upper),
                      permute(t.positive[0], t.positive[1], upper));
    }
    Int8() = default;
    __device__ Int8(const uint4& codes, const Table& t) {
        decode(codes.x, t, a[0][0], a[0][1]);
        decode(codes.y, t, a[0][2], a[0][3]);
        decode(codes.z, t, a[1][0], a[1][1]);
        decode(codes.w, t, a[1][2], a[1][3]);
    }
    __device__ void multiply(Sum (&d)[4], const uint4 (&x)[vectors]) const {
        multiply_add(d, a[0], x[0].x, x[0].y);
        multiply_add(d, a[1], x[0].z, x[0].w);
    }
};

// fp16 or bf16. The high bytes of the eight magnitudes, and the low ones, which are 0 in fp16.
struct HalfTable {
    uint32_t high[2], low[2];

    HalfTable(Element e, bool bf16) : high{}, low{} {
        for (int code = 0; code < 8; ++code) {
            const uint32_t v = bf16 ? float_to_bf16(e.value(code)) : float_to_fp16(e.value(code));
            high[code / 4] |= (v >> 8) << (8 * (code % 4));
            low[code / 4] |= (v & 0xffu) << (8 * (code % 4));
        }
    }
};

// Two values of each of the outputs g and g + 8, from one word: a0, a1, a2, a3 of m16n8k16. fp16: 11 instructions for
// 8 codes, bf16: 13.
__device__ inline void decode_word(F16, uint32_t word, const HalfTable& t, uint32_t (&a)[4]) {
    const uint32_t magnitudes = word & 0x77777777u;
    const uint32_t low = permute(t.high[0], t.high[1], magnitudes) | (word & 0x80808080u);
    const uint32_t high = permute(t.high[0], t.high[1], magnitudes >> 16) | (word << 4 & 0x80808080u);
    a[0] = permute(low, 0, 0x1404), a[2] = permute(low, 0, 0x3424);
    a[1] = permute(high, 0, 0x1404), a[3] = permute(high, 0, 0x3424);
}
__device__ inline void decode_word(Bf16, uint32_t word, const HalfTable& t, uint32_t (&a)[4]) {
    const uint32_t magnitudes = word & 0x77777777u, upper = magnitudes >> 16;
    const uint32_t low = permute(t.high[0], t.high[1], magnitudes) | (word & 0x80808080u);
    const uint32_t high = permute(t.high[0], t.high[1], upper) | (word << 4 & 0x80808080u);
    const uint32_t low_rest = permute(t.low[0], t.low[1], magnitudes), high_rest = permute(t.low[0], t.low[1], upper);
    a[0] = permute(low_rest, low, 0x5140), a[2] = permute(low_rest, low, 0x7362);
    a[1] = permute(high_rest, high, 0x5140), a[3] = permute(high_rest, high, 0x7362);
}

// The value of a scale byte, twice. E4M3's exponent and mantissa, put into the wider format's lowest exponent and
// highest mantissa bits, are the value times a power of two, subnormals included. E8M0 comes relative to its row's
// largest (bytes up to 127), so that fp16 holds it: down to 2^-24 exactly.
__device__ inline uint32_t scale_twice(F16 half, uint32_t byte, ScaleKind kind) {
    if (kind == ScaleKind::e4m3) return half.scale(((byte & 0x7fu) << 7 | (byte & 0x80u) << 8) * 0x10001u, 0x5c005c00u);
    const int exponent = int(byte) - 127;
    const uint32_t subnormal = exponent >= -24 ? 1u << min(exponent + 24, 9) : 0u;
    return (exponent >= -14 ? uint32_t(exponent + 15) << 10 : subnormal) * 0x10001u;
}
__device__ inline uint32_t scale_twice(Bf16 half, uint32_t byte, ScaleKind kind) {
    if (kind == ScaleKind::e4m3) return half.scale(((byte & 0x7fu) << 4 | (byte & 0x80u) << 8) * 0x10001u, 0x7b807b80u);
    return (byte == 0 ? 0x40u : byte << 7) * 0x10001u;
}

template <class H>
struct Halves {
    using Table = HalfTable;
    using Sum = float;
    static constexpr int bytes = 2, vectors = 2, x_bytes = 2 * unit_k;
    static constexpr bool shifted = false, packed = false;
    uint32_t a[4][4];  // of four m16n8k16

    __device__ Halves(const uint4& codes, const Table& t) {
        decode_word(H{}, codes.x, t, a[0]);
        decode_word(H{}, codes.y, t, a[1]);
        decode_word(H{}, codes.z, t, a[2]);
        decode_word(H{}, codes.w, t, a[3]);
    }
    // element · scale has at most 7 significant bits: exact.
    __device__ void scale(ScalePair pair, ScaleKind kind) {
        const uint32_t low = scale_twice(H{}, pair & 0xffu, kind), high = scale_twice(H{}, pair >> 8, kind);
#pragma unroll
        for (int q = 0; q < 4; ++q)
#pragma unroll
            for (int i = 0; i < 4; ++i) a[q][i] = H::scale(a[q][i], i % 2 ? high : low);
    }
    __device__ void multiply(Sum (&d)[4], const uint4 (&x)[vectors]) const {
        multiply_add(H{}, d, a[0], x[0].x, x[0].y);
        multiply_add(H{}, d, a[1], x[0].z, x[0].w);
        multiply_add(H{}, d, a[2], x[1].x, x[1].y);
        multiply_add(H{}, d, a[3], x[1].z, x[1].w);
    }
};

// What a product reads. Rows of x have 16-byte multiples between them and are read in 16-byte pieces that begin below
// k_bytes; group scales lie as [strip][group][8][2]: outputs g and g + 8 side by side.
template <class Operand>
struct Product {
    const uint4* codes;  // units, csrc/core/units.h
    const char* x;       // [rows] of x_stride bytes
    size_t x_stride;
    int rows, k_bytes, units_k, strips;
    typename Operand::Table table;
    const ScalePair* scales;
    ScaleKind scale_kind;
    int groups, group_shift;  // per row; a group is 16 << group_shift inputs
    const uint8_t* shift;     // [units_k · 64] that weights are multiplied for, or null
};

template <class Operand>
__device__ inline Operand decoded(const Product<Operand>& p, const uint4& codes, const uint4& shifts) {
    if constexpr (Operand::shifted)
        return Operand(codes, p.table, shifts);
    else
        return Operand(codes, p.table);
}

// The scales of lane 4·g + t in a unit.
template <class Operand>
__device__ inline const ScalePair* scales_at(const Product<Operand>& p, int strip, int unit, int g, int t) {
    return p.scales + (size_t(strip) * p.groups + ((4 * unit + t) >> p.group_shift)) * 8 + g;
}

}  // namespace llmfp4::cuda
