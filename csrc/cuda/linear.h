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
    const uint8_t* shift;   // of static integers, or of floats that have no other factor: [padded k] or null
    const float* x_factor;  // [padded k] or null; for floats with 2^-shift in it

    bool fp8() const { return element.exponent_bits == 4 && element.mantissa_bits == 3; }
    bool quantized() const { return element.exponent_bits > 0; }  // to bytes, with a scale per token
    bool integer() const { return quantized() && !fp8(); }
    int top_shift() const { return shift ? element.max_shift() : 0; }
    // What is left where the weights take the shift.
    Activations unshifted() const { return {element, x_scale, group_size, nullptr, integer() ? x_factor : nullptr}; }
    // Rows of operands that a row of x becomes: see quantize.h and split.h.
    int planes(Dtype dtype) const {
        if (fp8()) return 1;
        if (integer()) return element.max_integer() << top_shift() > 127 ? 2 : 1;
        return dtype == Dtype::f32 ? 4 : x_factor ? 2 : 1;
    }
    // The product's operands: int8, or 16-bit floats of this dtype.
    bool half_is_bf16(Dtype dtype) const { return dtype != Dtype::f16 || planes(dtype) > 1; }
};

// What activations become: operands with the shift on them; without it, for weights that take it as they are decoded;
// the same as packed codes.
enum class Inputs { shifted, plain, packed };

// A tile, by its place among its family's, and splits of the sum over k that were measured. Without them they follow
// from counting.
struct Forced {
    int tile = -1, splits = 0;
};

constexpr int most_blocks = 8;  // of a multiprocessor, of a product whose sums are shared: more would only take memory

// Which kernel of a family multiplies, and how its blocks share the work: decided once, for the workspace and the
// launch.
struct Plan {
    Forced forced;
    int kernel;        // index into the family's instances
    int planes, rows;  // of activation operands: rows = planes · m
    bool exact;        // sums are integers
    bool direct;       // x itself is the operand
    int blocked_rows;  // of operands in the order of blocks.h; 0: they are in row order
    Inputs inputs;
    bool fast_sums;       // sums of 8-bit floats stay in the tensor core
    bool narrow;          // tiles have up to 64 rows: operands are scaled, which takes registers (gemm)
    uint32_t grid[3];     // of the product
    int splits, warps_n;  // blocks that share a sum over k; strips side by side in a block (gemv)
    int whole, sharers;   // tiles that a block takes whole; blocks that share the others (sm90, stream_k.h)
    int tile, first_tile, last_tile, most_splits;  // the tile's place among the family's; what may be forced
    int tile_outs, tile_rows;
    size_t x_bytes;        // of activation operands
    size_t scale_bytes;    // of their scales
    size_t partial_bytes;  // of sums that blocks share
    size_t counters;       // of blocks that have arrived, one per tile
    size_t bytes() const { return x_bytes + scale_bytes + partial_bytes; }

    // The place of the tile: the forced one, or `counted`. Throws std::invalid_argument unless it is first to last.
    int choose_tile(int counted, int first, int last) {
        first_tile = first, last_tile = last, tile = forced.tile == -1 ? counted : forced.tile;
        if (tile < first || tile > last)
            throw std::invalid_argument("tile " + std::to_string(tile) + " is none of " + std::to_string(first) +
                                        " to " + std::to_string(last) + ", which " + std::to_string(rows) +
                                        " rows of such operands have");
        return tile;
    }
    // Blocks that share a sum: those forced, or `counted`, at least one. Throws std::invalid_argument beyond the units
    // of k, and beyond most_blocks.
    int choose_splits(int counted, int units, int blocks, int multiprocessors) {
        const int wanted = forced.splits ? forced.splits : counted > 1 ? counted : 1;
        most_splits = most_blocks * multiprocessors / blocks;
        if (most_splits > units) most_splits = units;
        if (most_splits < 1) most_splits = 1;
        if (wanted < 1 || wanted > most_splits)
            throw std::invalid_argument("splits = " + std::to_string(wanted) + " are not 1 to " +
                                        std::to_string(most_splits) + ": the sum has " + std::to_string(units) +
                                        " units of k, and " + std::to_string(multiprocessors) + " multiprocessors " +
                                        std::to_string(blocks) + " tiles");
        return wanted;
    }
    // So many blocks of each of `blocks` tiles keep their sums of its part of rows x n, which the last one adds.
    void share_sums(int by, int blocks, int n) {
        splits = by;
        counters = by > 1 ? blocks : 0;
        partial_bytes = by > 1 ? size_t(by) * rows * n * 4 : 0;
    }
};

struct Call {
    const void* x;         // [m, k] contiguous, at a multiple of 16 bytes
    void* y;               // [m, n] contiguous; gated: [m, n / 2]
    const void* residual;  // as y, or null
    bool gated;            // outputs are eight gates, then their eight ups, and so on: y = silu(gate) · up
    int m;
    Dtype dtype;        // of x, y and residual
    char* workspace;    // Plan::bytes(), at a multiple of 16
    unsigned* arrived;  // Plan::counters, zeros; zeros again afterwards
    Queue queue;
};

