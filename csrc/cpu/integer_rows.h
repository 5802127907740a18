// All rows of a call as int8 operands.
#pragma once
#include <utility>

#include "parallel.h"
#include "quantize.h"
#include "workspace.h"

namespace llmfp4::cpu::LLMFP4_ISA {

// Quantized activations: `rows` int8 rows of stride ld, plane p of row m at row p·m_count + m.
struct IntegerRows {
    int8_t* at;
    size_t ld;
    int32_t* sums;  // Σ_k of each row
    float* scale;   // of each x row: what one unit of its sums is worth; NaN for a row with NaN or Inf
    int m, planes;

    int rows() const { return m * planes; }
    const int8_t* row(int r) const { return at + r * ld; }
};

// Strides that are a multiple of 128 bytes would put every row into few cache sets.
inline size_t spread_stride(size_t bytes) { return bytes / 64 % 2 == 0 ? bytes + 64 : bytes; }

// Memory for the sums and scales of all rows, and for `bytes` of them or more.
inline IntegerRows integer_rows(const Activation& a, const Call& call, size_t bytes) {
    IntegerRows x;
    x.m = call.m;
    x.planes = planes_of(a);
    bytes = round_up(bytes, 64);
    const size_t numbers = x.rows() * sizeof(int32_t) + x.m * sizeof(float);
    char* memory = static_cast<char*>(workspace(slot_rows, bytes + numbers));
    x.at = reinterpret_cast<int8_t*>(memory);
    x.sums = reinterpret_cast<int32_t*>(memory + bytes);
    x.scale = reinterpret_cast<float*>(x.sums + x.rows());
    return x;
}

// place(m) is called for each row before it is quantized and returns the memory of its planes; placed(m) afterwards.
template <class Place, class Placed>
inline void quantize_rows(const Weights& w, const Activation& a, const Call& call, const IntegerRows& x,
                          const Place& place, const Placed& placed) {
    const int padded_k = int(w.at.padded_k());
    const int effort = a.dynamic && a.group_size ? 2 : 1;
    const int threads = threads_to_convert(effort * long(call.m) * padded_k, call.threads);
    with_dtype(call.dtype, [&](auto type) {
        const auto* source = static_cast<const decltype(type)*>(call.x);
        parallel_ranges(threads, call.m, [&](long begin, long end) {
            for (int m = int(begin); m < int(end); ++m) {
                int32_t sums[2] = {};
                const auto [low, high] = place(m);
                const auto* row = source + m * call.ldx;
                if (a.dynamic) {
                    auto* values =
                        static_cast<float*>(workspace(slot_panel, dynamic_floats(a, padded_k) * sizeof(float)));
                    x.scale[m] = quantize_dynamic_row(row, w.at.k, padded_k, a, values, low, sums) * a.unit;
                } else {
                    const bool finite = x.planes == 2 ? quantize_row<2>(row, w.at.k, padded_k, a, low, high, sums)
                                                      : quantize_row<1>(row, w.at.k, padded_k, a, low, high, sums);
                    x.scale[m] = finite ? a.x_scale * a.unit : __builtin_nanf("");
                }
                placed(m);
                x.sums[m] = sums[0];
                if (x.planes == 2) x.sums[x.m + m] = sums[1];
            }
        });
    });
}

inline IntegerRows quantize_rows(const Weights& w, const Activation& a, const Call& call) {
    const size_t ld = spread_stride(w.at.padded_k());
    IntegerRows x = integer_rows(a, call, size_t(call.m) * planes_of(a) * ld);
    x.ld = ld;
    const auto place = [&](int m) { return std::make_pair(x.at + m * ld, x.at + (x.m + m) * ld); };
    quantize_rows(w, a, call, x, place, [](int) {});
    return x;
}

}  // namespace llmfp4::cpu::LLMFP4_ISA
