// The words that CUDA kernels are written in. Instructions have plain names here; asm and intrinsics stand nowhere
// else.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "linear.h"

namespace llmfp4::cuda {

constexpr int warp_size = 32;

// ---- integers and bits

// Bytes of the 8-byte table {low, high} chosen by the four nibbles of `selector`; a nibble above 7 repeats a sign bit.
__device__ inline uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
    uint32_t bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
    return bytes;
}

// The sign bits of four bytes as masks.
__device__ inline uint32_t sign_masks(uint32_t word) { return permute(word, word, 0xba98); }

// a where mask is 1, b where it is 0.
__device__ inline uint32_t select(uint32_t mask, uint32_t a, uint32_t b) { return (a & mask) | (b & ~mask); }

__device__ inline int32_t add(int32_t a, int32_t b) { return a + b; }

__device__ inline uint32_t warp_max(uint32_t value) { return __reduce_max_sync(0xffffffffu, value); }

template <class T>
__device__ inline T from_lane_xor(T value, int distance) {
    return __shfl_xor_sync(0xffffffffu, value, distance);
}

// The value of lane t of this lane's four.
__device__ inline float from_quad_lane(float value, int t) { return __shfl_sync(0xffffffffu, value, t, 4); }

// ---- fp32, each operation one rounding, never contracted

__device__ inline float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ inline float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }  // a · b + c
__device__ inline float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ inline float reciprocal(float a) { return __frcp_rn(a); }
__device__ inline uint32_t bits_of(float v) { return __float_as_uint(v); }
__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline float nearest_even(float v) { return rintf(v); }
__device__ inline float round_up_float(float v) { return ceilf(v); }
__device__ inline float power_of_two(int e) { return float_of(uint32_t(e + 127) << 23); }  // -126 ≤ e ≤ 127
__device__ inline float to_float(int32_t v) { return __int2float_rn(v); }
__device__ inline float to_float(int64_t v) { return __ll2float_rn(v); }
__device__ inline int32_t truncate(float v) { return __float2int_rz(v); }

__host__ __device__ constexpr int bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// One 16-bit number of `dtype` as fp32.
__device__ inline float widen(uint16_t v, Dtype dtype) {
    return dtype == Dtype::bf16 ? float_of(uint32_t(v) << 16) : __half2float(__ushort_as_half(v));
}

// Number `at` of `from` as fp32.
__device__ inline float load_wide(const void* from, Dtype dtype, size_t at) {
    return dtype == Dtype::f32 ? static_cast<const float*>(from)[at]
                               : widen(static_cast<const uint16_t*>(from)[at], dtype);
}

__device__ inline bool is_finite(float v) { return (bits_of(v) & 0x7f800000u) != 0x7f800000u; }

__device__ inline uint16_t nearest_bf16(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
__device__ inline uint16_t nearest_fp16(float v) { return __half_as_ushort(__float2half_rn(v)); }

__device__ inline void store_rounded(void* y, Dtype dtype, size_t at, float v) {
    if (dtype == Dtype::f32) static_cast<float*>(y)[at] = v;
    if (dtype == Dtype::bf16) static_cast<uint16_t*>(y)[at] = nearest_bf16(v);
    if (dtype == Dtype::f16) static_cast<uint16_t*>(y)[at] = nearest_fp16(v);
}

// ---- memory

// Weights are read once: keep them out of L1.
__device__ inline uint4 load_stream(const uint4* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, without a register; zeros if not `inside`.
__device__ inline void copy_async(void* to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(inside ? 16 : 0)
                 : "memory");
}
__device__ inline void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `left` groups of this thread's copies are under way, then for all threads of the block.
template <int left>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
    __syncthreads();
}

__device__ inline void block_barrier() { __syncthreads(); }

// Who does something together: all threads of a block, or some (device_sm90.h).
struct WholeBlock {
    __device__ static int threads() { return blockDim.x; }
    __device__ static int thread() { return threadIdx.x; }
    __device__ static void barrier() { block_barrier(); }
};

// What this team has written is seen by whoever arrives last of `count` blocks; the counter is 0 again then.
// All threads of the team call it; the answer is the same for all of them. `flag` is shared memory.
template <class Team = WholeBlock>
__device__ inline bool arrives_last(unsigned* counter, unsigned count, unsigned* flag) {
    Team::barrier();
    if (threadIdx.x == 0) {
        __threadfence();
        *flag = atomicInc(counter, count - 1) == count - 1;
        __threadfence();
    }
    Team::barrier();
    return *flag != 0;
}

// ---- programmatic dependent launch: no-ops before sm_90

// What the kernel before wrote is there from here on.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The kernel after may start and do what does not depend on this one.
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- tensor cores: D[16 x 8] += A[16 x k] · B[k x 8]; lane 4·g + t holds D[g][2t], D[g][2t+1], D[g+8][2t],
// D[g+8][2t+1]

__device__ inline void multiply_add(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// k = 16: half the operands.
__device__ inline void multiply_add(int32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a0), "r"(a1), "r"(b));
}

struct F16 {
    __device__ static uint32_t scale(uint32_t pair, uint32_t by) {
        const __half2 v = __hmul2(reinterpret_cast<__half2&>(pair), reinterpret_cast<__half2&>(by));
        return reinterpret_cast<const uint32_t&>(v);
    }
};
struct Bf16 {
    __device__ static uint32_t scale(uint32_t pair, uint32_t by) {
        const __nv_bfloat162 v =
            __hmul2(reinterpret_cast<__nv_bfloat162&>(pair), reinterpret_cast<__nv_bfloat162&>(by));
        return reinterpret_cast<const uint32_t&>(v);
    }
};

__device__ inline void multiply_add(F16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply_add(Bf16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace llmfp4::cuda
