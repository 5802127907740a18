#include "kernels.h"

namespace llmfp4::cpu {
namespace {

bool always() { return true; }

#if LLMFP4_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512vnni() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
#endif

const Kernels table[] = {
#if LLMFP4_X86
    {"avx512vnni", "avx512f avx512bw avx512vl avx512dq avx512_vnni", has_avx512vnni, 1, 1, w4a4_avx512vnni, w4a16_avx512vnni},
    {"avx2", "avx2 fma", has_avx2, 1, 1, w4a4_avx2, w4a16_avx2},
#endif
    {"scalar", "", always, 1, 1, w4a4_scalar, w4a16_scalar},
};

}  // namespace

KernelTable kernels() { return {table, int(sizeof table / sizeof table[0])}; }

}  // namespace llmfp4::cpu
