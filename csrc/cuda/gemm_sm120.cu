#include "gemm_sm120.h"
#include "quantize_sm120.h"

using namespace llmfp4::cuda;

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM120_ALL)
#error "block-scaled products belong to sm_120a: compile this file for 120a-real only"
#endif

extern "C" __global__ void __launch_bounds__(quantize_threads_limit, 1)
    quantize_sm120_activations(const __grid_constant__ QuantizeBlocks p) {
    quantize_blocks(p);
}

extern "C" __global__ void __launch_bounds__(gemm_threads, 2) gemm_sm120_mxf4(const __grid_constant__ GemmSm120 p) {
    gemm_sm120_block<Mxf4>(p);
}

extern "C" __global__ void __launch_bounds__(gemm_threads, 2) gemm_sm120_nvf4(const __grid_constant__ GemmSm120 p) {
    gemm_sm120_block<Nvf4>(p);
}

namespace llmfp4::cuda {

constexpr int tile_outs = TileSm120<Mxf4>::outs, tile_rows = TileSm120<Mxf4>::rows;

Plan plan_gemm_sm120(const BlockScaled& b, int m, int multiprocessors) {
    constexpr int least_steps = 4;  // of a split
    Plan plan{};
    plan.planes = 1, plan.rows = m;
    plan.grid[0] = (m + tile_rows - 1) / tile_rows, plan.grid[1] = (b.weight.n + tile_outs - 1) / tile_outs;
    const int64_t blocks = int64_t(plan.grid[0]) * plan.grid[1], few = multiprocessors / blocks;
    const int most = b.padded_k / step_k / least_steps;
    const int splits = most < few ? most : int(few);
    plan.share_sums(splits < 1 ? 1 : splits, int(blocks), b.weight.n);
    plan.grid[2] = plan.splits;
    plan.x_bytes = round_up(b.codes_bytes(m) + size_t(m) * b.padded_k / b.block(), 256);
    plan.scale_bytes = round_up(size_t(m) * sizeof(float), 256);
    return plan;
}

static void quantize(const BlockScaled& b, const Plan& plan, const Call& call) {
    QuantizeBlocks p{};
    Quantize& q = p.q;
    q.x = call.x, q.dtype = call.dtype, q.m = call.m, q.k = b.weight.k, q.padded_k = b.padded_k, q.planes = 1;
    q.out = call.workspace;
    q.x_scale = reinterpret_cast<float*>(call.workspace + plan.x_bytes);
    q.shift = b.x.shift, q.shift_top = b.x.top_shift(), q.x_factor = b.x.x_factor;
    q.static_scale = b.x.x_scale;
    q.unit = b.groups == XGroups::blocks ? 1.0f : 0.25f / float(1 << q.shift_top);
    q.group_size = b.groups == XGroups::integers ? b.block() : 0;
    q.set_element(b.x.element);
    p.groups = b.groups, p.kind = b.weight.scale_kind, p.channel = b.channel;
    p.scales = reinterpret_cast<uint8_t*>(call.workspace + b.codes_bytes(call.m));
    const int chunks = b.padded_k / chunk_k, whole_warps = (chunks + warp_size - 1) / warp_size * warp_size;
    const int threads = whole_warps < quantize_threads_limit ? whole_warps : quantize_threads_limit;
    start("quantize_sm120_activations", quantize_sm120_activations, call.m, 1, 1, threads, 0, false, call.queue, p);
}

void gemm_sm120(const BlockScaled& b, const Plan& plan, const Call& call) {
    quantize(b, plan, call);
    const bool mxf4 = b.weight.scale_kind == ScaleKind::e8m0;
    const GemmSm120 p{static_cast<const uint4*>(b.weight.codes),
                      static_cast<const char*>(b.weight.group_scale),
                      call.workspace,
                      call.workspace + b.codes_bytes(call.m),
                      call.m,
                      b.padded_k / step_k,
                      (b.weight.n + unit_n - 1) / unit_n,
                      output_of(b.weight, plan, call)};
    start(mxf4 ? "gemm_sm120_mxf4" : "gemm_sm120_nvf4", mxf4 ? gemm_sm120_mxf4 : gemm_sm120_nvf4, plan.grid[0],
          plan.grid[1], plan.grid[2], gemm_threads,
          mxf4 ? TileSm120<Mxf4>::shared_bytes : TileSm120<Nvf4>::shared_bytes, true, call.queue, p);
}

}  // namespace llmfp4::cuda
