#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#if LLMFP4_ARM
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

#include "kernels.h"

namespace llmfp4::cpu {
namespace {

bool always() { return true; }

#if LLMFP4_ARM
bool has_dot_product() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return true;  // every Apple processor of this kind has it
#endif
}
#endif

#if LLMFP4_X86
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512vnni() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
bool has_avx512vbmi() { return has_avx512vnni() && __builtin_cpu_supports("avx512vbmi"); }

// Linux hands out the 8 KiB of tile state only to processes that ask for it.
bool has_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int request_permission = 0x1023, tile_data = 18;
    uint32_t a = 7, b = 0, c = 0, d = 0;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    const bool bf16 = d >> 22 & 1, tile = d >> 24 & 1, int8 = d >> 25 & 1;
    return bf16 && tile && int8 && has_avx512vbmi() && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}
#endif

#define LLMFP4_FUNCTIONS(isa) w4a4_##isa, w4a8_grouped_##isa, w4a16_##isa, peak_##isa

const Kernels table[] = {
#if LLMFP4_ARM
    {"neon", "asimddp", has_dot_product, 1, 1, LLMFP4_FUNCTIONS(neon)},
#endif
#if LLMFP4_X86
    {"amx", "amx_tile amx_int8 amx_bf16 avx512vbmi avx512_vnni", has_amx, 9, 5, LLMFP4_FUNCTIONS(amx)},
    {"avx512vbmi", "avx512f avx512bw avx512vl avx512dq avx512vbmi avx512_vnni", has_avx512vbmi, 1, 1,
     LLMFP4_FUNCTIONS(avx512vbmi)},
    {"avx512vnni", "avx512f avx512bw avx512vl avx512dq avx512_vnni", has_avx512vnni, 1, 1,
     LLMFP4_FUNCTIONS(avx512vnni)},
    {"avx2", "avx2 fma f16c", has_avx2, 1, 1, LLMFP4_FUNCTIONS(avx2)},
#endif
    {"scalar", "", always, 1, 1, LLMFP4_FUNCTIONS(scalar)},
};

}  // namespace

KernelTable kernels() { return {table, int(sizeof table / sizeof table[0])}; }

}  // namespace llmfp4::cpu