constexpr int gemv_rows_limit = 16;

// Throws std::invalid_argument for what a plan does not count in 32 bits: backends/cuda_choices.py refuses it before.
inline void require_countable(int64_t rows, int n, int multiprocessors) {
    if (rows < 1 || n < 1 || multiprocessors < 1 || rows > 1 << 30 || n > 1 << 30 || rows * n > int64_t(1) << 40)
        throw std::invalid_argument(std::to_string(rows) + " rows of operands by " + std::to_string(n) +
                                    " outputs on " + std::to_string(multiprocessors) +
                                    " multiprocessors: more than 2^30 rows or 2^40 sums, or nothing");
}

// Grid and kernel for plan.rows rows; Family::divide has filled in the rest.
void plan_gemv(const Weight&, int multiprocessors, Plan&);
void plan_gemm_sm80(const Weight&, int multiprocessors, Plan&);
void plan_gemm_sm90(const Weight&, int multiprocessors, Plan&);
void gemv(const Weight&, const Activations&, const Plan&, const Call&);
void gemm_sm80(const Weight&, const Activations&, const Plan&, const Call&);
void gemm_sm90(const Weight&, const Activations&, const Plan&, const Call&);

// x → operands in the workspace, unless it is one itself.
void make_operands(const Weight&, const Activations&, const Plan&, const Call&);

// A registry row: one of the kernel families, each in a file of its name, and what it makes of activations.
struct Family {
    const char* name;
    void (*share)(const Weight&, int multiprocessors, Plan&);
    void (*run)(const Weight&, const Activations&, const Plan&, const Call&);
    Inputs inputs;
    bool fast_sums = false;  // see Plan

    // Throws std::invalid_argument where weights cannot take the shift: backends/cuda_options.py refuses these before.
    void require_shift_on_weights(const Weight& w, const Activations& a, Dtype dtype) const {
        const int top = a.top_shift(), bits = a.element.exponent_bits + a.element.mantissa_bits;
        const bool integers = a.integer() && !a.group_size && top <= 3 && w.element.max_integer() << top <= 127 &&
                              (inputs == Inputs::plain || bits == 3);
        const bool floats = !a.integer() && a.shift && inputs == Inputs::plain && dtype != Dtype::f16;
        if (w.scale_kind != ScaleKind::none || !(integers || floats))
            throw std::invalid_argument(std::string("the kernel '") + name + "' does not take these activations");
    }

    // `rows` rows of operands, whose sums are integers (plan.exact) or not.
    void divide(const Weight& w, int64_t rows, int multiprocessors, Plan& plan) const {
        require_countable(rows, w.n, multiprocessors);
        plan.rows = int(rows);
        plan.inputs = inputs, plan.fast_sums = fast_sums;
        plan.narrow = w.scale_kind != ScaleKind::none || (inputs == Inputs::plain && !plan.exact);
        share(w, multiprocessors, plan);
    }

    Plan plan(const Weight& w, const Activations& a, int m, Dtype dtype, int multiprocessors, Forced forced) const {
        if (inputs != Inputs::shifted) require_shift_on_weights(w, a, dtype);
        Plan plan{};
        plan.forced = forced;
        plan.planes = inputs == Inputs::shifted ? a.planes(dtype) : a.unshifted().planes(dtype);
        plan.exact = a.integer();
        plan.direct = !a.quantized() && plan.planes == 1 && w.k % 8 == 0;
        divide(w, int64_t(plan.planes) * m, multiprocessors, plan);
        const size_t padded_k = UnitLayout{w.n, w.k}.padded_k();
        const size_t row_bytes = inputs == Inputs::packed ? padded_k / 2 : padded_k * (a.quantized() ? 1 : 2);
        plan.x_bytes = plan.direct ? 0 : round_up((plan.blocked_rows ? plan.blocked_rows : plan.rows) * row_bytes, 256);
        plan.scale_bytes = a.quantized() ? round_up(size_t(m) * sizeof(float), 256) : 0;
        return plan;
    }
};

inline const Family& family_named(const std::string& name) {
    static const Family families[] = {
        {"gemv", plan_gemv, gemv, Inputs::shifted},
        {"sm80", plan_gemm_sm80, gemm_sm80, Inputs::shifted},
        {"gemv-weight-shift", plan_gemv, gemv, Inputs::plain},
        {"sm80-weight-shift", plan_gemm_sm80, gemm_sm80, Inputs::plain},
        {"sm80-packed", plan_gemm_sm80, gemm_sm80, Inputs::packed},
#if LLMFP4_SM90
        {"sm90", plan_gemm_sm90, gemm_sm90, Inputs::shifted},
        {"sm90-fast-sums", plan_gemm_sm90, gemm_sm90, Inputs::shifted, true},
#endif
    };
    for (const Family& family : families)
        if (name == family.name) return family;
    throw std::invalid_argument("no CUDA kernel is called '" + name + "'");
}

}  // namespace llmfp4::cuda
