// What a CPU kernel is given. Plain pointers; Python owns every tensor.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../core/element.h"
#include "../core/layout.h"
#include "../core/scale.h"

namespace llmfp4::cpu {

enum class Dtype : int { f32, bf16, f16 };

// One weight [n, k] in tile order.
struct Weights {
    TileLayout at;
    Element element;
    const uint8_t* codes;    // tile order
    const float* row_scale;  // [n]
    const float* bias;       // [n] or null
    ScaleKind scale_kind;
    const uint8_t* group_scale;  // [n/16][groups][16] or null
    int group_size, groups;
    bool smoothed;  // the activations are multiplied by an x_factor that is no power of two
    bool foldable;  // every x_factor is a power of two from 2^-15 to 1: weights times it are as exact as activations
};

constexpr int dynamic_group_limit = 256;

// Y[m,n] = (fp32(Σ_k xi[m,k] · wi[n,k]) · x_scale[m] · unit) · row_scale[n] + bias[n], integers exact.
struct Activation {
    Element element;
    const float* inverse;         // [padded k]: 2^shift[k] / x_scale, or x_factor of a dynamic one; 0 in the padding
    const float* integer_factor;  // [padded k]: 2^(plane-wise exponent of xi), see quantize.h
    float unit;                   // worth of one unit of the integer sum, a power of two
    float x_scale;                // of a static activation
    bool shifted;                 // whether xi carries 2^(max_shift - shift)
    bool dynamic;                 // one x_scale per token, from its largest value
    int group_size;               // of a dynamic one: groups carry an integer factor; 0: none
};

struct Call {
    const void* x;  // [m, k], row stride ldx elements
    void* y;        // [m, n] contiguous
    int m;
    size_t ldx;
    Dtype dtype;  // of x and y
    int threads;
};

enum class Unit : int { int8, bf16, fp32 };

// One instruction set. w4a4 takes weights without group scales, w4a8_grouped those with them; w4a16 takes everything.
struct Kernels {
    const char* name;
    const char* needs;  // CPU features, as /proc/cpuinfo writes them
    bool (*supported)();
    int w4a4_from_m, w4a16_from_m;  // fewest rows it is meant for; -1: not offered
    void (*w4a4)(const Weights&, const Activation&, const Call&);
    void (*w4a8_grouped)(const Weights&, const Activation&, const Call&);
    void (*w4a16)(const Weights&, const float* x_factor,
                  const Call&);            // x_factor [padded k]: 2^-shift, 0 in the padding
    double (*peak)(Unit, double seconds);  // operations/s of one thread; 0 for a unit it does not have
};

}  // namespace llmfp4::cpu
