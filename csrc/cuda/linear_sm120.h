// What cuda.sm120 multiplies: E2M1 on both sides, each with a scale for every block of inputs. Host code, without
// CUDA's headers. Never run on hardware.
#pragma once
#include "linear.h"

namespace llmfp4::cuda {

// Scales that activations get at run time beside one per token.
enum class XGroups : int {
    none,     // a static one, or one per token
    blocks,   // one for each block, as the weight's: MXFP4's and NVFP4's
    integers  // multiples of the token's unit, for each block
};

// Inputs lie in places: in their order, or sorted by shift, so that all inputs of a block have the same one.
struct BlockScaled {
    Weight weight;  // codes, group_scale: as gemm_sm120.h draws them; scale_kind: e8m0 for 32 inputs, e4m3 for 16
    Activations x;  // shift: [padded_k / 32]; x_factor: [padded_k]
    XGroups groups;
    int padded_k;            // places, a multiple of 128
    const int32_t* channel;  // [padded_k] the input at each place, -1: none; null: place and input are the same

    int block() const { return weight.scale_kind == ScaleKind::e8m0 ? 32 : 16; }
    size_t codes_bytes(int m) const { return size_t(m) * padded_k / 2; }
};

Plan plan_gemm_sm120(const BlockScaled&, int m, int multiprocessors);
void gemm_sm120(const BlockScaled&, const Plan&, const Call&);

}  // namespace llmfp4::cuda
