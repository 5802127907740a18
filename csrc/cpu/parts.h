// Activations as exact sums of bf16 numbers, 8 significant bits each.
#pragma once
#include "gemm_w4a4.h"

namespace llmfp4::cpu::LLMFP4_ISA {

// Part p of row m at m·ld + p·part_stride bytes.
struct PartRows {
    char* at;
    size_t ld, part_stride;
    int parts;
    const char* row(long m) const { return at + m * ld; }
};

// bf16 numbers have 8 significant bits, fp16 ones 11, fp32 ones 24; a product with an x_factor is an fp32 number.
inline int parts_of(Dtype dtype, bool smoothed) {
    if (dtype == Dtype::f32 || smoothed) return 3;
    return dtype == Dtype::f16 ? 2 : 1;
}

// The nearest bf16 number, but none that is Inf: what is left of a number beyond bf16's largest fits two more parts.
// Without a branch, or nothing around it vectorises (a row of 576: 4.4 us against 0.36).
inline uint16_t finite_bf16(float value) {
    const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
    return uint16_t(float_to_bf16(value) - (uint32_t(magnitude >= 0x7f7f8000u) & uint32_t(magnitude < 0x7f800000u)));
}

template <int parts, class T>
inline void split_row(const T* __restrict x, int k, int padded_k, const float* __restrict factor, uint16_t* out,
                      size_t part_stride) {
    uint16_t* __restrict first = out;
    uint16_t* __restrict second = out + part_stride;
    uint16_t* __restrict third = out + 2 * part_stride;
    for (int i = 0; i < k; ++i) {
        const float value = to_float(x[i]) * factor[i];
        first[i] = parts > 2 ? finite_bf16(value) : float_to_bf16(value);
        if constexpr (parts > 1) second[i] = float_to_bf16(value - bf16_to_float(first[i]));
        if constexpr (parts > 2) third[i] = float_to_bf16(value - bf16_to_float(first[i]) - bf16_to_float(second[i]));
    }
    for (int p = 0; p < parts; ++p)
        for (int i = k; i < padded_k; ++i) out[p * part_stride + i] = 0;
}

// Whole AMX tiles of 16 rows may be read.
inline PartRows split_rows(const Weights& w, const float* x_factor, const Call& call) {
    PartRows x;
    const size_t padded_k = w.at.padded_k(), rows = round_up(call.m, 16);
    x.parts = parts_of(call.dtype, w.smoothed);
    x.ld = spread_stride(padded_k * 2);
    x.part_stride = rows * x.ld;
    x.at = static_cast<char*>(workspace(slot_rows, (x.parts * rows + 16) * x.ld));
    const int threads = long(call.m) * w.at.k < 65536 ? 1 : call.threads;
    with_dtype(call.dtype, [&](auto type) {
        const auto* source = static_cast<const decltype(type)*>(call.x);
        parallel_ranges(threads, call.m, [&](long begin, long end) {
            for (long m = begin; m < end; ++m)
                with_block<3>(x.parts, [&](auto parts) {
                    split_row<parts>(source + m * call.ldx, w.at.k, int(padded_k), x_factor,
                                     reinterpret_cast<uint16_t*>(x.at + m * x.ld), x.part_stride / 2);
                });
        });
    });
    return x;
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
