// Activations in groups that carry an integer factor each: the least that holds the group's largest value, or the one
// below if it errs less.
#pragma once
#include "problem.h"
#include "rounder.h"

namespace llmfp4::cpu::LLMFP4_ISA {

constexpr int int8_max = 127, lanes = 16;

// By the least factor that holds a group; no division where values wait for it.
struct Factors {
    float holds, below, inverse_holds, inverse_below;
};
struct FactorTable {
    Factors of[int8_max + 1];

    constexpr FactorTable() : of() {
        for (int h = 1; h <= int8_max; ++h) {
            const float holds = float(h), below = float(h > 1 ? h - 1 : 1);
            of[h] = {holds, below, 1.0f / holds, 1.0f / below};
        }
    }
};
constexpr FactorTable factor_table;

// Groups that are quantized together, step by step, and their values.
constexpr int most_groups = 64, most_values = lanes * dynamic_group_limit;
struct Groups {
    alignas(64) float holds[2 * most_values];  // what values become with one factor and, behind, with the one below
    alignas(64) float excess[most_groups * lanes];
    alignas(64) int32_t factor[most_groups], gain[most_groups];
};

// Whole numbers → int8, stored and added up.
LLMFP4_INLINE I32 store_integers(const F32 (&integers)[4], int8_t* out, I32 sum) {
    const Bytes bytes = to_bytes(integers);
    store_bytes(reinterpret_cast<uint8_t*>(out), bytes);
    return sum4(sum, bytes);
}

// Both of what the lanes of 4 groups in integer units become, and how much more the larger factor errs: (e - h)² -
// (e - b)² = (b - h) · (2e - h - b), e being the value to 1/64. That is a multiple of 1/32 below 2^12: sums of 16 are
// exact as floats, those of 256 as integers, so no order of summation changes which one wins.
LLMFP4_INLINE void quantize_lanes(const float* v, int size, F32 scale, const Rounder& round, const int32_t* factor,
                                  float* holds, float* below, float* excess) {
    const F32 two = f32_all(2.0f), to_32nd = f32_all(1.5f * 0x1p18f);
    F32 e[4], h[4], b[4];
    each<4>([&](int g) { e[g] = mul(load(v + g * size), scale); });
    each<4>([&](int g) {
        h[g] = mul(e[g], f32_all(factor_table.of[factor[g]].inverse_holds));
        b[g] = mul(e[g], f32_all(factor_table.of[factor[g]].inverse_below));
    });
    // A value exceeds the element's largest times `holds` by its own rounding at most.
    round.whole_steps(h);
    each<4>([&](int g) { b[g] = round.clipped(b[g]); });
    round.whole_steps(b);
    each<4>([&](int g) {
        h[g] = mul(h[g], f32_all(factor_table.of[factor[g]].holds));
        b[g] = mul(b[g], f32_all(factor_table.of[factor[g]].below));
        e[g] = sub(fma(to_32nd, e[g], two), to_32nd);
    });
    each<4>([&](int g) {
        store(holds + g * size, h[g]);
        store(below + g * size, b[g]);
        store(excess + g * lanes, mul(sub(b[g], h[g]), sub(e[g], add(h[g], b[g]))));
    });
}

// v [groups][size] times `scale` → the first `count` of out, element · factor; adds up the sums of 4.
LLMFP4_INLINE I32 quantize_together(const float* v, int size, int count, F32 scale, int most, const Rounder& round,
                                    Groups& of, int8_t* out, I32 sum) {
    const int groups = int(round_up((count + size - 1) / size, 4)), below = most_values;
    for (int g = 0; g < groups; g += lanes) {
        F32 largest = f32_zero();
        for (int i = 0; i < size; i += lanes) largest = larger(largest, max_of_rows(v + g * size + i, size));
        const F32 needed = ceil(div(mul(largest, scale), f32_all(round.top)));
        store(of.factor + g, to_integers(larger(clip(needed, f32_all(float(most))), f32_all(1))));
        store(of.gain + g, i32_all(0));
    }
    for (int g = groups; g % lanes; ++g) store(of.excess + g * lanes, f32_zero());
    for (int i = 0; i < size; i += lanes) {
        for (int g = 0; g < groups; g += 4) {
            float* holds = of.holds + g * size + i;
            quantize_lanes(v + g * size + i, size, scale, round, of.factor + g, holds, holds + below,
                           of.excess + g * lanes);
        }
        for (int g = 0; g < groups; g += lanes) {
            const F32 sums = mul(sum_of_rows(of.excess + g * lanes, lanes), f32_all(32));
            store(of.gain + g, add(load(of.gain + g), to_integers(sums)));
        }
    }
    for (int i = 0; i < count; i += 4 * lanes) {
        F32 best[4];
        each<4>([&](int j) {
            const int at = i + j * lanes;
            best[j] = load(of.holds + at + (of.gain[at / size] > 0 ? below : 0));
        });
        sum = store_integers(best, out + i, sum);
    }
    return sum;
}

// v [count] in groups of `size`, a multiple of 16, times `scale` → integers, and their sums of 4. `count` is a multiple
// of 64; v holds zeros behind it up to 16 groups: they change neither a largest value nor an error.
LLMFP4_INLINE I32 quantize_groups_of(const float* v, int size, int count, F32 scale, int most, const Rounder& round,
                                     int8_t* out) {
    Groups of;
    I32 sum = i32_all(0);
    const int groups = most_values / size / lanes * lanes, step = (groups < most_groups ? groups : most_groups) * size;
    for (int i = 0; i < count; i += step)
        sum = quantize_together(v + i, size, count - i < step ? count - i : step, scale, most, round, of, out + i, sum);
    return sum;
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
