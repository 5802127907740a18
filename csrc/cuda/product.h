// Host side of what all families launch: the Product of a weight and a call's operands.
#pragma once
#include "decode_grouped.h"
#include "decode_shift.h"
#include "epilogue.h"
#include "linear.h"

namespace llmfp4::cuda {

template <class T>
struct Type {
    using type = T;
};

inline int group_shift_of(const Weight& w) {
    int shift = 0;
    while (w.group_size >> shift > 16) ++shift;
    return shift;
}

template <class Operand>
Product<Operand> product_of(const Weight& w, const Activations& a, const Plan& plan, const Call& call,
                            typename Operand::Table table) {
    const UnitLayout at{w.n, w.k};
    const int k_bytes = int((plan.direct ? w.k : at.padded_k()) * Operand::x_bytes / unit_k);
    return {static_cast<const uint4*>(w.codes),
            plan.direct ? static_cast<const char*>(call.x) : call.workspace,
            size_t(k_bytes),
            plan.blocked_rows ? plan.blocked_rows : plan.rows,
            k_bytes,
            int(at.units_k()),
            int(at.strips()),
            table,
            static_cast<const ScalePair*>(w.group_scale),
            w.scale_kind,
            w.groups(),
            group_shift_of(w),
            a.shift};
}

// Calls launch(Operand{}, table, grouped) for activations that stay floats.
template <class F>
void with_halves(const Weight& w, const Activations& a, const Call& call, F&& launch) {
    const bool bf16 = a.half_is_bf16(call.dtype);
    const HalfTable table(w.element, bf16);
    auto of = [&](auto operand) {
        if (w.scale_kind == ScaleKind::none) return launch(operand, table, std::false_type{});
        launch(operand, table, std::true_type{});
    };
    bf16 ? of(Type<Halves<Bf16>>{}) : of(Type<Halves<F16>>{});
}

// Calls launch(Operand{}, table, grouped) for the operand that the activations become, unless that is packed codes.
template <class F>
void with_operand(const Weight& w, const Activations& a, const Plan& plan, const Call& call, F&& launch) {
    if (a.fp8()) throw std::invalid_argument("8-bit floats are multiplied by sm90 only");
    const Int8::Table integers(w.element);
    if (a.integer() && w.scale_kind != ScaleKind::none)
        return launch(Type<GroupedInt8>{}, GroupedInt8::Table{integers, group_shift_of(w)}, std::true_type{});
    if (a.integer() && plan.inputs == Inputs::plain)
        return launch(Type<ShiftedInt8>{}, ShiftedInt8::Table(w.element, a.top_shift()), std::false_type{});
    if (plan.inputs == Inputs::plain) return launch(Type<ShiftedBf16>{}, HalfTable(w.element, true), std::false_type{});
    if (a.integer()) return launch(Type<Int8>{}, integers, std::false_type{});
    with_halves(w, a, call, launch);
}

}  // namespace llmfp4::cuda
