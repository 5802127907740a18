// Blackwell's FP4 tensor cores: y = epilogue(Σ_k x[row, k] · weight[n, k]), both E2M1 codes with block scales, weights
// as operand A of m16n8k64. Nothing is decoded: codes go from memory to the product as they are. Never run on hardware.
//
// Weights lie in memory as lanes hold them, 512 bytes for 16 outputs by 64 inputs, two of them and then their scales'
// rows for a step of 128 inputs:
//
//     codes   [strip][step][half][lane 4·g + t][16]   inputs 8·t .. of outputs g, g + 8, inputs 32 + 8·t .. of g, g + 8
//     scales  [strip][step][16][4 or 8]               one byte a block of 32 or 16 inputs
//
// and activations as quantize_sm120.h writes them. A block takes 128 outputs by 64 rows; each of its four warps 32
// outputs and all rows. `sm120_stages` steps are under way from global to shared memory:
//
//     stage   codes   [8][2][512]          scales [128][4 or 8]
//             x       [64][64]             lane 4·g + t takes 16 bytes of row g: B of both halves. A warp reads 8 rows
//             scales  [64][4 or 8]         side by side, without bank conflicts.
//
// blockIdx.x counts tiles of rows, so that blocks running together share codes in L2; blockIdx.z splits k. fp32 sums of
// the hardware are not specified to the bit.
#pragma once
#include "device_sm120.h"
#include "gemm_sm80.h"
#include "linear_sm120.h"

