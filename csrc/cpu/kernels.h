// The table of CPU kernels, best first, and which of them this CPU can run.
#pragma once
#include "problem.h"

namespace llmfp4::cpu {

void w4a4_scalar(const Weights&, const Activation&, const Call&);
void w4a8_grouped_scalar(const Weights&, const Activation&, const Call&);
void w4a16_scalar(const Weights&, const float* x_factor, const Call&);
double peak_scalar(Unit, double seconds);
#if LLMFP4_ARM
void w4a4_neon(const Weights&, const Activation&, const Call&);
void w4a8_grouped_neon(const Weights&, const Activation&, const Call&);
void w4a16_neon(const Weights&, const float* x_factor, const Call&);
double peak_neon(Unit, double seconds);
#endif
#if LLMFP4_X86
void w4a4_avx2(const Weights&, const Activation&, const Call&);
void w4a8_grouped_avx2(const Weights&, const Activation&, const Call&);
void w4a16_avx2(const Weights&, const float* x_factor, const Call&);
double peak_avx2(Unit, double seconds);
void w4a4_avx512vnni(const Weights&, const Activation&, const Call&);
void w4a8_grouped_avx512vnni(const Weights&, const Activation&, const Call&);
void w4a16_avx512vnni(const Weights&, const float* x_factor, const Call&);
double peak_avx512vnni(Unit, double seconds);
void w4a4_amx(const Weights&, const Activation&, const Call&);
void w4a8_grouped_amx(const Weights&, const Activation&, const Call&);
void w4a16_amx(const Weights&, const float* x_factor, const Call&);
double peak_amx(Unit, double seconds);
#endif

struct KernelTable {
    const Kernels* rows;
    int count;
};
KernelTable kernels();

}  // namespace llmfp4::cpu
