// A weight that the CPU kernels can multiply.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "bindings.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace llmfp4 {

// One weight and what its activations look like, ready to multiply. Holds addresses, not tensors.
class Linear {
public:
    Linear(int n, int k, ElementFields element, uintptr_t codes, uintptr_t row_scale, uintptr_t bias,
           const std::string& scale, uintptr_t group_scale, int group_size, uintptr_t shift, uintptr_t x_factor)
        : w_{{n, k},
             element_of(element),
             pointer<uint8_t>(codes),
             pointer<float>(row_scale),
             pointer<float>(bias),
             scale_kind_of(scale),
             pointer<uint8_t>(group_scale),
             group_size,
             group_size ? (k + group_size - 1) / group_size : 0,
             false,
             false},
          shift_(pointer<uint8_t>(shift)),
          factor_(w_.at.padded_k(), 0.0f) {
        const float* of_input = pointer<float>(x_factor);
        for (int i = 0; i < k; ++i)
            factor_[i] = std::ldexp(of_input ? of_input[i] : 1.0f, shift_ ? -int(shift_[i]) : 0);
        w_.smoothed = std::any_of(factor_.begin(), factor_.end(), [](float f) {
            int exponent;
            return f != 0.0f && std::frexp(f, &exponent) != 0.5f;
        });
        w_.foldable = !w_.smoothed && std::all_of(factor_.begin(), factor_.end(),
                                                  [](float f) { return f == 0.0f || (f >= 0x1p-15f && f <= 1.0f); });
    }

    bool smoothed() const { return w_.smoothed; }

    // Activations become codes of `element` at the static scale `x_scale`: W4A4.
    void quantize_activations(ElementFields element, float x_scale) {
        const Element e = element_of(element);
        const int top = shift_ ? e.max_shift() : 0;
        inverse_.assign(w_.at.padded_k(), 0.0f);
        for (int i = 0; i < w_.at.k; ++i) {
            const int shift = shift_ ? shift_[i] : 0;
            inverse_[i] = std::ldexp(1.0f / x_scale, shift);
            factor_[i] = std::ldexp(float(e.integer_scale()), top - shift);
        }
        const float unit = std::ldexp(1.0f / float(e.integer_scale() * w_.element.integer_scale()), -top);
        a_ = {e, inverse_.data(), factor_.data(), unit, x_scale, shift_ != nullptr, false, 0};
    }

    // Activations become codes of `element` at scales of their own: one per token, and one integer per group of
    // `group_size` inputs if that is not 0.
    void quantize_dynamically(ElementFields element, int group_size) {
        const Element e = element_of(element);
        if (shift_) throw pybind11::value_error("dynamic activations take no shift");
        if (group_size < 0 || group_size > cpu::dynamic_group_limit)
            throw pybind11::value_error("groups of dynamic activations hold at most 256 inputs");
        inverse_ = factor_;
        const float unit = 1.0f / float(e.integer_scale() * w_.element.integer_scale());
        a_ = {e, inverse_.data(), factor_.data(), unit, 0.0f, false, true, group_size};
    }

    const TileLayout& at() const { return w_.at; }

    void run(const cpu::Kernels& kernel, cpu::Call call) const {
        call.threads = useful_threads(call);
        cpu::with_team(call.threads, [&] {
            if (inverse_.empty())
                kernel.w4a16(w_, factor_.data(), call);
            else
                (w_.groups ? kernel.w4a8_grouped : kernel.w4a4)(w_, a_, call);
        });
    }

private:
    // No more threads than have something to do once they are awake. A core reads 20 bytes and multiplies 250 integers
    // or 75 floats in a nanosecond.
    int useful_threads(const cpu::Call& call) const {
        const double weights = double(w_.at.n) * w_.at.k, rate = inverse_.empty() ? 75e3 : 250e3;
        const double alone = weights / 2 / 20e3 + call.m * weights / rate;  // microseconds
        return int(std::clamp(alone / cpu::wake_microseconds(), 1.0, double(call.threads)));
    }

    cpu::Weights w_;
    const uint8_t* shift_;
    std::vector<float> factor_, inverse_;
    cpu::Activation a_{};
};

}  // namespace llmfp4
