#include "decode_fp8.h"
#include "quantize.h"
#include "split.h"

using namespace llmfp4::cuda;

extern "C" __global__ void __launch_bounds__(quantize_threads_limit, 1)
    quantize_activations(const __grid_constant__ Quantize q) {
    quantize_token(q);
}

extern "C" __global__ void split_activations(const __grid_constant__ Split q) { split_token(q); }

namespace llmfp4::cuda {

static void make_integers(const Weight& w, const Activations& a, const Plan& plan, const Call& call) {
    const int top = a.top_shift(), padded_k = int(UnitLayout{w.n, w.k}.padded_k());
    Quantize q{};
    q.x = call.x, q.dtype = call.dtype;
    q.m = call.m, q.k = w.k, q.padded_k = padded_k, q.planes = plan.planes;
    q.out = call.workspace;
    q.blocked_rows = plan.blocked_rows;
    q.x_scale = reinterpret_cast<float*>(call.workspace + plan.x_bytes);
    q.shift = a.shift, q.x_factor = a.x_factor;
    q.static_scale = a.x_scale;
    q.unit = 1.0f / (float(a.element.integer_scale() * w.element.integer_scale()) * float(1 << top));
    q.shift_top = plan.inputs == Inputs::shifted ? top : 0;
    q.group_size = a.group_size;
    q.form = plan.inputs == Inputs::packed     ? Form::codes
             : plan.blocked_rows               ? Form::blocked
             : w.scale_kind != ScaleKind::none ? Form::transposed
                                               : Form::integers;
    q.set_element(a.element);
    if (a.fp8()) {
        q.fp8 = true, q.integer_scale = fp8_part(a.element);
        q.unit = 1.0f / q.integer_scale / float(1 << fp8_exponent(w.element, w.scale_kind));
    }
    const int chunks = padded_k / chunk_k, whole_warps = (chunks + warp_size - 1) / warp_size * warp_size;
    const int threads = whole_warps < quantize_threads_limit ? whole_warps : quantize_threads_limit;
    start("quantize_activations", quantize_activations, call.m, 1, 1, threads, 0, false, call.queue, q);
}

static void make_parts(const Weight& w, const Activations& a, const Plan& plan, const Call& call) {
    constexpr int threads = 256;
    const int padded_k = int(UnitLayout{w.n, w.k}.padded_k()), blocks = (padded_k + threads - 1) / threads;
    const Split q{call.x,
                  call.dtype,
                  call.m,
                  w.k,
                  padded_k,
                  plan.planes,
                  reinterpret_cast<uint16_t*>(call.workspace),
                  plan.blocked_rows,
                  plan.inputs == Inputs::shifted ? a.x_factor : nullptr};
    start("split_activations", split_activations, call.m, blocks, 1, threads, 0, false, call.queue, q);
}

void make_operands(const Weight& w, const Activations& a, const Plan& plan, const Call& call) {
    if (a.quantized())
        make_integers(w, a, plan, call);
    else if (!plan.direct)
        make_parts(w, a, plan, call);
}

}  // namespace llmfp4::cuda
