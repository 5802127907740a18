// Operations per second of the instructions that multiply, on operands in registers: the ceiling a kernel is held
// against.
#pragma once
#include <chrono>

#include "problem.h"
#include "simd.h"

namespace llmfp4::cpu::LLMFP4_ISA {

// Calls step(), of `operations` each, for about `seconds`; the best rate of stretches of 10000 calls.
template <class F>
inline double best_rate(double seconds, double operations, F&& step) {
    using clock = std::chrono::steady_clock;
    const auto elapsed = [](clock::time_point from) {
        return std::chrono::duration<double>(clock::now() - from).count();
    };
    constexpr int stretch = 10000;
    double best = 0;
    for (const auto started = clock::now(); elapsed(started) < seconds;) {
        const auto before = clock::now();
        for (int i = 0; i < stretch; ++i) step();
        const double rate = stretch * operations / elapsed(before);
        best = rate > best ? rate : best;
    }
    return best;
}

// As many independent sums as a panel's block has. Each meets another x at each step: with the same ones the compiler
// multiplies once for all. What the sums hold in the end is stored, so that nothing is left out.
inline double peak_integer(double seconds) {
    constexpr int sums = panel_rows * panel_tiles, steps = 64;
    uint8_t bytes[tile_bytes] = {3};
    int8_t x[4 * (steps + sums)] = {1, 2, 3};
    int32_t out[sums * tile_n];
    const Bytes w = load_bytes(bytes);
    I32 acc[sums];
    each<sums>([&](int i) { acc[i] = i32_all(i); });
    int step = 0;
    const double rate = best_rate(seconds, sums * 2.0 * tile_n * 4, [&] {
        step = (step + 1) % steps;
        each<sums>([&](int i) { acc[i] = dot4(acc[i], w, x + 4 * (step + i)); });
    });
    each<sums>([&](int i) { store(out + i * tile_n, acc[i]); });
    volatile int32_t kept = out[step];
    (void)kept;
    return rate;
}

inline double peak_float(double seconds) {
    constexpr int sums = float_rows * float_tiles, steps = 64;
    float x[steps + sums] = {0.5f}, out[sums * tile_n], ones[tile_n] = {1.0f};
    const F32 w = load(ones);
    F32 acc[sums];
    each<sums>([&](int i) { acc[i] = f32_zero(); });
    int step = 0;
    const double rate = best_rate(seconds, sums * 2.0 * tile_n, [&] {
        step = (step + 1) % steps;
        each<sums>([&](int i) { acc[i] = fma(acc[i], w, x + step + i); });
    });
    each<sums>([&](int i) { store(out + i * tile_n, acc[i]); });
    volatile float kept = out[step];
    (void)kept;
    return rate;
}

inline double peak(Unit unit, double seconds) {
    if (unit == Unit::int8) return peak_integer(seconds);
    return unit == Unit::fp32 ? peak_float(seconds) : 0.0;
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
