// Activation operands as wgmma reads them from shared memory, made by the kernels that make operands: one bulk copy
// brings any number of rows for one unit of k.
//
// Blocks of 8 rows by 16 bytes; those of one unit (64 inputs) side by side, then the next 8 rows, then the next unit:
//
//     [unit of k][rows / 8][block][8 rows][16 bytes]          blocks of a unit: 4 of int8 (and fp8), 8 of 16 bits
//
// A lane of the weight's units holds 16 inputs of its two outputs (csrc/core/units.h), word after word the operands of
// one product after the other. So word c (4 bytes) of the 16 inputs 16·t .. 16·t + 15 lies in block c, at bytes 4·t:
// where a product looks for what lane t multiplies.
#pragma once
#include "../core/units.h"
#include "device.h"

namespace llmfp4::cuda {

constexpr int block_rows = 8, block_bytes = 128, block_words = block_bytes / 4;

// Byte of the first word of inputs k0 .. k0 + 15 of a row; word c is c blocks further. `rows` is that of the
// whole operand, a multiple of 8, `bytes` that of a number.
__device__ inline size_t block_at(int rows, int bytes, int row, int k0) {
    const size_t unit = size_t(k0 / unit_k), blocks = 4 * bytes;
    return ((unit * (rows / block_rows) + row / block_rows) * blocks) * block_bytes + row % block_rows * 16 +
           k0 % unit_k / 16 * 4;
}

}  // namespace llmfp4::cuda
