#include "gemv.h"
#include "product.h"

using namespace llmfp4::cuda;

template <class Operand, bool grouped>
struct GemvKernels;

// Two blocks on a multiprocessor are wanted; left to itself ptxas spills to fit in four or five. With scaled operands
// of 16 rows one.
template <class Operand>
constexpr int gemv_blocks(bool grouped) {
    return grouped || (Operand::shifted && Operand::bytes == 2) ? 1 : 2;
}

// Up to 8 rows, and up to 16.
#define GEMV(tag, Operand, grouped)                                                                    \
    extern "C" __global__ void __launch_bounds__(gemv_threads, 2)                                      \
        gemv_##tag##_8(const __grid_constant__ Gemv<Operand> p) {                                      \
        gemv_block<Operand, grouped, 1>(p);                                                            \
    }                                                                                                  \
    extern "C" __global__ void __launch_bounds__(gemv_threads, gemv_blocks<Operand>(grouped))          \
        gemv_##tag##_16(const __grid_constant__ Gemv<Operand> p) {                                     \
        gemv_block<Operand, grouped, 2>(p);                                                            \
    }                                                                                                  \
    template <>                                                                                        \
    struct GemvKernels<Operand, grouped> {                                                             \
        static constexpr const char* names[] = {"gemv_" #tag "_8", "gemv_" #tag "_16"};                \
        static constexpr void (*functions[])(const Gemv<Operand>) = {gemv_##tag##_8, gemv_##tag##_16}; \
    };

GEMV(int8, Int8, false)
GEMV(int8_shifted, ShiftedInt8, false)
GEMV(bf16_shifted, ShiftedBf16, false)
GEMV(int8_grouped, GroupedInt8, true)
GEMV(f16, Halves<F16>, false)
GEMV(bf16, Halves<Bf16>, false)
GEMV(f16_grouped, Halves<F16>, true)
GEMV(bf16_grouped, Halves<Bf16>, true)

namespace llmfp4::cuda {

// Tiles are 1, 2 and 4 strips by 8 rows, then the same by 16. By counting: enough blocks for two on each multiprocessor
// (32 KB of loads under way), as long as every warp keeps `depth` units.
void plan_gemv(const Weight& w, int multiprocessors, Plan& plan) {
    if (plan.rows > gemv_rows_limit)
        throw std::invalid_argument("gemv takes up to " + std::to_string(gemv_rows_limit) + " rows, not " +
                                    std::to_string(plan.rows));
    const UnitLayout at{w.n, w.k};
    const int strips = int(at.strips()), units = int(at.units_k());
    const int wanted = plan.rows <= 2 ? 0 : plan.rows <= 8 ? 1 : 2, least = plan.rows > 8 ? 3 : 0;
    const int tile = plan.choose_tile(least + (1 << wanted < strips ? wanted : strips >= 2), least, 5);
    plan.kernel = tile / 3, plan.warps_n = 1 << tile % 3;
    plan.tile_outs = unit_n * plan.warps_n, plan.tile_rows = 8 * (plan.kernel + 1);
    const int blocks = (strips + plan.warps_n - 1) / plan.warps_n;
    const int most = units / (gemv_warps / plan.warps_n * gemv_depth);
    const int few = (2 * multiprocessors + blocks - 1) / blocks;
    plan.share_sums(plan.choose_splits(most < few ? most : few, units, blocks, multiprocessors), blocks, w.n);
    plan.grid[0] = blocks, plan.grid[1] = plan.splits, plan.grid[2] = 1;
}

void gemv(const Weight& w, const Activations& a, const Plan& plan, const Call& call) {
    make_operands(w, a, plan, call);
    with_operand(w, a, plan, call, [&](auto type, auto table, auto grouped) {
        using Operand = typename decltype(type)::type;
        using Kernels = GemvKernels<Operand, grouped>;
        const Gemv<Operand> p{product_of<Operand>(w, a, plan, call, table), output_of(w, plan, call), plan.warps_n};
        const int shared = gemv_warps * 8 * (plan.kernel + 1) * unit_n * 4;
        // Straight after a kernel of the caller's it must not start early: that one may have written the weights.
        start(Kernels::names[plan.kernel], Kernels::functions[plan.kernel], plan.grid[0], plan.grid[1], 1, gemv_threads,
              shared, !plan.direct, call.queue, p);
    });
}

}  // namespace llmfp4::cuda
