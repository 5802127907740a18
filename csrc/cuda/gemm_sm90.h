// Any number of rows on sm_90: y = epilogue(Σ_k x[row, k] · weight[n, k]) in tiles, by products of warpgroups.
//
// Weights are operand A, decoded in registers from the same units that gemv and sm80 read: four strips of 16 outputs
// are the 64 rows of a product. Activations are operand B, read from shared memory in blocks (blocks.h).
//
// A block takes 128 outputs by 8·rows8 rows: one warp brings `stages` units of 64 inputs by bulk copies, two
// warpgroups multiply, each 64 outputs by all rows. A warp decodes the next unit while its products run.
//
//     stage   codes  [8 strips][512]             one unit each
//             scales [8 strips][groups][8][2]    with group scales: those of the unit's 1, 2 or 4 groups
//             x      [rows8][blocks][8][16]      contiguous in global memory, too: one copy
//
//     full[stage]    the copies have arrived          empty[stage]    all eight warps have multiplied
//
// blockIdx.x counts tiles of rows, so that blocks running together share codes in L2; blockIdx.z splits k.
#pragma once
#include "blocks.h"
#include "decode_fp8.h"
#include "device_sm90.h"
#include "epilogue_eights.h"

namespace llmfp4::cuda {

constexpr int sm90_warps = 8, sm90_threads = (sm90_warps + 1) * warp_size, sm90_outs = sm90_warps * unit_n;
constexpr int sm90_batch_rows = 32;
// Sums of neighbouring rows lie 4 words apart in the banks: a warp's 32 stores meet none twice.
constexpr int sm90_sum_stride = sm90_outs + 4;

template <class Operand>
struct GemmSm90 {
    Product<Operand> product;
    Output out;
};

template <class Operand, bool grouped, int rows8>
struct TileSm90 {
    static constexpr int rows = 8 * rows8, strip_scales = grouped ? 64 : 0;
    static constexpr int codes_bytes = sm90_warps * unit_bytes, scale_bytes = sm90_warps * strip_scales;
    static constexpr int row8_bytes = block_rows * unit_k * Operand::bytes, x_bytes = rows8 * row8_bytes;
    static constexpr int x_at = codes_bytes + scale_bytes, stage_bytes = x_at + x_bytes;
    // Sums of up to 64 rows leave the registers for two blocks on a multiprocessor: each takes half its memory.
    static constexpr int limit = rows > 64 ? 220 << 10 : 110 << 10;
    static constexpr int stages = limit / stage_bytes < 8 ? limit / stage_bytes : 8;
    static constexpr int shared_bytes = stages * stage_bytes;
    static_assert(rows % sm90_batch_rows == 0, "the epilogue takes whole batches of rows");
    static_assert(sm90_batch_rows * sm90_sum_stride * 4 <= shared_bytes, "sums leave through the stages");
};

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

// The block's sums leave through shared memory, sm90_batch_rows rows at a time. All threads come here.
template <int rows8, class Sum>
__device__ inline void leave(const Output& out, const Sum (&acc)[rows8][4], Sum* sums, int row0, int out0) {
    constexpr int batch8 = sm90_batch_rows / 8;
    const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int batch = 0; batch < rows8 / batch8; ++batch) {
        block_barrier();
        if (warp < sm90_warps) {
            Sum* mine = sums + 2 * t * sm90_sum_stride + warp * unit_n + g;
#pragma unroll
            for (int i = 0; i < batch8; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    mine[(8 * i + e % 2) * sm90_sum_stride + e / 2 * 8] = acc[batch * batch8 + i][e];
        }
        block_barrier();
        const Tile<Sum> tile{sums, sm90_sum_stride, row0 + batch * sm90_batch_rows, sm90_batch_rows, out0, sm90_outs};
        if (out.splits > 1)
            keep(out, tile, blockIdx.z);
        else if (takes_eights(out))
            finish_eights(out, tile);
        else
            finish(out, tile);
    }
    if (out.splits == 1) return;
    __shared__ unsigned last;
    if (arrives_last(out.arrived + blockIdx.y * gridDim.x + blockIdx.x, out.splits, &last))
        add_kept<Sum>(out, row0, 8 * rows8, out0, sm90_outs);
}

// What a block takes: units begin .. begin + count of these rows and strips; and where stages lie.
template <class T>
struct ShareSm90 {
    char* stages;
    uint64_t *full, *empty;
    int row0, strip0, begin, count;

