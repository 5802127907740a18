#include "gemm_sm90.h"
#include "product.h"

using namespace llmfp4::cuda;

template <class Operand, bool grouped>
struct KernelsSm90;

template <class Operand>
struct KernelSm90 {
    const char* name;
    void (*function)(GemmSm90<Operand>);
    int shared;
};

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "wgmma belongs to sm_90a: compile this file for 90a-real only"
#endif

// Two blocks on a multiprocessor where the sums leave the registers for it.
#define GEMM_KERNEL(name, Operand, grouped, rows8)                                  \
    extern "C" __global__ void __launch_bounds__(sm90_threads, (rows8) > 8 ? 1 : 2) \
        gemm_sm90_##name(const __grid_constant__ GemmSm90<Operand> p) {             \
        gemm_sm90_block<Operand, grouped, rows8>(p);                                \
    }
#define GEMM_ROW(name, Operand, grouped, rows8) \
    {"gemm_sm90_" #name, gemm_sm90_##name, TileSm90<Operand, grouped, rows8>::shared_bytes}
#define GEMM_KERNELS(tag, Operand, grouped)    \
    GEMM_KERNEL(tag##_32, Operand, grouped, 4) \
    GEMM_KERNEL(tag##_64, Operand, grouped, 8) \
    GEMM_KERNEL(tag##_128, Operand, grouped, 16)
#define GEMM_ROWS(tag, Operand, grouped)                                              \
    GEMM_ROW(tag##_32, Operand, grouped, 4), GEMM_ROW(tag##_64, Operand, grouped, 8), \
        GEMM_ROW(tag##_128, Operand, grouped, 16)
#define GEMM(tag, Operand, grouped)                                                     \
    GEMM_KERNELS(tag, Operand, grouped)                                                 \
    template <>                                                                         \
    struct KernelsSm90<Operand, grouped> {                                              \
        static constexpr KernelSm90<Operand> at[] = {GEMM_ROWS(tag, Operand, grouped)}; \
    };

// Operands of 16 bits and sums of 256 rows would not fit the registers, nor would those of 8-bit floats twice.
#define GEMM_WIDE(tag, Operand)                                                                \
    GEMM_KERNELS(tag, Operand, false)                                                          \
    GEMM_KERNEL(tag##_256, Operand, false, 32)                                                 \
    template <>                                                                                \
    struct KernelsSm90<Operand, false> {                                                       \
        static constexpr KernelSm90<Operand> at[] = {GEMM_ROWS(tag, Operand, false),           \
                                                     GEMM_ROW(tag##_256, Operand, false, 32)}; \
    };

GEMM_WIDE(int8, Int8)
GEMM_WIDE(fp8_fast, FastFp8)
GEMM(fp8, Fp8, false)
GEMM(fp8_grouped, GroupedFp8, true)
GEMM(f16, Halves<F16>, false)
GEMM(bf16, Halves<Bf16>, false)
GEMM(f16_grouped, Halves<F16>, true)
GEMM(bf16_grouped, Halves<Bf16>, true)

namespace llmfp4::cuda {

void plan_gemm_sm90(const Weight& w, int multiprocessors, Plan& plan) {
    constexpr int rows_of[] = {32, 64, 128, 256}, least_units = 8;  // of a split
    const int columns = (w.n + sm90_outs - 1) / sm90_outs, units = int(UnitLayout{w.n, w.k}.units_k());
    auto blocks_of = [&](int kernel) { return (plan.rows + rows_of[kernel] - 1) / rows_of[kernel] * columns; };
    auto waves_of = [&](int kernel) { return (blocks_of(kernel) + multiprocessors - 1) / multiprocessors; };
    // The narrowest tile that holds all rows. 256 rows decode half as often as 128 and take twice as long: where that
    // leaves no more multiprocessors without work. By counting, not by measuring.
    const bool widest = (plan.exact || plan.fast_sums) && 2 * waves_of(3) <= waves_of(2);
    plan.kernel = plan.rows <= 32 ? 0 : plan.rows <= 64 ? 1 : widest ? 3 : 2;
    plan.kernel = plan.choose_tile(plan.kernel, 0, (plan.exact || plan.fast_sums) ? 3 : 2);
    plan.tile_outs = sm90_outs, plan.tile_rows = rows_of[plan.kernel];
    const int rows = rows_of[plan.kernel], blocks = blocks_of(plan.kernel);
    plan.grid[0] = blocks / columns, plan.grid[1] = columns;
    const int most = units / least_units, few = multiprocessors / blocks;
    plan.splits = plan.choose_splits(most < few ? most : few, units, blocks, multiprocessors);
    plan.grid[2] = plan.splits;
    plan.counters = plan.splits > 1 ? blocks : 0;
    plan.direct = false, plan.blocked_rows = int(plan.grid[0]) * rows;
}

void gemm_sm90(const Weight& w, const Activations& a, const Plan& plan, const Call& call) {
    const bool rows_alone = w.scale_kind == ScaleKind::none;
    if (plan.fast_sums && !(a.fp8() && rows_alone))
        throw std::invalid_argument("sm90-fast-sums multiplies 8-bit floats by weights of one scale per row only");
    if (a.quantized() && !rows_alone && !(a.fp8() && w.scale_kind == ScaleKind::e8m0))
        throw std::invalid_argument("sm90 multiplies these activations by weights of one scale per row only");
    make_operands(w, a, plan, call);
    auto launch = [&](auto type, auto table, auto grouped) {
        using Operand = typename decltype(type)::type;
        const auto& kernel = KernelsSm90<Operand, grouped>::at[plan.kernel];
        const GemmSm90<Operand> p{product_of<Operand>(w, a, plan, call, table), output_of(w, plan, call)};
        start(kernel.name, kernel.function, plan.grid[0], plan.grid[1], plan.grid[2], sm90_threads, kernel.shared, true,
              call.queue, p);
    };
    if (a.fp8()) {
        const Fp8::Table table(w.element, w.scale_kind);
        if (plan.fast_sums) return launch(Type<FastFp8>{}, table, std::false_type{});
        if (rows_alone) return launch(Type<Fp8>{}, table, std::false_type{});
        return launch(Type<GroupedFp8>{}, table, std::true_type{});
    }
    if (a.integer()) return launch(Type<Int8>{}, Int8::Table(w.element), std::false_type{});
    with_halves(w, a, call, launch);
}

}  // namespace llmfp4::cuda
