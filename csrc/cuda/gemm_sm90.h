// Any number of rows on sm_90: y = epilogue(Σ_k x[row, k] · weight[n, k]) in tiles, by products of warpgroups.
//
// Weights are operand A, decoded in registers from the same units that gemv and sm80 read: four strips of 16 outputs
// are the 64 rows of a product. Activations are operand B, read from shared memory in blocks (blocks.h).
//
// A tile is 128 outputs by up to 8·rows8 rows, as few as the call's rows need (widths_sm90). A block takes ranges of
// units of one tile after the other (stream_k.h): one warp brings `stages` units of 64 inputs by bulk copies, two
// warpgroups multiply, each 64 outputs by all rows. A warp decodes the next unit while its products run; the copying
// warp goes on with the next range while sums leave.
//
//     stage   codes  [8 strips][512]             one unit each
//             scales [8 strips][groups][8][2]    with group scales: those of the unit's 1, 2 or 4 groups
//             x      [tile's rows / 8][blocks][8][16]     contiguous in global memory, too: one copy
//     sums    [32 rows][128 + 4]                 behind the stages: sums on their way out
//
//     full[stage]    the copies have arrived          empty[stage]    all eight warps have multiplied
//
// The i-th unit of a block, whatever its range, lies in stage i mod stages, in phase i / stages of its barriers.
#pragma once
#include <type_traits>

#include "blocks.h"
#include "decode_fp8.h"
#include "device_sm90.h"
#include "leave_sm90.h"

namespace llmfp4::cuda {

template <class Operand>
struct GemmSm90 {
    Product<Operand> product;
    Output out;
    StreamK share;
    int rows;  // of a tile
};

template <class Operand, bool grouped, int rows8>
struct TileSm90 {
    static constexpr int rows = 8 * rows8, strip_scales = grouped ? 64 : 0;
    static constexpr int codes_bytes = sm90_warps * unit_bytes, scale_bytes = sm90_warps * strip_scales;
    static constexpr int row8_bytes = block_rows * unit_k * Operand::bytes;
    static constexpr int x_at = codes_bytes + scale_bytes, stage_bytes = x_at + rows8 * row8_bytes;
    // Sums of up to 64 rows leave the registers for two blocks on a multiprocessor: each takes half its memory.
    static constexpr int limit = rows > 64 ? 220 << 10 : 110 << 10;
    static constexpr int fitting = (limit - sm90_sums_bytes) / stage_bytes, stages = fitting < 8 ? fitting : 8;
    static constexpr int sums_at = stages * stage_bytes, shared_bytes = sums_at + sm90_sums_bytes;
};

// Rows of a kernel's tiles: `most`, or less by a step as often as `least` allows. Products of integers (S8) have no 40
// and no 56.
struct WidthsSm90 {
    int most, step, least;
};
__host__ __device__ constexpr WidthsSm90 widths_sm90(int most, bool integers) {
    if (most == 32) return {32, 8, 8};
    return {most, most == 64 && integers ? 16 : most / 8, most / 2 + most / 8};
}

// Calls f(Columns<rows>{}) for the rows of a tile, which are among the widths of its kernel.
template <int most, int step, int least, class F>
__device__ inline void with_columns(int rows, F&& f) {
    if constexpr (most - step >= least)
        if (rows < most) return with_columns<most - step, step, least>(rows, f);
    f(Columns<most>{});
}

// Operand type → its number type, as device_sm90.h's products are called for.
inline __device__ S8 numbers(const Int8&) { return {}; }
inline __device__ E4M3 numbers(const Fp8&) { return {}; }
template <class H>
inline __device__ H numbers(const Halves<H>&) {
    return {};
}

// After so many units sums leave the tensor core for fp32; 0: at the end. It keeps about 14 bits of a sum of 8-bit
// floats (measured by others on Hopper, DeepSeek-V3 section 3.3).
template <class Operand>
constexpr int units_of_a_sum = 0;
template <>
constexpr int units_of_a_sum<Fp8> = 2;
template <>
constexpr int units_of_a_sum<GroupedFp8> = 2;

// total += acc, which is 0 then; the products that make acc have ended.
template <int rows8, class Sum>
__device__ inline void promote(Sum (&total)[rows8][4], Sum (&acc)[rows8][4]) {
#pragma unroll
    for (int i = 0; i < rows8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            settle(acc[i][e]);
            total[i][e] = add(total[i][e], acc[i][e]);
            acc[i][e] = 0;
        }
}

// Where stages lie: that of the i-th unit of a block.
template <class T>
struct StagesSm90 {
    char* shared;
    uint64_t *full, *empty;

