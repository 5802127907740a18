#include <numeric>

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

// Of each instance: rows of a tile at most; how many of its blocks a multiprocessor holds.
constexpr int most_rows_sm90[] = {32, 64, 128, 256}, resident_sm90[] = {2, 2, 1, 1};

static int columns_sm90(const Weight& w) { return (w.n + sm90_outs - 1) / sm90_outs; }

// Tiles of an instance along the rows, as few as can be, and their rows, as few as those need.
struct RowTilesSm90 {
    int count, rows;

    RowTilesSm90(const Plan& plan, int kernel) {
        const WidthsSm90 widths = widths_sm90(most_rows_sm90[kernel], plan.exact);
        count = (plan.rows + widths.most - 1) / widths.most, rows = widths.most;
        while (rows - widths.step >= widths.least && (rows - widths.step) * count >= plan.rows) rows -= widths.step;
    }
};

// The narrowest instance that holds all rows. 256 rows decode half as often as 128 and take twice as long: where that
// leaves no more multiprocessors without work. By counting, not by measuring.
static int tile_sm90(const Plan& plan, int columns, int multiprocessors) {
    auto time_of = [&](int kernel) {
        const RowTilesSm90 tiles(plan, kernel);
        return (int64_t(tiles.count) * columns + multiprocessors - 1) / multiprocessors * tiles.rows;
    };
    const bool widest = (plan.exact || plan.fast_sums) && time_of(3) <= time_of(2);
    return plan.rows <= 32 ? 0 : plan.rows <= 64 ? 1 : widest ? 3 : 2;
}

// How many of `blocks` share the tiles that full waves leave; 0: they are taken whole, too. So many that the longest
// piece, and the parts of a tile that its last block adds, take least time: a part is worth `part_units` units of k. By
// counting, not by measuring.
static int sharers_sm90(int left, int units, int part_units, int blocks) {
    int best = 0;
    int64_t least = units;
    for (int sharers = left + 1; left && sharers <= blocks; ++sharers) {
        const int64_t piece = (int64_t(left) * units + sharers - 1) / sharers;
        const int parts = sharers + left - std::gcd(sharers, left);  // of all tiles
        const int64_t time = piece + parts * part_units / left;
        if (time < least) least = time, best = sharers;
    }
    return best;
}

void plan_gemm_sm90(const Weight& w, int multiprocessors, Plan& plan) {
    const int columns = columns_sm90(w), units = int(UnitLayout{w.n, w.k}.units_k());
    plan.kernel = plan.choose_tile(tile_sm90(plan, columns, multiprocessors), 0, plan.exact || plan.fast_sums ? 3 : 2);
    const RowTilesSm90 along_rows(plan, plan.kernel);
    const int rows = along_rows.rows, tiles = along_rows.count * columns;
    plan.tile_outs = sm90_outs, plan.tile_rows = rows;
    // So many units of 8-bit operands are as many bytes as the sums of a tile.
    const int sum_bytes = rows * sm90_outs * 4, units_bytes = (sm90_outs / 2 + rows) * unit_k;
    const int part_units = (sum_bytes + units_bytes - 1) / units_bytes;
    // Several blocks run on a multiprocessor only where there are tiles for them.
    const int blocks = multiprocessors * (tiles > multiprocessors ? resident_sm90[plan.kernel] : 1);
    const int left = tiles % blocks;
    // One split: as counted. Several are forced, and share all tiles.
    plan.splits = plan.choose_splits(1, units, tiles, multiprocessors);
    const bool forced = plan.splits > 1;
    plan.sharers = forced ? plan.splits * tiles : sharers_sm90(left, units, part_units, blocks);
    plan.whole = forced ? 0 : plan.sharers ? tiles - left : tiles;
    plan.grid[0] = plan.whole == 0 ? plan.sharers : plan.whole < blocks ? plan.whole : blocks;
    plan.grid[1] = plan.grid[2] = 1;
    plan.counters = tiles - plan.whole;
    if (plan.sharers) plan.partial_bytes = (plan.sharers + plan.counters - 1) * sum_bytes;
    plan.direct = false, plan.blocked_rows = along_rows.count * rows;
}

void gemm_sm90(const Weight& w, const Activations& a, const Plan& plan, const Call& call) {
    const bool rows_alone = w.scale_kind == ScaleKind::none;
    if (plan.fast_sums && !(a.fp8() && rows_alone))
        throw std::invalid_argument("sm90-fast-sums multiplies 8-bit floats by weights of one scale per row only");
    if (a.quantized() && !rows_alone && !(a.fp8() && w.scale_kind == ScaleKind::e8m0))
        throw std::invalid_argument("sm90 multiplies these activations by weights of one scale per row only");
    make_operands(w, a, plan, call);
    const int row_tiles = plan.blocked_rows / plan.tile_rows;
    const StreamK share = stream_k(plan, row_tiles * columns_sm90(w), row_tiles, int(UnitLayout{w.n, w.k}.units_k()));
    auto launch = [&](auto type, auto table, auto grouped) {
        using Operand = typename decltype(type)::type;
        const auto& kernel = KernelsSm90<Operand, grouped>::at[plan.kernel];
        const GemmSm90<Operand> p{product_of<Operand>(w, a, plan, call, table), output_of(w, plan, call), share,
                                  plan.tile_rows};
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
