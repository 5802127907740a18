// Rounding to an element, sixteen numbers at a time.
#pragma once
#include "../core/half.h"
#include "simd.h"

namespace llmfp4::cpu::LLMFP4_ISA {

// Rounds numbers in an element's units, or in those of its integers, to the element: saturating, ties to the even step.
struct Rounder {
    float top;

    explicit Rounder(Element e, bool integers = false)
        : top(float(e.max_integer()) / float(integers ? 1 : e.integer_scale())),
          least(f32_all(float_from_bits(uint32_t(integers ? 127 + e.mantissa_bits : 127 + 1 - e.bias) << 23))),
          tops(f32_all(top)),
          up(f32_all(steps(e))),
          down(f32_all(-steps(e))) {}

    LLMFP4_INLINE F32 clipped(F32 v) const { return clip(v, tops); }
    // Of what exceeds the element's largest by less than half a step. All four take each step together, so that none
    // waits for the end of the last.
    LLMFP4_INLINE void whole_steps(F32 (&v)[4]) const {
        F32 power[4];
        each<4>([&](int i) { power[i] = binade(v[i], least); });
        each<4>([&](int i) { v[i] = fma(v[i], power[i], up); });
        each<4>([&](int i) { v[i] = fma(v[i], power[i], down); });
    }

private:
    F32 least, tops, up, down;

    // 1.5·2^23 steps of a binade, in powers of two of the binade: adding them rounds to a whole step, ties to even, on
    // both sides of zero.
    static float steps(Element e) {
        return float_from_bits((uint32_t(127 + 23 - e.mantissa_bits) << 23) + 0x00400000u);
    }
};

}  // namespace llmfp4::cpu::LLMFP4_ISA