    __device__ char* stage_of(int i) const { return stages + i % T::stages * T::stage_bytes; }
};

// All lanes of the copying warp.
template <class T, bool grouped, class Operand>
__device__ inline void bring(const Product<Operand>& p, const ShareSm90<T>& share) {
    const int lane = threadIdx.x % warp_size;
    // Bytes of scales of one strip in a unit: a group of 16 inputs has 16, outputs g and g + 8 side by side.
    const unsigned strip_scales = 64u >> min(p.group_shift, 2);
    auto fetch_weights = [&](int i) {
        char* stage = share.stage_of(i);
        uint64_t* barrier = &share.full[i % T::stages];
        if (lane == 0)
            arrive_expecting(barrier, T::codes_bytes + T::x_bytes + (grouped ? sm90_warps * strip_scales : 0));
        warp_barrier();
        if (lane >= sm90_warps) return;
        // Beyond the last strip: any codes, their sums go nowhere.
        const int strip = min(share.strip0 + lane, p.strips - 1), unit = share.begin + i;
        copy_bulk(stage + lane * unit_bytes, p.codes + (size_t(strip) * p.units_k + unit) * warp_size, unit_bytes,
                  barrier);
        if (grouped)
            copy_bulk(stage + T::codes_bytes + lane * T::strip_scales, scales_at(p, strip, unit, 0, 0), strip_scales,
                      barrier);
    };
    auto fetch_x = [&](int i) {
        const size_t unit_stride = p.rows / block_rows * size_t(T::row8_bytes);
        const char* rows = p.x + (share.begin + i) * unit_stride + size_t(share.row0 / block_rows) * T::row8_bytes;
        if (lane == 0) copy_bulk(share.stage_of(i) + T::x_at, rows, T::x_bytes, &share.full[i % T::stages]);
    };
    // Weights of the first stages are fetched before x, which the kernel before may still be writing.
    const int first = min(share.count, T::stages);
#pragma unroll 1
    for (int i = 0; i < first; ++i) fetch_weights(i);
    wait_for_previous_kernel();
#pragma unroll 1
    for (int i = 0; i < first; ++i) fetch_x(i);
#pragma unroll 1
    for (int i = first; i < share.count; ++i) {
        wait_for_phase(&share.empty[i % T::stages], (i / T::stages - 1) & 1);
        fetch_weights(i);
        fetch_x(i);
    }
}

// total += the products of a warpgroup's 64 outputs with all rows.
template <class T, bool grouped, class Operand, int rows8, class Sum>
__device__ inline void multiply_units(const Product<Operand>& p, const ShareSm90<T>& share, Sum (&total)[rows8][4]) {
    const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    auto weights_of = [&](int i) {
        const char* stage = share.stage_of(i);
        wait_for_phase(&share.full[i % T::stages], i / T::stages & 1);
        Operand weights(reinterpret_cast<const uint4*>(stage + warp * unit_bytes)[lane], p.table);
        if constexpr (grouped) {
            const char* scales = stage + T::codes_bytes + warp * T::strip_scales;
            const int group = lane % 4 >> min(p.group_shift, 2);
            weights.scale(reinterpret_cast<const ScalePair*>(scales)[group * 8 + lane / 4], p.scale_kind);
        }
        return weights;
    };
    Sum acc[rows8][4] = {};
    Operand weights = weights_of(0);
    for (int i = 0; i < share.count; ++i) {
        uint64_t x = blocks_at(share.stage_of(i) + T::x_at, T::row8_bytes);
        products_begin();
#pragma unroll
        for (const auto& a : weights.a) {
            multiply_add(numbers(weights), acc, a, x);
            x = blocks_after(x, 2 * block_bytes);
        }
        products_commit();
        Operand next = i + 1 < share.count ? weights_of(i + 1) : weights;
        wait_for_products();
        if (lane == 0) arrive(&share.empty[i % T::stages]);
        // Products read registers until the wait: what comes next may not be put there before.
#pragma unroll
        for (auto& a : next.a)
#pragma unroll
            for (uint32_t& word : a) settle(word);
        weights = next;
        if constexpr (units_of_a_sum<Operand> > 0)
            if ((i + 1) % units_of_a_sum<Operand> == 0) promote(total, acc);
    }
    promote(total, acc);
}

template <class Operand, bool grouped, int rows8>
__device__ inline void gemm_sm90_block(const GemmSm90<Operand>& kernel) {
    using T = TileSm90<Operand, grouped, rows8>;
    using Sum = typename Operand::Sum;
    extern __shared__ __align__(128) char stages[];
    __shared__ uint64_t full[T::stages], empty[T::stages];
    const Product<Operand>& p = kernel.product;
    const int begin = int(int64_t(p.units_k) * blockIdx.z / gridDim.z);
    const int end = int(int64_t(p.units_k) * (blockIdx.z + 1) / gridDim.z);
    const int row0 = blockIdx.x * T::rows, strip0 = blockIdx.y * sm90_warps;
    const ShareSm90<T> share{stages, full, empty, row0, strip0, begin, end - begin};
    if (threadIdx.x == 0) {
        for (int i = 0; i < T::stages; ++i) barrier_init(&full[i], 1), barrier_init(&empty[i], sm90_warps);
        barriers_ready();
    }
    block_barrier();

    Sum total[rows8][4] = {};
    if (threadIdx.x / warp_size == sm90_warps)
        bring<T, grouped>(p, share);
    else
        multiply_units<T, grouped>(p, share, total);
    leave<rows8>(kernel.out, total, reinterpret_cast<Sum*>(stages), row0, strip0 * unit_n);
}

}  // namespace llmfp4::cuda
