// The words that only sm_90a has: barriers that count bytes, bulk copies, products of a warpgroup.
#pragma once
#include "device.h"

namespace llmfp4::cuda {

// ---- barriers in shared memory: a phase ends when `arrivals` threads have arrived and all expected bytes are there

__device__ inline void barrier_init(uint64_t* barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Copies see the barriers that this thread has initialised; other threads after a block barrier.
__device__ inline void barriers_ready() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ inline void arrive_expecting(uint64_t* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Returns when the phase of this parity has ended.
__device__ inline void wait_for_phase(uint64_t* barrier, unsigned parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
            shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// `bytes` from global to shared memory, all multiples of 16; arrive at `barrier` as bytes.
__device__ inline void copy_bulk(void* to, const void* from, unsigned bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

__device__ inline void warp_barrier() { __syncwarp(); }

// ---- products of a warpgroup: D[64 x n] += A[64 x k] · B[k x n]. A lies in registers: a warp holds 16 of the 64 rows
// as it does for mma.sync. B lies in shared memory as blocks of 8 columns by 16 bytes of k, 128 bytes each. D[j] of a
// warp are its columns 8·j .. 8·j + 7, as mma.sync holds them.

// Blocks next to each other along k are 128 bytes apart, along the columns `column_stride`.
__device__ inline uint64_t blocks_at(const void* from, unsigned column_stride) {
    return uint64_t(shared_address(from) >> 4) | uint64_t(128 >> 4) << 16 | uint64_t(column_stride >> 4) << 32;
}
// The same blocks, so many bytes further.
__device__ inline uint64_t blocks_after(uint64_t blocks, unsigned bytes) { return blocks + (bytes >> 4); }

// Registers of products that follow are as the threads have written them.
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ inline void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Nothing that uses the value is moved before this.
__device__ inline void settle(int32_t& v) { asm volatile("" : "+r"(v)::"memory"); }
__device__ inline void settle(uint32_t& v) { asm volatile("" : "+r"(v)::"memory"); }
__device__ inline void settle(float& v) { asm volatile("" : "+f"(v)::"memory"); }

// The first threads of a block, whole warps, while the others do something else.
template <int count>
struct FirstThreads {
    __device__ static int threads() { return count; }
    // What is computed of it is so anew each time, not held in registers beside the sums of products.
    __device__ static int thread() {
        int thread = threadIdx.x;
        settle(thread);
        return thread;
    }
    __device__ static void barrier() { asm volatile("bar.sync 1, %0;" ::"n"(count) : "memory"); }
};

struct S8 {};
struct E4M3 {};

// So many columns.
template <int n>
struct Columns {};

#define LLMFP4_WORD(v) "+r"(v)
#define LLMFP4_FLOAT(v) "+f"(v)
#define LLMFP4_D1(C, i) C(d[i][0]), C(d[i][1]), C(d[i][2]), C(d[i][3])
#define LLMFP4_D2(C, i) LLMFP4_D1(C, i), LLMFP4_D1(C, i + 1)
#define LLMFP4_D4(C, i) LLMFP4_D2(C, i), LLMFP4_D2(C, i + 2)
#define LLMFP4_SUMS8(C) LLMFP4_D1(C, 0)
#define LLMFP4_SUMS16(C) LLMFP4_SUMS8(C), LLMFP4_D1(C, 1)
#define LLMFP4_SUMS24(C) LLMFP4_SUMS16(C), LLMFP4_D1(C, 2)
#define LLMFP4_SUMS32(C) LLMFP4_SUMS24(C), LLMFP4_D1(C, 3)
#define LLMFP4_SUMS40(C) LLMFP4_SUMS32(C), LLMFP4_D1(C, 4)
#define LLMFP4_SUMS48(C) LLMFP4_SUMS40(C), LLMFP4_D1(C, 5)
#define LLMFP4_SUMS56(C) LLMFP4_SUMS48(C), LLMFP4_D1(C, 6)
#define LLMFP4_SUMS64(C) LLMFP4_SUMS56(C), LLMFP4_D1(C, 7)
#define LLMFP4_SUMS80(C) LLMFP4_SUMS64(C), LLMFP4_D2(C, 8)
#define LLMFP4_SUMS96(C) LLMFP4_SUMS80(C), LLMFP4_D2(C, 10)
#define LLMFP4_SUMS112(C) LLMFP4_SUMS96(C), LLMFP4_D2(C, 12)
#define LLMFP4_SUMS128(C) LLMFP4_SUMS112(C), LLMFP4_D2(C, 14)
#define LLMFP4_SUMS160(C) LLMFP4_SUMS128(C), LLMFP4_D4(C, 16)
#define LLMFP4_SUMS192(C) LLMFP4_SUMS160(C), LLMFP4_D4(C, 20)
#define LLMFP4_SUMS224(C) LLMFP4_SUMS192(C), LLMFP4_D4(C, 24)
#define LLMFP4_SUMS256(C) LLMFP4_SUMS224(C), LLMFP4_D4(C, 28)
#define LLMFP4_NAMES8 "%0,%1,%2,%3"
#define LLMFP4_NAMES16 LLMFP4_NAMES8 ",%4,%5,%6,%7"
#define LLMFP4_NAMES24 LLMFP4_NAMES16 ",%8,%9,%10,%11"
#define LLMFP4_NAMES32 LLMFP4_NAMES24 ",%12,%13,%14,%15"
#define LLMFP4_NAMES40 LLMFP4_NAMES32 ",%16,%17,%18,%19"
#define LLMFP4_NAMES48 LLMFP4_NAMES40 ",%20,%21,%22,%23"
#define LLMFP4_NAMES56 LLMFP4_NAMES48 ",%24,%25,%26,%27"
#define LLMFP4_NAMES64 LLMFP4_NAMES56 ",%28,%29,%30,%31"
#define LLMFP4_NAMES80 LLMFP4_NAMES64 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define LLMFP4_NAMES96 LLMFP4_NAMES80 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define LLMFP4_NAMES112 LLMFP4_NAMES96 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define LLMFP4_NAMES128 LLMFP4_NAMES112 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define LLMFP4_NAMES160 LLMFP4_NAMES128 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define LLMFP4_NAMES192 LLMFP4_NAMES160 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define LLMFP4_NAMES224 LLMFP4_NAMES192 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define LLMFP4_NAMES256 \
    LLMFP4_NAMES224 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define LLMFP4_AB8 "{%4,%5,%6,%7}, %8"
#define LLMFP4_AB16 "{%8,%9,%10,%11}, %12"
#define LLMFP4_AB24 "{%12,%13,%14,%15}, %16"
#define LLMFP4_AB32 "{%16,%17,%18,%19}, %20"
#define LLMFP4_AB40 "{%20,%21,%22,%23}, %24"
#define LLMFP4_AB48 "{%24,%25,%26,%27}, %28"
#define LLMFP4_AB56 "{%28,%29,%30,%31}, %32"
#define LLMFP4_AB64 "{%32,%33,%34,%35}, %36"
#define LLMFP4_AB80 "{%40,%41,%42,%43}, %44"
#define LLMFP4_AB96 "{%48,%49,%50,%51}, %52"
#define LLMFP4_AB112 "{%56,%57,%58,%59}, %60"
#define LLMFP4_AB128 "{%64,%65,%66,%67}, %68"
#define LLMFP4_AB160 "{%80,%81,%82,%83}, %84"
#define LLMFP4_AB192 "{%96,%97,%98,%99}, %100"
#define LLMFP4_AB224 "{%112,%113,%114,%115}, %116"
#define LLMFP4_AB256 "{%128,%129,%130,%131}, %132"
#define LLMFP4_WGMMA(Type, Sum, C, n, shape, types, after)                                                    \
    __device__ inline void multiply_add(Type, Columns<n>, Sum(*d)[4], const uint32_t (&a)[4], uint64_t b) {   \
        asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #n shape \
                     "." types " {" LLMFP4_NAMES##n "}, " LLMFP4_AB##n ", add" after ";\n}"                   \
                     : LLMFP4_SUMS##n(C)                                                                      \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                   \
    }
#define LLMFP4_WGMMAS_OF_ANY_TYPE(Type, Sum, C, shape, types, after) \
    LLMFP4_WGMMA(Type, Sum, C, 8, shape, types, after)               \
    LLMFP4_WGMMA(Type, Sum, C, 16, shape, types, after)              \
    LLMFP4_WGMMA(Type, Sum, C, 24, shape, types, after)              \
    LLMFP4_WGMMA(Type, Sum, C, 32, shape, types, after)              \
    LLMFP4_WGMMA(Type, Sum, C, 48, shape, types, after)              \
    LLMFP4_WGMMA(Type, Sum, C, 64, shape, types, after)              \
    LLMFP4_WGMMA(Type, Sum, C, 80, shape, types, after)              \
    LLMFP4_WGMMA(Type, Sum, C, 96, shape, types, after)              \
    LLMFP4_WGMMA(Type, Sum, C, 112, shape, types, after)             \
    LLMFP4_WGMMA(Type, Sum, C, 128, shape, types, after)             \
    LLMFP4_WGMMA(Type, Sum, C, 160, shape, types, after)             \
    LLMFP4_WGMMA(Type, Sum, C, 192, shape, types, after)             \
    LLMFP4_WGMMA(Type, Sum, C, 224, shape, types, after)             \
    LLMFP4_WGMMA(Type, Sum, C, 256, shape, types, after)
// Those of integers have no 40 and no 56 columns.
#define LLMFP4_WGMMAS(Type, Sum, C, shape, types, after)         \
    LLMFP4_WGMMAS_OF_ANY_TYPE(Type, Sum, C, shape, types, after) \
    LLMFP4_WGMMA(Type, Sum, C, 40, shape, types, after)          \
    LLMFP4_WGMMA(Type, Sum, C, 56, shape, types, after)

LLMFP4_WGMMAS_OF_ANY_TYPE(S8, int32_t, LLMFP4_WORD, "k32", "s32.s8.s8", "")
LLMFP4_WGMMAS(E4M3, float, LLMFP4_FLOAT, "k32", "f32.e4m3.e4m3", ", 1, 1")
LLMFP4_WGMMAS(F16, float, LLMFP4_FLOAT, "k16", "f32.f16.f16", ", 1, 1, 0")
LLMFP4_WGMMAS(Bf16, float, LLMFP4_FLOAT, "k16", "f32.bf16.bf16", ", 1, 1, 0")

}  // namespace llmfp4::cuda
