#include "gemm_grouped.h"
#include "kernels.h"
#include "peak.h"

namespace llmfp4::cpu {

void w4a4_avx2(const Weights& w, const Activation& a, const Call& call) { avx2::w4a4(w, a, call); }
void w4a8_grouped_avx2(const Weights& w, const Activation& a, const Call& call) { avx2::w4a8_grouped(w, a, call); }
void w4a16_avx2(const Weights& w, const float* x_factor, const Call& call) { avx2::w4a16(w, x_factor, call); }
double peak_avx2(Unit unit, double seconds) { return avx2::peak(unit, seconds); }

}  // namespace llmfp4::cpu
