// One kernel per instruction form that the CUDA kernels use, in the words of csrc/cuda/device.h (compile with -I
// there). A block is a warp: lane l of block b reads word i at in[b][i][l] and writes out[b][i][l].
#include <cuda_runtime.h>

#include <cstring>

#include "device.h"

using namespace llmfp4::cuda;

#define FORM(name, inputs, outputs, body)                                                             \
    extern "C" __global__ void form_##name(const uint32_t* from, uint32_t* to) {                      \
        uint32_t in[inputs], out[outputs];                                                            \
        for (int i = 0; i < inputs; ++i) in[i] = from[(blockIdx.x * inputs + i) * 32 + threadIdx.x];  \
        body;                                                                                         \
        for (int i = 0; i < outputs; ++i) to[(blockIdx.x * outputs + i) * 32 + threadIdx.x] = out[i]; \
    }

template <class Half>
__device__ inline void multiply_halves(const uint32_t (&in)[10], uint32_t (&out)[4]) {
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
    float d[4] = {float_of(in[6]), float_of(in[7]), float_of(in[8]), float_of(in[9])};
    multiply_add(Half{}, d, a, in[4], in[5]);
    for (int i = 0; i < 4; ++i) out[i] = bits_of(d[i]);
}

__device__ inline void multiply_bytes(const uint32_t (&in)[10], uint32_t (&out)[4]) {
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
    int32_t d[4] = {int32_t(in[6]), int32_t(in[7]), int32_t(in[8]), int32_t(in[9])};
    multiply_add(d, a, in[4], in[5]);
    for (int i = 0; i < 4; ++i) out[i] = uint32_t(d[i]);
}

__device__ inline void multiply_half_bytes(const uint32_t (&in)[7], uint32_t (&out)[4]) {
    int32_t d[4] = {int32_t(in[3]), int32_t(in[4]), int32_t(in[5]), int32_t(in[6])};
    multiply_add(d, in[0], in[1], in[2]);
    for (int i = 0; i < 4; ++i) out[i] = uint32_t(d[i]);
}

__device__ inline uint32_t as_fp16(float v) {
    uint16_t half;
    store_rounded(&half, Dtype::f16, 0, v);
    return half;
}

FORM(mma_s8_k32, 10, 4, multiply_bytes(in, out))
FORM(mma_s8_k16, 7, 4, multiply_half_bytes(in, out))
FORM(mma_f16, 10, 4, multiply_halves<F16>(in, out))
FORM(mma_bf16, 10, 4, multiply_halves<Bf16>(in, out))
FORM(permute, 3, 1, out[0] = permute(in[0], in[1], in[2]))
FORM(half_products, 4, 2, out[0] = F16::scale(in[0], in[1]); out[1] = Bf16::scale(in[2], in[3]))
FORM(arithmetic, 3, 6, const float a = float_of(in[0]); const float b = float_of(in[1]);
     const float c = float_of(in[2]); out[0] = bits_of(add(a, b)); out[1] = bits_of(sub(a, c));
     out[2] = bits_of(mul(b, c)); out[3] = bits_of(divide(a, b)); out[4] = bits_of(reciprocal(c));
     out[5] = bits_of(fused(a, b, c)))
FORM(conversions, 2, 8, const float v = float_of(in[0]); out[0] = bits_of(nearest_even(v));
     out[1] = bits_of(round_up_float(v)); out[2] = uint32_t(truncate(v)); out[3] = nearest_bf16(v); out[4] = as_fp16(v);
     out[5] = bits_of(widen(uint16_t(in[1]), Dtype::f16)); out[6] = bits_of(to_float(int32_t(in[1])));
     out[7] = bits_of(to_float(int64_t(int32_t(in[1])) * 128)))
FORM(lanes, 1, 4, out[0] = warp_max(in[0]); out[1] = from_lane_xor(in[0], 1); out[2] = from_lane_xor(in[0], 2);
     out[3] = bits_of(from_quad_lane(float_of(in[0]), 3)))

// Runs form_`name` on the GPU with the caller's tensors; a CUDA error code, or -1 for an unknown name.
extern "C" __attribute__((visibility("default"))) int run_form(const char* name, const uint32_t* in, uint32_t* out,
                                                               int blocks) {
    const struct {
        const char* name;
        void (*kernel)(const uint32_t*, uint32_t*);
    } forms[] = {
        {"mma_s8_k32", form_mma_s8_k32}, {"mma_s8_k16", form_mma_s8_k16},   {"mma_f16", form_mma_f16},
        {"mma_bf16", form_mma_bf16},     {"permute", form_permute},         {"half_products", form_half_products},
        {"arithmetic", form_arithmetic}, {"conversions", form_conversions}, {"lanes", form_lanes}};
    for (const auto& form : forms)
        if (!std::strcmp(form.name, name)) {
            form.kernel<<<blocks, 32>>>(in, out);
            const int code = cudaGetLastError();
            return code ? code : int(cudaDeviceSynchronize());
        }
    return -1;
}
