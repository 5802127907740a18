// What the translated kernels and the machine's parts call.
#pragma once
#include "state.h"

namespace ptx {
// schedule.cpp
[[noreturn]] void fail(Thread& T, const char* kind, const char* format, ...) __attribute__((format(printf, 3, 4)));
std::string describe(u32 site);
void yield(Thread& T);
void wait(Thread& T, const char* what);
void wake(Thread* t);
void step_back(Thread& T);  // called on every backward branch
u64 random_number();

// shared.cpp
const char* verb(Access access);
std::string who(u32 thread, u32 site);
bool ordered(Thread& T, u32 thread, u32 clock);  // a span of a thread of this block before T
void check_shared(Thread& T, u32 address, u32 bytes, Access access, u32 align);
u8* shared(Thread& T, u32 address, u32 bytes, Access access);
u64 generic_of_shared(u64 address);
u64 shared_of_generic(Thread& T, u64 address);
void mark_written(u32 address, u32 bytes, u32 clock, u16 thread, u32 site);

// memory.cpp
u8* global(Thread& T, u64 address, u32 bytes, Access access, u32 align);
u8* generic(Thread& T, u64 address, u32 bytes, Access access);
u8* local(Thread& T, u64 address, u32 bytes);
u8* param(Thread& T, u64 address, u32 bytes);
void release(Thread& T, u64 address, bool fence_first);
void acquire(Thread& T, u64 address, bool fence_after);
void fence(Thread& T);
void proxy_fence(Thread& T);
void wait_for_grid(Thread& T);
void begin_launch_memory();
size_t unwritten_bytes(size_t allocation);

// barriers.cpp
void bar_sync(Thread& T, u32 id, u32 count, bool aligned);
void bar_arrive(Thread& T, u32 id, u32 count);
enum Reduction { POPC, AND, OR };
u32 bar_red(Thread& T, u32 id, u32 count, bool p, Reduction op);
void check_barriers_at_exit(Thread& T);
void check_converged(Thread& T);  // no lane of the warp waits at a barrier
enum CollectiveKind { SYNCWARP, SHFL, VOTE, REDUX, ELECT, MATCH, LDMATRIX, STMATRIX, MMA };
bool collective_last(Thread& T, int kind, u32 mask, void* arg, Collective& done);
void collective_done(Thread& T, u32 mask);
template <class F>
void collective(Thread& T, int kind, u32 mask, void* arg, F&& act) {
    Collective all;
    if (!collective_last(T, kind, mask, arg, all)) return;
    act(all.arg);
    collective_done(T, mask);
}
void syncwarp(Thread& T, u32 mask);
enum ShuffleMode { UP, DOWN, BFLY, IDX };
u32 shfl(Thread& T, ShuffleMode mode, u32 value, u32 b, u32 c, u32 mask, bool* in_range);
enum VoteMode { BALLOT, ALL, ANY, UNI };
u32 vote(Thread& T, VoteMode mode, bool p, u32 mask);
enum ReduxOp { RX_ADD, RX_MINU, RX_MAXU, RX_MINS, RX_MAXS, RX_AND, RX_OR, RX_XOR };
u32 redux(Thread& T, ReduxOp op, u32 value, u32 mask);
u32 elect(Thread& T, u32 mask, bool* elected);
void publish(Thread& T, Clock& clock);  // the thread's past joins a barrier's clock

// copies.cpp
void cp_async(Thread& T, u32 dst, u64 src, u32 bytes, u32 src_bytes);
void cp_commit(Thread& T);
void cp_wait(Thread& T, u32 groups_left);
void mbarrier_init(Thread& T, u32 address, u32 count);
void mbarrier_inval(Thread& T, u32 address);
u64 mbarrier_arrive(Thread& T, u32 address, u32 count, s64 expected_bytes, bool arrives);
bool mbarrier_wait(Thread& T, u32 address, u32 parity, bool blocking);
void tma_load(Thread& T, u32 dst, u64 map, u32 mbarrier, int rank, const s32* at);
void bulk_load(Thread& T, u32 dst, u64 src, u32 bytes, u32 mbarrier);
void run_tma();
u32 swizzled(u32 address, u32 mode);

// matrices.cpp, wgmma.cpp
enum Type { BF16, F16, S8, U8, E4M3, E5M2, S4, U4, TF32, E2M1, UE8M0, UE4M3 };
void ldmatrix(Thread& T, int matrices, bool transposed, u32 address, u32* out);
void stmatrix(Thread& T, int matrices, bool transposed, u32 address, const u32* in);
void mma(Thread& T, int k, Type a_type, Type b_type, Type d_type, bool integer, bool saturate, bool in_14_bits, u32* d,
         const u32* a, const u32* b, const u32* c);
struct BlockScales {  // of one operand: the word of lane 4 g + thread (of A: + 1 for row g + 8), from this byte on
    u32 word, byte, thread;
};
void mma_scaled(Thread& T, int blocks, Type scale_type, u32* d, const u32* a, const u32* b, const u32* c,
                BlockScales scale_a, BlockScales scale_b);
void wgmma(Thread& T, int n, int k, Type type_a, Type type_b, bool integer, u32** d, const u32* a, u64 desc_a,
           u64 desc_b, bool accumulate, int sign_a, int sign_b, int major_a, int major_b);
void wgmma_commit(Thread& T);
void wgmma_wait(Thread& T, u32 groups_left);
}  // namespace ptx
