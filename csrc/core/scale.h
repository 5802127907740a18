// Group scales, one byte each. The same formulas as llmfp4_kernels/formats.py, compared for all bytes in a test.
#pragma once
#include <cstdint>

#include "element.h"

namespace llmfp4 {

enum class ScaleKind : int { none, e8m0, e4m3 };

LLMFP4_INLINE float float_from_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

// 2^(byte - 127); 255 is NaN. Byte 0 is 2^-127, an fp32 subnormal.
LLMFP4_INLINE float decode_e8m0(uint8_t byte) {
    if (byte == 255) return float_from_bits(0x7fc00000u);
    return float_from_bits(byte == 0 ? 0x00400000u : uint32_t(byte) << 23);
}

// OCP FP8 E4M3: no Inf, NaN is S.1111.111.
LLMFP4_INLINE float decode_e4m3(uint8_t byte) {
    if ((byte & 0x7f) == 0x7f) return float_from_bits(0x7fc00000u);
    // (8·[p > 0] + f) · 2^(max(p, 1) - 10): an integer times a power of two, since fp32 subnormals take a slow path.
    const uint32_t p = byte >> 3 & 15, f = byte & 7;
    const float magnitude = float(int(p > 0 ? 8 + f : f)) * float_from_bits(((p > 1 ? p : 1) + 127 - 10) << 23);
    return byte & 0x80 ? -magnitude : magnitude;
}

LLMFP4_INLINE float decode_scale(ScaleKind kind, uint8_t byte) {
    switch (kind) {
        case ScaleKind::e8m0:
            return decode_e8m0(byte);
        case ScaleKind::e4m3:
            return decode_e4m3(byte);
        default:
            return 1.0f;
    }
}

}  // namespace llmfp4
