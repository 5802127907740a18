// The kernels of one instruction set, under its name: compiled once for each with its flags (CMakeLists.txt).
#include "gemm_grouped.h"
#include "kernels.h"
#include "peak.h"
#if LLMFP4_DIGITS
#include "gemm_fixed.h"
#endif

#define LLMFP4_JOIN(a, b) a##_##b
#define LLMFP4_NAME(function, isa) LLMFP4_JOIN(function, isa)
#define LLMFP4_NAMED(function) LLMFP4_NAME(function, LLMFP4_ISA)

namespace llmfp4::cpu {

void LLMFP4_NAMED(w4a4)(const Weights& w, const Activation& a, const Call& call) { LLMFP4_ISA::w4a4(w, a, call); }

void LLMFP4_NAMED(w4a8_grouped)(const Weights& w, const Activation& a, const Call& call) {
    LLMFP4_ISA::w4a8_grouped(w, a, call);
}

void LLMFP4_NAMED(w4a16)(const Weights& w, const float* x_factor, const Call& call) {
#if LLMFP4_DIGITS
    if (LLMFP4_ISA::takes_fixed(w, call)) return LLMFP4_ISA::w4a16_fixed(w, x_factor, call);
#endif
    LLMFP4_ISA::w4a16(w, x_factor, call);
}

double LLMFP4_NAMED(peak)(Unit unit, double seconds) { return LLMFP4_ISA::peak(unit, seconds); }

}  // namespace llmfp4::cpu
