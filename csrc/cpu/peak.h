// Operations per second of the instructions that multiply, on operands in registers: the ceiling a kernel is held
// against.
#pragma once
#include <chrono>

#include "problem.h"
#include "simd.h"

namespace llmfp4::cpu::LLMFP4_ISA {

// Calls step(), of `operations` each, for about `seconds`; the best rate of stretches of 1000 calls.
template <class F>
inline double best_rate(double seconds, double operations, F&& step) {
    using clock = std::chrono::steady_clock;
    const auto elapsed = [](clock::time_point from) {
        return std::chrono::duration<double>(clock::now() - from).count();
    };
    constexpr int stretch = 1000;
    double best = 0;
    for (const auto started = clock::now(); elapsed(started) < seconds;) {
        const auto before = clock::now();
        for (int i = 0; i < stretch; ++i) step();
        const double rate = stretch * operations / elapsed(before);
        best = rate > best ? rate : best;
    }
    return best;
}

constexpr int peak_steps = 64;

// As many independent sums as a panel's block has, in registers for peak_steps products each; the sums are stored, so
// that nothing is left out. x [rows][peak_steps][width]: with the same one at each step the compiler multiplies once.
template <int rows, int tiles, int width, class Number, class T, class Multiply>
inline void multiply_sums(Number* sums, const T* x, Multiply&& multiply) {
    decltype(load(sums)) acc[rows][tiles];
    each<rows, tiles>([&](int i, int t) { acc[i][t] = load(sums + (i * tiles + t) * tile_n); });
    int steps = peak_steps;
    asm volatile("" : "+r"(steps));
    for (int step = 0; step < steps; ++step)
        each<rows, tiles>([&](int i, int t) { acc[i][t] = multiply(acc[i][t], x + width * (i * peak_steps + step)); });
    each<rows, tiles>([&](int i, int t) { store(sums + (i * tiles + t) * tile_n, acc[i][t]); });
    asm volatile("" : : "r"(sums) : "memory");
}

inline double peak_integer(double seconds) {
    constexpr int rows = panel_rows, tiles = panel_tiles;
    uint8_t bytes[tile_bytes] = {3};
    int8_t x[4 * peak_steps * rows] = {1, 2, 3};
    int32_t sums[rows * tiles * tile_n] = {};
    const Bytes w = load_bytes(bytes);
    return best_rate(seconds, double(peak_steps) * rows * tiles * tile_n * 4 * 2, [&] {
        multiply_sums<rows, tiles, 4>(sums, x, [&](I32 sum, const int8_t* four) { return dot4(sum, w, four); });
    });
}

inline double peak_float(double seconds) {
    constexpr int rows = float_rows, tiles = float_tiles;
    float x[peak_steps * rows] = {0.5f}, ones[tile_n] = {1.0f}, sums[rows * tiles * tile_n] = {};
    const F32 w = load(ones);
    return best_rate(seconds, double(peak_steps) * rows * tiles * tile_n * 2, [&] {
        multiply_sums<rows, tiles, 1>(sums, x, [&](F32 sum, const float* one) { return fma(sum, w, one); });
    });
}

#if LLMFP4_BF16_PAIRS
inline double peak_bf16_pairs(double seconds) {
    if (!has_bf16_pairs()) return 0.0;
    constexpr int rows = float_rows, tiles = float_tiles;
    float sums[rows * tiles * tile_n] = {};
    const uint32_t pairs = 0x3f003f00;
    return best_rate(seconds, double(peak_steps) * rows * tiles * tile_n * 4, [&] {
        multiply_sums<rows, tiles, 0>(sums, &pairs, [](F32 sum, const uint32_t* x) { return dot2(sum, x); });
    });
}
#endif

inline double peak(Unit unit, double seconds) {
    if (unit == Unit::int8) return peak_integer(seconds);
    if (unit == Unit::fp32) return peak_float(seconds);
#if LLMFP4_BF16_PAIRS
    return peak_bf16_pairs(seconds);
#else
    return 0.0;
#endif
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
