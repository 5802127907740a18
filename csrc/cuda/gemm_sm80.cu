#include "gemm_sm80.h"
#include "product.h"

using namespace llmfp4::cuda;

template <class Operand, bool grouped>
struct GemmKernels;

// So many blocks of a tile's registers fit a multiprocessor. Left to itself ptxas spills to fit one more.
constexpr int gemm_blocks(int rows8) { return rows8 == 4 ? 5 : rows8 == 8 ? 3 : 2; }

#define GEMM_KERNEL(name, Operand, grouped, strips, rows8)                         \
    extern "C" __global__ void __launch_bounds__(gemm_threads, gemm_blocks(rows8)) \
        gemm_sm80_##name(const __grid_constant__ Gemm<Operand> p) {                \
        gemm_block<Operand, grouped, strips, rows8>(p);                            \
    }
#define GEMM_ROW(name, Operand, grouped, strips, rows8) \
    {"gemm_sm80_" #name, gemm_sm80_##name, GemmTile<Operand, grouped, strips, rows8>::shared_bytes}

template <class Operand>
struct GemmKernel {
    const char* name;
    void (*function)(Gemm<Operand>);
    int shared;
};

// Tiles of outputs x rows. Scaled operands of 32 outputs and sums of 128 rows would not fit the registers.
#define GEMM(tag, Operand)                                                                            \
    GEMM_KERNEL(tag##_64x32, Operand, false, 1, 4)                                                    \
    GEMM_KERNEL(tag##_128x64, Operand, false, 2, 8)                                                   \
    GEMM_KERNEL(tag##_128x128, Operand, false, 2, 16)                                                 \
    template <>                                                                                       \
    struct GemmKernels<Operand, false> {                                                              \
        static constexpr GemmKernel<Operand> at[] = {GEMM_ROW(tag##_64x32, Operand, false, 1, 4),     \
                                                     GEMM_ROW(tag##_128x64, Operand, false, 2, 8),    \
                                                     GEMM_ROW(tag##_128x128, Operand, false, 2, 16)}; \
    };
#define GEMM_NARROW(tag, Operand, grouped)                                                            \
    GEMM_KERNEL(tag##_64x32, Operand, grouped, 1, 4)                                                  \
    GEMM_KERNEL(tag##_128x64, Operand, grouped, 2, 8)                                                 \
    template <>                                                                                       \
    struct GemmKernels<Operand, grouped> {                                                            \
        static constexpr GemmKernel<Operand> at[] = {GEMM_ROW(tag##_64x32, Operand, grouped, 1, 4),   \
                                                     GEMM_ROW(tag##_128x64, Operand, grouped, 2, 8)}; \
    };

GEMM(int8, Int8)
GEMM(int8_shifted, ShiftedInt8)
GEMM(int8_packed, PackedInt8)
GEMM_NARROW(bf16_shifted, ShiftedBf16, false)
GEMM_NARROW(int8_grouped, GroupedInt8, true)
GEMM(f16, Halves<F16>)
GEMM(bf16, Halves<Bf16>)
GEMM_NARROW(f16_grouped, Halves<F16>, true)
GEMM_NARROW(bf16_grouped, Halves<Bf16>, true)

namespace llmfp4::cuda {

// By counting: the narrowest tile that holds all rows; k is split while a multiprocessor would have no block.
void plan_gemm_sm80(const Weight& w, int multiprocessors, Plan& plan) {
    constexpr int outs_of[] = {64, 128, 128}, rows_of[] = {32, 64, 128}, least_units = 8;  // of a split
    const int counted = plan.rows <= 32 ? 0 : plan.rows <= 64 || plan.narrow ? 1 : 2;
    plan.kernel = plan.choose_tile(counted, 0, plan.narrow ? 1 : 2);
    const int rows = plan.tile_rows = rows_of[plan.kernel], outs = plan.tile_outs = outs_of[plan.kernel];
    plan.grid[0] = (plan.rows + rows - 1) / rows, plan.grid[1] = (w.n + outs - 1) / outs;
    const int blocks = int(plan.grid[0] * plan.grid[1]), units = int(UnitLayout{w.n, w.k}.units_k());
    const int most = units / least_units, few = multiprocessors / blocks;
    plan.share_sums(plan.choose_splits(most < few ? most : few, units, blocks, multiprocessors), blocks, w.n);
    plan.grid[2] = plan.splits;
}

void gemm_sm80(const Weight& w, const Activations& a, const Plan& plan, const Call& call) {
    make_operands(w, a, plan, call);
    auto launch = [&](auto type, auto table, auto grouped) {
        using Operand = typename decltype(type)::type;
        const auto& kernel = GemmKernels<Operand, grouped>::at[plan.kernel];
        const Gemm<Operand> p{product_of<Operand>(w, a, plan, call, table), output_of(w, plan, call)};
        start(kernel.name, kernel.function, plan.grid[0], plan.grid[1], plan.grid[2], gemm_threads, kernel.shared,
              !plan.direct, call.queue, p);
    };
    if (plan.inputs != Inputs::packed) return with_operand(w, a, plan, call, launch);
    const PackedInt8::Table table{{w.element, a.top_shift()}, Int8::Table(a.element)};
    launch(Type<PackedInt8>{}, table, std::false_type{});
}

}  // namespace llmfp4::cuda