    __device__ char* at(unsigned i) const { return shared + i % T::stages * T::stage_bytes; }
    __device__ void wait_until_full(unsigned i) const { wait_for_phase(&full[i % T::stages], i / T::stages & 1); }
    __device__ void wait_until_empty(unsigned i) const {
        wait_for_phase(&empty[i % T::stages], (i / T::stages - 1) & 1);
    }
};

// All lanes of the copying warp.
template <class T, bool grouped, class Operand>
__device__ inline void bring(const GemmSm90<Operand>& kernel, const StagesSm90<T>& stages) {
    const Product<Operand>& p = kernel.product;
    const int lane = threadIdx.x % warp_size;
    const unsigned x_bytes = kernel.rows / block_rows * T::row8_bytes;
    // Bytes of scales of one strip in a unit: a group of 16 inputs has 16, outputs g and g + 8 side by side.
    const unsigned strip_scales = 64u >> min(p.group_shift, 2);
    auto fetch_weights = [&](unsigned i, const Units& at) {
        char* stage = stages.at(i);
        uint64_t* barrier = &stages.full[i % T::stages];
        if (lane == 0) arrive_expecting(barrier, T::codes_bytes + x_bytes + (grouped ? sm90_warps * strip_scales : 0));
        warp_barrier();
        if (lane >= sm90_warps) return;
        // Beyond the last strip: any codes, their sums go nowhere.
        const int strip = min(at.out_tile * sm90_warps + lane, p.strips - 1);
        copy_bulk(stage + lane * unit_bytes, p.codes + (size_t(strip) * p.units_k + at.unit) * warp_size, unit_bytes,
                  barrier);
        if (grouped)
            copy_bulk(stage + T::codes_bytes + lane * T::strip_scales, scales_at(p, strip, at.unit, 0, 0), strip_scales,
                      barrier);
    };
    auto fetch_x = [&](unsigned i, const Units& at) {
        const char* unit = p.x + at.unit * (p.rows / block_rows * size_t(T::row8_bytes));
        const char* rows = unit + at.row_tile * size_t(x_bytes);
        if (lane == 0) copy_bulk(stages.at(i) + T::x_at, rows, x_bytes, &stages.full[i % T::stages]);
    };
    // Weights of the first stages are fetched before x, which the kernel before may still be writing.
    Units weights(kernel.share), x(kernel.share);
    unsigned first = 0;
#pragma unroll 1
    while (first < T::stages && weights.next()) fetch_weights(first++, weights);
    wait_for_previous_kernel();
#pragma unroll 1
    for (unsigned i = 0; i < first; ++i) x.next(), fetch_x(i, x);
#pragma unroll 1
    for (unsigned i = first; weights.next(); ++i) {
        stages.wait_until_empty(i);
        fetch_weights(i, weights);
        fetch_x(i, weights);
    }
}

// total += the products of a warpgroup's 64 outputs with all rows, of the block's units first .. end - 1.
template <class T, bool grouped, class Operand, int rows8, class Sum>
__device__ inline void multiply_units(const GemmSm90<Operand>& kernel, const StagesSm90<T>& stages, unsigned first,
                                      unsigned end, Sum (&total)[rows8][4]) {
    constexpr WidthsSm90 widths = widths_sm90(T::rows, std::is_same_v<Sum, int32_t>);
    const Product<Operand>& p = kernel.product;
    const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    auto weights_of = [&](unsigned i) {
        const char* stage = stages.at(i);
        stages.wait_until_full(i);
        Operand weights(reinterpret_cast<const uint4*>(stage + warp * unit_bytes)[lane], p.table);
        if constexpr (grouped) {
            const char* scales = stage + T::codes_bytes + warp * T::strip_scales;
            const int group = lane % 4 >> min(p.group_shift, 2);
            weights.scale(reinterpret_cast<const ScalePair*>(scales)[group * 8 + lane / 4], p.scale_kind);
        }
        return weights;
    };
    Sum acc[rows8][4] = {};
    Operand weights = weights_of(first);
    for (unsigned i = first; i < end; ++i) {
        with_columns<widths.most, widths.step, widths.least>(kernel.rows, [&](auto columns) {
            uint64_t x = blocks_at(stages.at(i) + T::x_at, T::row8_bytes);
            products_begin();
#pragma unroll
            for (const auto& a : weights.a) {
                multiply_add(numbers(weights), columns, acc, a, x);
                x = blocks_after(x, 2 * block_bytes);
            }
            products_commit();
        });
        Operand next = i + 1 < end ? weights_of(i + 1) : weights;
        wait_for_products();
        if (lane == 0) arrive(&stages.empty[i % T::stages]);
        // Products read registers until the wait: what comes next may not be put there before.
#pragma unroll
        for (auto& a : next.a)
#pragma unroll
            for (uint32_t& word : a) settle(word);
        weights = next;
        if constexpr (units_of_a_sum<Operand> > 0)
            if ((i - first + 1) % units_of_a_sum<Operand> == 0) promote(total, acc);
    }
    promote(total, acc);
}

template <class Operand, bool grouped, int rows8>
__device__ inline void gemm_sm90_block(const GemmSm90<Operand>& kernel) {
    using T = TileSm90<Operand, grouped, rows8>;
    using Sum = typename Operand::Sum;
    extern __shared__ __align__(128) char shared[];
    __shared__ uint64_t full[T::stages], empty[T::stages];
    const StagesSm90<T> stages{shared, full, empty};
    if (threadIdx.x == 0) {
        for (int i = 0; i < T::stages; ++i) barrier_init(&full[i], 1), barrier_init(&empty[i], sm90_warps);
        barriers_ready();
    }
    block_barrier();

    if (threadIdx.x / warp_size == sm90_warps) return bring<T, grouped>(kernel, stages);
    wait_for_previous_kernel();  // scales of x are read when sums leave
    const StreamK& share = kernel.share;
#pragma unroll 1
    for (unsigned taken = 0;;) {
        const unsigned count = Range(share, taken).count;
        if (count == 0) return;
        Sum total[rows8][4] = {};
        multiply_units<T, grouped>(kernel, stages, taken, taken + count, total);
        taken += count;
        const Range range(share, taken - 1);
        if (range.count < share.units && !gather_parts(kernel.out, share, range, kernel.rows, total)) continue;
        leave(kernel.out, total, reinterpret_cast<Sum*>(shared + T::sums_at), range.row_tile(share) * kernel.rows,
              kernel.rows, range.out_tile(share) * sm90_outs);
    }
}

}  // namespace llmfp4::cuda
