// Where code (n, k) lives under the CUDA kernels: units of 16 outputs by 64 inputs, 512 bytes, 16 bytes a lane of a
// warp.
//
// A lane's 16 bytes are its part of the A operands of mma.sync: of four m16n8k16 (16-bit) or two m16n8k32 (8-bit).
// Which k a lane holds is free as long as the activations agree: lane 4·g + t holds outputs g and g + 8, inputs
// 16·t .. 16·t + 15, so that its activations are contiguous, too (16 int8 are one load, 16 of 16 bits two).
//
//     inputs    0..15   16..31   32..47   48..63         16 bytes of a lane: word q holds inputs 4·q .. 4·q + 3
//     output 0  lane 0  lane 1   lane 2   lane 3
//     output 1  lane 4  lane 5   lane 6   lane 7         bits of a word, nibble 7 first, i = k % 4:
//      ...                                               s i3 of g+0 | s i3 of g+8 | s i2 of g+0 | ...   bit 3 of each
//     output 7  lane 28 lane 29  lane 30  lane 31        g+8: i3 i2 i1 i0 | g+0: i3 i2 i1 i0             bits 0..2 of
//     each output 8  lane 0  ...
//
// The low three bits of nibble 4·h + i (h = 1 for outputs g + 8) are the magnitude of input i: four nibbles of 3 bits
// are the selector of one byte permute, a table lookup for any element. The signs are parked where they become signs of
// bytes: sign i of outputs g at bit 8·i + 7, of outputs g + 8 at bit 8·i + 3.
// Units of the same 16 outputs follow each other along k. Rows are padded to 16, inputs to 64, both with code 0.
#pragma once
#include "layout.h"

namespace llmfp4 {

constexpr int unit_n = 16, unit_k = 64, unit_bytes = 512;

struct CodePlace {
    size_t word;    // of 32 bits
    int magnitude;  // position of the lowest of three bits
    int sign;       // position of the sign
};

struct UnitLayout {
    int n, k;

    LLMFP4_CONSTEXPR size_t strips() const { return round_up(n, unit_n) / unit_n; }
    LLMFP4_CONSTEXPR size_t units_k() const { return round_up(k, unit_k) / unit_k; }
    LLMFP4_CONSTEXPR size_t padded_k() const { return round_up(k, unit_k); }
    LLMFP4_CONSTEXPR size_t bytes() const { return strips() * units_k() * unit_bytes; }

    LLMFP4_CONSTEXPR CodePlace place(size_t in, size_t ik) const {
        const size_t unit = in / unit_n * units_k() + ik / unit_k;
        const size_t lane = in % 8 * 4 + ik % unit_k / 16, q = ik % 16 / 4;
        const int half = int(in % unit_n / 8), i = int(ik % 4);
        return {unit * (unit_bytes / 4) + lane * 4 + q, 16 * half + 4 * i, 8 * i + (half ? 3 : 7)};
    }
};

}  // namespace llmfp4
