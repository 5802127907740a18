// One kernel per instruction form of csrc/cuda/device_sm90.h, as instructions.cu; a block is a warpgroup here: thread t
// of block b reads word i at in[b][i][t] and writes out[b][i][t].
#include <cuda_runtime.h>

#include <cstring>

#include "device_sm90.h"

using namespace llmfp4::cuda;

constexpr int threads = 128;

__device__ inline void set_bits(int32_t& v, uint32_t bits) { v = int32_t(bits); }
__device__ inline void set_bits(float& v, uint32_t bits) { v = float_of(bits); }
__device__ inline uint32_t bits_of(int32_t v) { return uint32_t(v); }

// One product: four words of A, n / 16 of B, which a bulk copy brings as blocks of 8 columns by 16 bytes, two along k,
// and n / 2 of D.
template <class Type, class Sum, int n>
__device__ inline void multiply(const uint32_t* from, uint32_t* to) {
    constexpr int b_words = n / 16, d_words = n / 2, b_bytes = n * 32;
    __shared__ __align__(128) char b[b_bytes];
    __shared__ uint64_t full;
    const uint32_t* in = from + blockIdx.x * (4 + b_words + d_words) * threads;
    if (threadIdx.x == 0) {
        barrier_init(&full, 1);
        barriers_ready();
    }
    block_barrier();
    if (threadIdx.x == 0) {
        arrive_expecting(&full, b_bytes);
        copy_bulk(b, in + 4 * threads, b_bytes, &full);
    }
    uint32_t a[4];
    Sum d[n / 8][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = in[i * threads + threadIdx.x];
#pragma unroll
    for (int i = 0; i < d_words; ++i) set_bits(d[i / 4][i % 4], in[(4 + b_words + i) * threads + threadIdx.x]);
    wait_for_phase(&full, 0);
    products_begin();
    multiply_add(Type{}, Columns<n>{}, d, a, blocks_at(b, 256));
    products_commit();
    wait_for_products();
#pragma unroll
    for (int i = 0; i < d_words; ++i) {
        settle(d[i / 4][i % 4]);
        to[(blockIdx.x * d_words + i) * threads + threadIdx.x] = bits_of(d[i / 4][i % 4]);
    }
}

// Two copies into one place, one after the other: both parities of a barrier that counts bytes, and one that counts
// threads.
__device__ inline void copy_twice(const uint32_t* from, uint32_t* to) {
    __shared__ __align__(16) uint32_t stage[2 * threads];
    __shared__ uint64_t full, empty;
    if (threadIdx.x == 0) {
        barrier_init(&full, 1), barrier_init(&empty, threads);
        barriers_ready();
    }
    block_barrier();
    for (int i = 0; i < 2; ++i) {
        const size_t at = (blockIdx.x * 2 + i) * 2 * threads;
        if (threadIdx.x == 0) {
            if (i > 0) wait_for_phase(&empty, 0);
            arrive_expecting(&full, sizeof stage);
            copy_bulk(stage, from + at, sizeof stage, &full);
        }
        wait_for_phase(&full, i);
        to[at + threadIdx.x] = stage[threadIdx.x];
        to[at + threads + threadIdx.x] = stage[threads + threadIdx.x];
        arrive(&empty);
    }
}

#define FORM(name, body) \
    extern "C" __global__ void __launch_bounds__(threads) form_##name(const uint32_t* from, uint32_t* to) { body; }

FORM(wgmma_s8_32, (multiply<S8, int32_t, 32>(from, to)))
FORM(wgmma_s8_48, (multiply<S8, int32_t, 48>(from, to)))
FORM(wgmma_s8_256, (multiply<S8, int32_t, 256>(from, to)))
FORM(wgmma_e4m3_32, (multiply<E4M3, float, 32>(from, to)))
FORM(wgmma_e4m3_112, (multiply<E4M3, float, 112>(from, to)))
FORM(wgmma_f16_16, (multiply<F16, float, 16>(from, to)))
FORM(wgmma_f16_128, (multiply<F16, float, 128>(from, to)))
FORM(wgmma_bf16_80, (multiply<Bf16, float, 80>(from, to)))
FORM(wgmma_bf16_224, (multiply<Bf16, float, 224>(from, to)))
FORM(bulk_copies, copy_twice(from, to))

// Runs form_`name` on the GPU with the caller's tensors; a CUDA error code, or -1 for an unknown name.
extern "C" __attribute__((visibility("default"))) int run_form(const char* name, const uint32_t* in, uint32_t* out,
                                                               int blocks) {
    const struct {
        const char* name;
        void (*kernel)(const uint32_t*, uint32_t*);
    } forms[] = {{"wgmma_s8_32", form_wgmma_s8_32},       {"wgmma_s8_48", form_wgmma_s8_48},
                 {"wgmma_s8_256", form_wgmma_s8_256},     {"wgmma_e4m3_32", form_wgmma_e4m3_32},
                 {"wgmma_e4m3_112", form_wgmma_e4m3_112}, {"wgmma_f16_16", form_wgmma_f16_16},
                 {"wgmma_f16_128", form_wgmma_f16_128},   {"wgmma_bf16_80", form_wgmma_bf16_80},
                 {"wgmma_bf16_224", form_wgmma_bf16_224}, {"bulk_copies", form_bulk_copies}};
    for (const auto& form : forms)
        if (!std::strcmp(form.name, name)) {
            form.kernel<<<blocks, threads>>>(in, out);
            const int code = cudaGetLastError();
            return code ? code : int(cudaDeviceSynchronize());
        }
    return -1;
}
