// The words that only sm_120a has: products of E2M1 operands with a scale for each block of inputs. None has run on
// hardware; python_tests/ptx/ has a model after the PTX ISA.
#pragma once
#include "device.h"

namespace llmfp4::cuda {

// 4 or 8 bytes from global to shared memory; zeros if not `inside`.
template <int bytes>
__device__ inline void copy_async_few(void* to, const void* from, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(bytes),
                 "r"(inside ? bytes : 0)
                 : "memory");
}

// The nearest E4M3, ties to even, at most 448.
__device__ inline uint8_t nearest_e4m3(float v) {
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(v));
    return uint8_t(pair);
}

// ---- D[16 x 8] += A[16 x 64] · B[64 x 8]. A code is a nibble, the first of a word's eight in its lowest bits. Lane
// 4·g + t holds, besides D as for all mma.sync:
//
//     A   rows g and g + 8, inputs 8·t ..; the same rows, inputs 32 + 8·t ..           4 words
//     B   column g, inputs 8·t ..; inputs 32 + 8·t ..                                  2 words
//     scales of a row of A in lane 4·g + 2·thread_a (g + 8: the lane after), of column g of B in lane 4·g + thread_b
//
// A scale is a byte, blocks lie in order. So a word a lane serves two A and four B, chosen by thread_a and thread_b,
// and two products of 64 inputs where those take two bytes.
#define LLMFP4_BLOCK_SCALED(kind, vector, type, byte)                                                       \
    asm volatile("mma.sync.aligned.m16n8k64.row.col.kind::" kind ".block_scale.scale_vec::" vector          \
                 ".f32.e2m1.e2m1.f32." type                                                                 \
                 " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, %10, {%12, %13}, %11, {%12, %14};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                           \
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(scales_a[byte / 4]),       \
                   "r"(scales_b[byte / 4]), "n"(byte % 4), "n"(thread_a), "n"(thread_b))

struct Mxf4 {                                    // powers of two for 32 inputs
    static constexpr int block = 32, words = 1;  // of scales, a row's 128 inputs

    // `half` of the 128 inputs that the scales belong to.
    template <int half, int thread_a, int thread_b>
    __device__ static void multiply_add(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1,
                                        const uint32_t (&scales_a)[words], const uint32_t (&scales_b)[words]) {
        LLMFP4_BLOCK_SCALED("mxf4", "2X", "ue8m0", 2 * half);
    }
};

struct Nvf4 {  // E4M3, not negative, for 16 inputs
    static constexpr int block = 16, words = 2;

    template <int half, int thread_a, int thread_b>
    __device__ static void multiply_add(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1,
                                        const uint32_t (&scales_a)[words], const uint32_t (&scales_b)[words]) {
        LLMFP4_BLOCK_SCALED("mxf4nvf4", "4X", "ue4m3", 4 * half);
    }
};

}  // namespace llmfp4::cuda
