#include "gemm_fixed.h"
#include "gemm_grouped.h"
#include "kernels.h"
#include "peak.h"

namespace llmfp4::cpu {

void w4a4_avx512vnni(const Weights& w, const Activation& a, const Call& call) { avx512vnni::w4a4(w, a, call); }
void w4a8_grouped_avx512vnni(const Weights& w, const Activation& a, const Call& call) {
    avx512vnni::w4a8_grouped(w, a, call);
}
void w4a16_avx512vnni(const Weights& w, const float* x_factor, const Call& call) {
    (avx512vnni::takes_fixed(w, call) ? avx512vnni::w4a16_fixed : avx512vnni::w4a16)(w, x_factor, call);
}
double peak_avx512vnni(Unit unit, double seconds) { return avx512vnni::peak(unit, seconds); }

}  // namespace llmfp4::cpu