namespace llmfp4::cuda {

constexpr int sm120_stages = 3, step_k = 128, step_units = step_k / unit_k;

struct GemmSm120 {
    const uint4* codes;
    const char* scales;
    const char* x;         // [rows] of steps · 64 bytes
    const char* x_scales;  // [rows] of steps · 4 or 8 bytes
    int rows, steps, strips;
    Output out;
};

template <class Kind>
struct TileSm120 {
    static constexpr int strips = 2, rows8 = 8, outs = gemm_warps * strips * unit_n, rows = 8 * rows8;
    static constexpr int row_bytes = step_k / 2, scale_bytes = step_k / Kind::block;
    static constexpr int scales_at = outs * row_bytes, x_at = scales_at + outs * scale_bytes;
    static constexpr int x_scales_at = x_at + rows * row_bytes, stage_bytes = x_scales_at + rows * scale_bytes;
    static constexpr int batch_bytes = gemm_batch_rows * outs * 4, pipeline_bytes = sm120_stages * stage_bytes;
    static constexpr int shared_bytes = pipeline_bytes > batch_bytes ? pipeline_bytes : batch_bytes;
    static_assert(stage_bytes % 16 == 0 && rows <= gemm_threads, "pieces of 16 bytes; a thread copies scales of a row");
    // Of 100 KB; a block takes 1 KB for the system and some for the epilogue.
    static_assert(2 * (shared_bytes + (2 << 10)) <= 100 << 10, "two blocks fit the shared memory of a multiprocessor");
};

template <int words>
__device__ inline void load_words(uint32_t (&to)[words], const char* from) {
#pragma unroll
    for (int w = 0; w < words; ++w) to[w] = reinterpret_cast<const uint32_t*>(from)[w];
}

// Four tiles of rows times one strip: the scales of both come from the lanes that the numbers name.
template <class Kind, int thread_a, int... thread_b>
__device__ inline void multiply_four(float (*acc)[4], const uint4 (&a)[step_units], const uint4 (&x)[4],
                                     const uint32_t (&scales)[Kind::words], const uint32_t (&x_scales)[Kind::words]) {
    (Kind::template multiply_add<0, thread_a, thread_b>(acc[thread_b], a[0], x[thread_b].x, x[thread_b].y, scales,
                                                        x_scales),
     ...);
    (Kind::template multiply_add<1, thread_a, thread_b>(acc[thread_b], a[1], x[thread_b].z, x[thread_b].w, scales,
                                                        x_scales),
     ...);
}

// One step of 128 inputs: 32 products a warp.
template <class Kind, class T>
__device__ inline void multiply_step(float (&acc)[T::strips][T::rows8][4], const char* stage) {
    const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
    const int strip = warp * T::strips;
    uint4 a[T::strips][step_units], x[4];
#pragma unroll
    for (int s = 0; s < T::strips; ++s)
#pragma unroll
        for (int u = 0; u < step_units; ++u)
            a[s][u] = reinterpret_cast<const uint4*>(stage)[((strip + s) * step_units + u) * warp_size + lane];
    uint32_t scales[Kind::words], x_scales[Kind::words];
    load_words(scales, stage + T::scales_at + ((strip + t / 2) * unit_n + g + t % 2 * 8) * T::scale_bytes);
#pragma unroll
    for (int i0 = 0; i0 < T::rows8; i0 += 4) {
        load_words(x_scales, stage + T::x_scales_at + (8 * (i0 + t) + g) * T::scale_bytes);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = reinterpret_cast<const uint4*>(stage + T::x_at)[(8 * (i0 + i) + g) * 4 + t];
        multiply_four<Kind, 0, 0, 1, 2, 3>(&acc[0][i0], a[0], x, scales, x_scales);
        multiply_four<Kind, 1, 0, 1, 2, 3>(&acc[1][i0], a[1], x, scales, x_scales);
    }
}

template <class Kind>
__device__ inline void gemm_sm120_block(const GemmSm120& p) {
    using T = TileSm120<Kind>;
    extern __shared__ __align__(128) char stages[];
    const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    const int row0 = blockIdx.x * T::rows, strip0 = blockIdx.y * gemm_warps * T::strips;
    const int begin = int(int64_t(p.steps) * blockIdx.z / gridDim.z);
    const int end = int(int64_t(p.steps) * (blockIdx.z + 1) / gridDim.z);
    auto stage_of = [&](int step) { return stages + unsigned(step - begin) % sm120_stages * T::stage_bytes; };

    auto fetch_weights = [&](int step) {
        char* stage = stage_of(step);
#pragma unroll
        for (int i = 0; i < T::strips * step_units; ++i) {
            const int s = i / step_units * gemm_warps + warp, u = i % step_units, strip = strip0 + s;
            const bool inside = step < end && strip < p.strips;
            const size_t unit = (size_t(strip) * p.steps + step) * step_units + u;
            copy_async(stage + ((s * step_units + u) * warp_size + lane) * 16,
                       inside ? p.codes + unit * warp_size + lane : p.codes, inside);
        }
        constexpr int pieces = unit_n * T::scale_bytes / 16;  // of a strip
        if (threadIdx.x < gemm_warps * T::strips * pieces) {
            const int strip = strip0 + threadIdx.x / pieces, piece = threadIdx.x % pieces;
            const bool inside = step < end && strip < p.strips;
            const size_t at = ((size_t(strip) * p.steps + step) * pieces + piece) * 16;
            copy_async(stage + T::scales_at + threadIdx.x * 16, inside ? p.scales + at : p.scales, inside);
        }
    };
    auto fetch_x = [&](int step) {
        char* stage = stage_of(step);
        constexpr int pieces = T::row_bytes / 16;  // of a row
#pragma unroll
        for (int i = 0; i < T::rows * pieces / gemm_threads; ++i) {
            const int at = threadIdx.x + i * gemm_threads, row = row0 + at / pieces;
            const bool inside = step < end && row < p.rows;
            const size_t from = (size_t(row) * p.steps + step) * T::row_bytes + at % pieces * 16;
            copy_async(stage + T::x_at + at * 16, inside ? p.x + from : p.x, inside);
        }
        if (threadIdx.x < T::rows) {
            const int row = row0 + threadIdx.x;
            const bool inside = step < end && row < p.rows;
            const size_t from = (size_t(row) * p.steps + step) * T::scale_bytes;
            copy_async_few<T::scale_bytes>(stage + T::x_scales_at + threadIdx.x * T::scale_bytes,
                                           inside ? p.x_scales + from : p.x_scales, inside);
        }
    };
    float acc[T::strips][T::rows8][4] = {};

    // Weights of the first stages are fetched before x, which the kernel before may still be writing.
#pragma unroll
    for (int i = 0; i < sm120_stages - 1; ++i) fetch_weights(begin + i);
    wait_for_previous_kernel();
#pragma unroll
    for (int i = 0; i < sm120_stages - 1; ++i) {
        fetch_x(begin + i);
        end_of_copies();
    }
    for (int step = begin; step < end; ++step) {
        wait_for_copies<sm120_stages - 2>();  // and every warp has left the stage that is filled next
        fetch_weights(step + sm120_stages - 1);
        fetch_x(step + sm120_stages - 1);
        end_of_copies();
        multiply_step<Kind, T>(acc, stage_of(step));
    }
    wait_for_copies<0>();
    leave<T>(p.out, acc, reinterpret_cast<float*>(stages), row0, strip0 * unit_n);
}

}  // namespace llmfp4::cuda
