#include "gemm_grouped.h"
#include "kernels.h"
#include "peak.h"

namespace llmfp4::cpu {

void w4a4_neon(const Weights& w, const Activation& a, const Call& call) { neon::w4a4(w, a, call); }
void w4a8_grouped_neon(const Weights& w, const Activation& a, const Call& call) { neon::w4a8_grouped(w, a, call); }
void w4a16_neon(const Weights& w, const float* x_factor, const Call& call) { neon::w4a16(w, x_factor, call); }
double peak_neon(Unit unit, double seconds) { return neon::peak(unit, seconds); }

}  // namespace llmfp4::cpu
