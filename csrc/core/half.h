// bf16 and fp16 to fp32 and back, round to nearest even. Branch-free, so that loops over them vectorise.
#pragma once
#include <cstdint>

#include "scale.h"

namespace llmfp4 {

LLMFP4_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

LLMFP4_INLINE float bf16_to_float(uint16_t h) { return float_from_bits(uint32_t(h) << 16); }

LLMFP4_INLINE uint16_t float_to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

LLMFP4_INLINE float fp16_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    const uint32_t normal = (magnitude << 13) + (112u << 23);
    const uint32_t special = (magnitude << 13) | 0x7f800000u;  // Inf and NaN
    const uint32_t subnormal = bits_of(float_from_bits((113u << 23) | magnitude << 13) - float_from_bits(113u << 23));
    const uint32_t bits = magnitude >= 0x7c00u ? special : magnitude < 0x400u ? subnormal : normal;
    return float_from_bits(sign | bits);
}

LLMFP4_INLINE uint16_t float_to_fp16(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    // Below 2^-14 one unit is 2^-24; adding 1/2 puts that unit at the last bit of an fp32.
    const uint32_t subnormal = bits_of(float_from_bits(magnitude) + 0.5f) - (126u << 23);
    uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds to 2^16 or beyond
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return uint16_t(sign | half);
}

}  // namespace llmfp4
