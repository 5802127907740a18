// The table of CPU kernels, best first, and which of them this CPU can run.
#pragma once
#include "problem.h"

namespace llmfp4::cpu {

#define LLMFP4_DECLARE(isa)                                                  \
    void w4a4_##isa(const Weights&, const Activation&, const Call&);         \
    void w4a8_grouped_##isa(const Weights&, const Activation&, const Call&); \
    void w4a16_##isa(const Weights&, const float* x_factor, const Call&);    \
    double peak_##isa(Unit, double seconds)

LLMFP4_DECLARE(scalar);
#if LLMFP4_ARM
LLMFP4_DECLARE(neon);
#endif
#if LLMFP4_X86
LLMFP4_DECLARE(avx2);
LLMFP4_DECLARE(avx512vnni);
LLMFP4_DECLARE(avx512vbmi);
LLMFP4_DECLARE(amx);
#endif

struct KernelTable {
    const Kernels* rows;
    int count;
};
KernelTable kernels();

}  // namespace llmfp4::cpu
