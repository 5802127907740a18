// One thread block of a CUDA grid on one CPU core. Every CUDA thread is a fiber; blocks of a grid run one after the
// other.
//
// Order between threads is kept in vector clocks, one entry per warp. A clock value names a span of a warp's life
// between two releases (barrier, arrival, fence). An access at clock c of warp w happened before a thread that has
// seen[w] >= c. Clocks go on from block to block, so that a mark older than `first_clock` belongs to an earlier block.
#pragma once
#include <cstdint>
#include <cstring>
#include <deque>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

constexpr u32 SHARED_BASE = 1024;  // address 0 stays invalid
constexpr u32 SHARED_LIMIT = 232448;
constexpr int MAX_WARPS = 32, TMA_AGENT = 32, CLOCKS = 33;

struct Clock {
    u32 t[CLOCKS];
    void join(const Clock& other) {
        for (int i = 0; i < CLOCKS; i++) t[i] = t[i] > other.t[i] ? t[i] : other.t[i];
    }
};

struct Site {  // one PTX instruction
    u32 ptx_line, source_line;
    const char* text;
};
struct Param {
    u32 offset, bytes;
};
struct Thread;
struct Variable {  // a .global or .const variable of the module
    const char* name;
    void* base;
    u64 bytes;
    bool constant;
};
struct Op {  // an instruction, and the places of its operands in the frame of a thread
    const Op* (*run)(Thread& T, u8* R, const Op* o);  // returns the next one, none at the end
    u32 site;
    u32 at[];
};
template <int operands>
inline const Op* next(const Op* o) {
    return (const Op*)((const u8*)o + (12 + 4 * operands + 7) / 8 * 8);
}
inline const Op* jump(const Op* o, int operand) { return (const Op*)((const u8*)o + s32(o->at[operand])); }
struct Kernel {
    const char* name;
    const Op* code;
    const u8* frame;  // registers and constants, as a thread finds them
    u32 frame_bytes, local_bytes, static_shared, dynamic_align, param_bytes, params, sites, max_threads, variables;
    const Param* param;
    const Site* site;
    const Variable* variable;
};

struct Published {  // what a release made visible of one block
    u64 block;
    Clock clock;
};
struct Copy {  // one cp.async
    u32 dst, bytes, src_bytes;
    const u8* src;
};
struct Thread {
    void* stack_pointer;
    u32 tid[3];
    int index, lane, warp;
    bool done;
    const char* waits_for;
    u32 site, steps;
    u8* local;
    u32 local_bytes;
    Clock seen;
    Clock proxy_seen;  // `seen` at the last fence.proxy.async
    Clock fenced;      // `seen` at the last gpu-scope fence
    bool has_fenced;
    bool saw_grid_end;                // executed griddepcontrol.wait
    std::vector<Published> unfenced;  // read by relaxed atomics, visible after the next fence
    std::vector<Copy> open_copies;
    std::deque<std::vector<Copy>> copy_groups;
};

enum Access { READ, WRITE, ATOMIC, ATOMIC_READ, READ_ONLY_CACHE };
enum Mode { IN_OUT, IN, OUT };

struct SharedMark {  // last write of a shared byte
    u32 clock, site;
    u16 thread;
    bool atomic;
};
struct ReadMark {  // last read of a shared byte by one warp
    u32 clock, site;
    u16 lane;
};
struct GlobalMark {
    u64 block, read_block;  // block number + 1; 0: none in this launch
    u32 clock, site, read_clock, read_site;
    u16 thread, read_thread;
    bool atomic;
};
struct Allocation {
    u8* base;
    size_t bytes;
    std::string name;
    int mode;
    bool late;                      // kernels before may still write it until griddepcontrol.wait
    std::vector<GlobalMark> marks;  // none for inputs, which no one may write
};

struct Collective {
    int kind;
    u32 site, mask, arrived;
    void* arg[32];
};
struct Warp {
    u32 ready, alive, first_site;
    std::vector<Collective> pending;
};
struct Barrier {
    u32 arrived, expected, reduction;
    Clock clock;
    std::vector<Thread*> waiting;
    u32 warp_site[MAX_WARPS];  // where lanes of a warp arrived, 0: none yet
};
struct MBarrier {
    s32 count, pending;
    s64 bytes;
    u32 phase;
    Clock clock;
    std::vector<Thread*> waiting;
};
struct TensorMap {  // our own content for a CUtensorMap
    u64 magic;
    u8* base;
    u64 stride[5];
    u32 dim[5];
    u16 box[5];
    u8 rank, element_bytes, swizzle, unused;
};
constexpr u64 TENSOR_MAP = 0x54414d5055435845ull;
struct TmaCopy {
    TensorMap map;
    s32 at[5];
    u32 dst, mbarrier, bytes;
};
struct WarpGroup {
    int arrived;
    u32 site;
    void* arg[128];
    std::vector<u32> open;
    std::deque<std::vector<u32>> groups;
};
struct Acquired {  // published clocks read by `warp`, visible to threads that have seen its clock `since`
    Published from;
    int warp;
    u32 since;
};

enum State : u8 { COPY_IN_FLIGHT = 1, IS_MBARRIER = 2 };
struct Block {
    const Kernel* kernel;
    u64 number;
    u32 ctaid[3], nctaid[3], ntid[3];
    int threads, warps, live;
    const u8* params;
    u8* shared;
    u32 shared_bytes, dynamic_offset, first_clock;
    Thread* thread;
    Warp warp[MAX_WARPS];
    Barrier barrier[16];
    WarpGroup group[8];
    std::unordered_map<u32, MBarrier> mbarrier;
    u32 clock[CLOCKS];
    u32 grid_wait[MAX_WARPS];  // clock from which a warp's releases come after its griddepcontrol.wait; 0: none yet
    std::vector<TmaCopy> tma;
    std::vector<Acquired> acquired;
    std::vector<SharedMark> written;
    std::vector<ReadMark> read;  // [byte * warps + warp]
    std::vector<u8> state;
    std::vector<u16> wgmma_reads;  // wgmma in flight per 16 bytes
    void* main_stack;
    Thread* current;
    bool shuffle, failed;
    u64 random;
    double deadline, limit_s;
    std::string error_kind, error;
    u64 switches, accesses, steps;
};
extern Block B;
}  // namespace ptx
