// One packed weight on a GPU and the calls that multiply with it. Host code, without CUDA's headers.
#pragma once
#include <cstddef>
#include <string>

#include "../core/element.h"
#include "../core/scale.h"
#include "../core/units.h"
#include "launch.h"

namespace llmfp4::cuda {

enum class Dtype : int { f32, bf16, f16 };

struct Weight {
    int n, k;
    Element element;
    const void* codes;       // units, csrc/core/units.h
    const float* row_scale;  // [n]
    const float* bias;       // [n] or null
    ScaleKind scale_kind;
    const void* group_scale;  // [n/16][groups][8][2]: outputs g and g + 8 side by side; E8M0 relative to its row
    int group_size;           // 16 · 2^i
    int groups() const { return group_size ? int((UnitLayout{n, k}.padded_k() + group_size - 1) / group_size) : 0; }
};

// What the activations become. Integers of `element`, E4M3 as it is, or, without one (0 exponent bits), 16-bit floats.
struct Activations {
    Element element;
    float x_scale;          // of integers; 0: dynamic
    int group_size;         // of dynamic scales: 0, or 16 · 2^i up to 512
    const uint8_t* shift;   // of static integers: [padded k] or null
    const float* x_factor;  // [padded k] or null; for floats with 2^-shift in it

    bool fp8() const { return element.exponent_bits == 4 && element.mantissa_bits == 3; }
    bool quantized() const { return element.exponent_bits > 0; }  // to bytes, with a scale per token
    bool integer() const { return quantized() && !fp8(); }
    // Rows of operands that a row of x becomes: see quantize.h and split.h.
    int planes(Dtype dtype) const {
        if (integer()) return element.max_integer() << (shift ? element.max_shift() : 0) > 127 ? 2 : 1;
        if (fp8()) return 1;
        return dtype == Dtype::f32 ? 4 : x_factor ? 2 : 1;
    }
    // The product's operands: int8, or 16-bit floats of this dtype.
    bool half_is_bf16(Dtype dtype) const { return dtype != Dtype::f16 || planes(dtype) > 1; }
};

// Which kernel of a family multiplies, and how its blocks share the work: decided once, for the workspace and the
// launch.
struct Plan {
    int kernel;            // index into the family's instances
    int planes, rows;      // of activation operands: rows = planes · m
    bool exact;            // sums are integers
    bool direct;           // x itself is the operand
    int blocked_rows;      // of operands in the order of blocks.h; 0: they are in row order
    uint32_t grid[3];      // of the product
    int splits, warps_n;   // blocks that share a sum over k; strips side by side in a block (gemv)
    size_t x_bytes;        // of activation operands
    size_t scale_bytes;    // of their scales
    size_t partial_bytes;  // of sums that blocks share
    size_t counters;       // of blocks that have arrived, one per tile
    size_t bytes() const { return x_bytes + scale_bytes + partial_bytes; }
};

struct Call {
    const void* x;  // [m, k] contiguous, at a multiple of 16 bytes
    void* y;        // [m, n] contiguous
    int m;
    Dtype dtype;        // of x and y
    char* workspace;    // Plan::bytes(), at a multiple of 16
    unsigned* arrived;  // Plan::counters, zeros; zeros again afterwards
    Queue queue;
};

constexpr int gemv_rows_limit = 16;

// Grid and kernel for plan.rows rows; with_operands has filled in the rest.
void plan_gemv(const Weight&, int multiprocessors, Plan&);
void plan_gemm_sm80(const Weight&, int multiprocessors, Plan&);
void plan_gemm_sm90(const Weight&, int multiprocessors, Plan&);
void gemv(const Weight&, const Activations&, const Plan&, const Call&);
void gemm_sm80(const Weight&, const Activations&, const Plan&, const Call&);
void gemm_sm90(const Weight&, const Activations&, const Plan&, const Call&);

// x → operands in the workspace, unless it is one itself.
void make_operands(const Weight&, const Activations&, const Plan&, const Call&);

// A registry row: one of the kernel families, each in a file of its name.
struct Family {
    const char* name;
    void (*share)(const Weight&, int multiprocessors, Plan&);
    void (*run)(const Weight&, const Activations&, const Plan&, const Call&);

    Plan plan(const Weight& w, const Activations& a, int m, Dtype dtype, int multiprocessors) const {
        Plan plan{};
        plan.planes = a.planes(dtype), plan.rows = plan.planes * m;
        plan.exact = a.integer();
        plan.direct = !a.quantized() && plan.planes == 1 && w.k % 8 == 0;
        share(w, multiprocessors, plan);
        const size_t row_bytes = UnitLayout{w.n, w.k}.padded_k() * (a.quantized() ? 1 : 2);
        plan.x_bytes = plan.direct ? 0 : round_up((plan.blocked_rows ? plan.blocked_rows : plan.rows) * row_bytes, 256);
        plan.scale_bytes = a.quantized() ? round_up(size_t(m) * sizeof(float), 256) : 0;
        plan.partial_bytes = plan.splits > 1 ? size_t(plan.splits) * plan.rows * w.n * 4 : 0;
        return plan;
    }
};

inline const Family& family_named(const std::string& name) {
    static const Family families[] = {
        {"gemv", plan_gemv, gemv},
        {"sm80", plan_gemm_sm80, gemm_sm80},
#if LLMFP4_SM90
        {"sm90", plan_gemm_sm90, gemm_sm90},
#endif
    };
    for (const Family& family : families)
        if (name == family.name) return family;
    throw std::invalid_argument("no CUDA kernel is called '" + name + "'");
}

}  // namespace llmfp4::cuda
