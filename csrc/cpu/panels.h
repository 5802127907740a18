// How products of many rows are cut: tasks of rows times tiles, panels of decoded weights, the rows at work.
#pragma once
#include <type_traits>

#include "parallel.h"
#include "problem.h"
#include "simd.h"
#include "workspace.h"

namespace llmfp4::cpu::LLMFP4_ISA {

// 64 outputs x 512 inputs: 32 KiB, about the first-level cache. Rows of up to 640 are not worth a second panel and its
// rounds of sums (576 x 576, m = 512: 1.03 times as long).
constexpr int panel_k = 512, most_panel_k = 640;
constexpr int rows_per_task = 192;

// Calls f with the largest compile-time size ≤ Max that fits `left`.
template <int Max, class F>
inline int with_block(int left, F&& f) {
    if constexpr (Max == 1) {
        f(std::integral_constant<int, 1>{});
        return 1;
    } else {
        if (left < Max) return with_block<Max - 1>(left, f);
        f(std::integral_constant<int, Max>{});
        return Max;
    }
}

inline int outputs_from(const Weights& w, int tile, int tiles) {
    const int left = w.at.n - tile * tile_n;
    return left < tiles * tile_n ? left : tiles * tile_n;
}

// f(count), a constant for those of a whole panel.
template <class F>
inline void with_count(int count, F&& f) {
    constexpr int whole = panel_tiles * tile_n;
    if (count == whole)
        f(std::integral_constant<int, whole>{});
    else
        f(count);
}

// Reads what is written next: rows m0.. of a panel of `tiles` tiles and of the panel beside it. Stores to lines that no
// cache holds keep everything behind them waiting (m = 512, y in memory: 1.3-1.5 times as long; 1.1-1.4 without the
// panel beside, which comes much later). Always inlined: gcc 12 takes calls of what only prefetches for useless.
LLMFP4_INLINE void prefetch_outputs(const Weights& w, const Call& call, int m0, int rows, int tile, int tiles) {
    const size_t size = call.dtype == Dtype::f32 ? 4 : 2;
    const int n0 = tile * tile_n, left = w.at.n - n0, count = left < 2 * tiles * tile_n ? left : 2 * tiles * tile_n;
    for (int m = m0; m < m0 + rows && m < call.m; ++m) {
        const char* y = static_cast<const char*>(call.y) + (size_t(m) * w.at.n + n0) * size;
        for (size_t b = 0; b < count * size; b += 64) __builtin_prefetch(y + b, 1, 2);
    }
}

// Inputs of a panel, a multiple of `unit`: all panels are about as long, for while the last is multiplied the outputs
// must arrive.
inline int inputs_of_panel(const Weights& w, int unit) {
    const int total = int(w.at.padded_k()), panels = total <= most_panel_k ? 1 : (total + panel_k - 1) / panel_k;
    const int inputs = int(round_up((total + panels - 1) / panels, unit));
    return inputs > most_panel_k && inputs > unit ? inputs - unit : inputs;
}

// The sums of a task [planes][rows][panel_tiles · 16]: of all its rows, or of those at work where one panel takes all
// inputs.
template <class T>
struct TaskSums {
    static constexpr size_t ld = panel_tiles * tile_n;
    bool at_once;
    int rows;
    T* at;

    TaskSums(bool at_once, int planes, int m)
        : at_once(at_once),
          rows(at_once ? panel_rows : m),
          at(static_cast<T*>(workspace(slot_accumulators, planes * rows * ld * sizeof(T)))) {}
    T* row(int r, int plane = 0) const { return at + (plane * rows + (at_once ? 0 : r)) * ld; }
    size_t plane_stride() const { return rows * ld; }
};

// Rows of a block at most: their operands and sums stay in the second-level cache.
inline int most_rows(const Weights& w) {
    constexpr int cached_bytes = 1 << 19;
    return w.at.padded_k() > most_panel_k ? rows_per_task : cached_bytes / int(w.at.padded_k());
}

// Rows of a block, `most` at most. More blocks, as many for each thread, where that makes the longest share of
// blocks times panels shorter: one takes as long as its rows and some 10 more, in which it decodes the panel.
inline int share_rows(int threads, int m, int panels, int most) {
    constexpr int decode_rows = 10;
    const auto length = [&](int blocks) {
        return (long(blocks) * panels + threads - 1) / threads * ((m + blocks - 1) / blocks + decode_rows);
    };
    const int fewest = (m + most - 1) / most, even = int(round_up(fewest, threads));
    const int blocks = length(even) < length(fewest) ? even : fewest;
    return int(round_up((m + blocks - 1) / blocks, panel_rows));
}

// task(m0, rows, tile, tiles) for blocks of at most `rows` rows and `width` tiles; those of the same rows follow each
// other.
template <class F>
inline void for_panels(int threads, int m, int rows, int tiles, int width, F&& task) {
    const long blocks_m = (m + rows - 1) / rows, blocks_n = (tiles + width - 1) / width;
    parallel_ranges(threads, blocks_m * blocks_n, [&](long begin, long end) {
        for (long i = begin; i < end; ++i) {
            const int m0 = int(i / blocks_n) * rows, tile = int(i % blocks_n) * width;
            task(m0, m - m0 < rows ? m - m0 : rows, tile, tiles - tile < width ? tiles - tile : width);
        }
    });
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
