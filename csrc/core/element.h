// The elements by formula; the same one as llmfp4_kernels/formats.py, compared for all codes in a test.
#pragma once
#include <cstdint>

// Code shared by objects that are compiled for different instruction sets must never be emitted as a function of its
// own: the linker would keep one copy for all, perhaps the AVX-512 one. The build checks the objects for that.
#define LLMFP4_INLINE __attribute__((always_inline)) inline
#define LLMFP4_CONSTEXPR __attribute__((always_inline)) constexpr

namespace llmfp4 {

// Sign, E exponent bits, M mantissa bits, no Inf (LLM-FP4 eq. 9; OCP MX spec 1.0 for E2M1); the largest `nan_codes`
// magnitudes are NaN and none of those below.
struct Element {
    int exponent_bits, mantissa_bits, bias, nan_codes = 0;

    LLMFP4_CONSTEXPR int sign_code() const { return 1 << (exponent_bits + mantissa_bits); }
    LLMFP4_CONSTEXPR int max_shift() const { return (1 << exponent_bits) - 1; }
    LLMFP4_CONSTEXPR int integer_scale() const { return 1 << (bias + mantissa_bits - 1); }

    // element(code) · integer_scale: 2·E2M1 ≤ 12, 2·E1M2 ≤ 7, 4·E3M0 ≤ 64.
    LLMFP4_CONSTEXPR int integer(int code) const {
        const int p = (code & (sign_code() - 1)) >> mantissa_bits;
        const int f = code & ((1 << mantissa_bits) - 1);
        const int magnitude = p == 0 ? f : ((1 << mantissa_bits) + f) << (p - 1);
        return code & sign_code() ? -magnitude : magnitude;
    }
    LLMFP4_CONSTEXPR int max_integer() const { return integer(sign_code() - nan_codes - 1); }
    LLMFP4_CONSTEXPR float value(int code) const {
        const int magnitude = code & (sign_code() - 1);
        if (magnitude >= sign_code() - nan_codes) return __builtin_nanf("");
        const float v = float(integer(magnitude)) / float(integer_scale());
        return code & sign_code() ? -v : v;
    }
};

constexpr Element E2M1{2, 1, 1}, E1M2{1, 2, 0}, E3M0{3, 0, 3};
static_assert(E2M1.max_integer() == 12 && E1M2.max_integer() == 7 && E3M0.max_integer() == 64,
              "int8 operands hold every element");

}  // namespace llmfp4
