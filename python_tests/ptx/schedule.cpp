// Fibers, the scheduler, failures and the launch.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <numeric>

#include "machine.h"

extern "C" void ptx_switch(void** save, void* to);
asm(R"(.text
.globl ptx_switch
.type ptx_switch,@function
ptx_switch:
 pushq %rbp
 pushq %rbx
 pushq %r12
 pushq %r13
 pushq %r14
 pushq %r15
 movq %rsp,(%rdi)
 movq %rsi,%rsp
 popq %r15
 popq %r14
 popq %r13
 popq %r12
 popq %rbx
 popq %rbp
 ret
)");

namespace ptx {
Block B;
static const size_t STACK = 256 * 1024;  // function.py refuses kernels whose frame and locals exceed 192 KiB
static u8* stacks;

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

u64 random_number() {
    B.random ^= B.random << 13;
    B.random ^= B.random >> 7;
    return B.random ^= B.random << 17;
}

std::string describe(u32 site) {
    if (site >= B.kernel->sites) return "?";
    const Site& s = B.kernel->site[site];
    std::string text = "PTX line " + std::to_string(s.ptx_line);
    if (s.source_line) text += " (source line " + std::to_string(s.source_line) + ")";
    return text + " `" + s.text + "`";
}

void fail(Thread& T, const char* kind, const char* format, ...) {
    char message[2048], where[256];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    snprintf(where, sizeof where, "kernel %s, block (%u,%u,%u), thread (%u,%u,%u), ", B.kernel->name, B.ctaid[0],
             B.ctaid[1], B.ctaid[2], T.tid[0], T.tid[1], T.tid[2]);
    B.error_kind = kind;
    B.error = where + describe(T.site) + ": " + message;
    B.failed = true;
    void* abandoned;
    ptx_switch(&abandoned, B.main_stack);
    __builtin_unreachable();
}

static Thread* pick(int first_warp) {
    for (int i = 0; i < B.warps; i++) {
        Warp& warp = B.warp[(first_warp + i) % B.warps];
        if (!warp.ready) continue;
        int turn = B.shuffle ? int(random_number() & 31) : 0;
        u32 turned = turn ? warp.ready >> turn | warp.ready << (32 - turn) : warp.ready;
        int lane = (__builtin_ctz(turned) + turn) & 31;
        warp.ready &= ~(1u << lane);
        return &B.thread[(first_warp + i) % B.warps * 32 + lane];
    }
    return nullptr;
}

static void deadlock(Thread& T) {
    std::string text;
    int lines = 0;
    u32 last = ~0u;
    for (int i = 0; i < B.threads && lines < 6; i++) {
        Thread& t = B.thread[i];
        if (t.done || t.site == last) continue;
        last = t.site;
        lines++;
        text += "; thread " + std::to_string(i) + " waits in " + (t.waits_for ? t.waits_for : "?") + " at " +
                describe(t.site);
    }
    int exited = B.threads - B.live;
    fail(T, "Deadlock", "no thread can run, %d of %d have exited%s", exited, B.threads, text.c_str());
}

void yield(Thread& T) {
    int first_warp = T.warp;
    if (B.shuffle && (random_number() & 7) == 0) first_warp = int(random_number() % B.warps);
    if (B.shuffle && !B.tma.empty() && (random_number() & 15) == 0) run_tma();
    Thread* next;
    while (!(next = pick(first_warp))) {
        if (B.live == 0) ptx_switch(&T.stack_pointer, B.main_stack);
        if (B.tma.empty()) deadlock(T);
        run_tma();
    }
    if (next == &T) return;
    B.switches++;
    B.current = next;
    ptx_switch(&T.stack_pointer, next->stack_pointer);
}

void wait(Thread& T, const char* what) {
    T.waits_for = what;
    yield(T);
}

void wake(Thread* t) {
    B.warp[t->warp].ready |= 1u << t->lane;
    t->waits_for = nullptr;
}

void step_back(Thread& T) {
    if ((++B.steps & 1023) == 0 && now() > B.deadline)
        fail(T, "TimeLimit", "still running after %g s: an endless loop, or raise limit_s", B.limit_s);
    if (++T.steps & 1023) return;
    // A thread that spins on memory must let the others run.
    B.warp[T.warp].ready |= 1u << T.lane;
    yield(T);
}

static void run_kernel(Thread& T) {
    const Kernel& k = *B.kernel;
    const u32 frame_bytes = (k.frame_bytes + 15) / 16 * 16;
    u8* frame = (u8*)__builtin_alloca_with_align(frame_bytes + k.local_bytes, 128);
    memcpy(frame, k.frame, k.frame_bytes);
    T.local = frame + frame_bytes, T.local_bytes = k.local_bytes;
    memset(T.local, 0xFF, T.local_bytes);
    for (const Op* o = k.code; o;) o = o->run(T, frame, o);
}

static void enter() {
    Thread& T = *B.current;
    run_kernel(T);
    T.done = true;
    B.live--;
    B.warp[T.warp].alive &= ~(1u << T.lane);
    check_barriers_at_exit(T);
    yield(T);
    __builtin_unreachable();
}

static void prepare_thread(int i) {
    Thread& T = B.thread[i];
    T.index = i, T.lane = i & 31, T.warp = i >> 5;
    T.tid[0] = i % B.ntid[0], T.tid[1] = i / B.ntid[0] % B.ntid[1], T.tid[2] = i / (B.ntid[0] * B.ntid[1]);
    T.done = false, T.waits_for = nullptr, T.site = T.steps = 0, T.has_fenced = T.saw_grid_end = false;
    memset(&T.seen, 0, sizeof T.seen);
    T.proxy_seen = T.fenced = T.seen;
    T.unfenced.clear(), T.open_copies.clear(), T.copy_groups.clear();
    B.warp[T.warp].ready |= 1u << T.lane;
    B.warp[T.warp].alive |= 1u << T.lane;
    // Stacks start at different cache sets. 7 words: a return address that is never used, `enter`, six registers.
    u64* top = (u64*)(stacks + STACK * (i + 1) - 64 - (i % 16) * 256);
    *--top = 0;
    *--top = (u64)enter;
    for (int k = 0; k < 6; k++) *--top = 0;
    T.stack_pointer = top;
}

static void prepare_block() {
    u32 first = 1 + *std::max_element(B.clock, B.clock + CLOCKS);
    std::fill(B.clock, B.clock + CLOCKS, first);
    B.first_clock = first;
    B.live = B.threads;
    memset(B.shared, 0xFF, B.shared_bytes);
    memset(B.grid_wait, 0, sizeof B.grid_wait);
    std::fill(B.state.begin(), B.state.end(), 0);
    std::fill(B.wgmma_reads.begin(), B.wgmma_reads.end(), 0);
    B.mbarrier.clear(), B.tma.clear(), B.acquired.clear();
    for (Warp& w : B.warp) w.ready = w.alive = 0, w.pending.clear();
    for (Barrier& b : B.barrier) {
        b.arrived = b.expected = 0, b.waiting.clear();
        memset(&b.clock, 0, sizeof b.clock);
        memset(b.warp_site, 0, sizeof b.warp_site);
    }
    for (WarpGroup& g : B.group) g.arrived = 0, g.open.clear(), g.groups.clear();
    for (int i = 0; i < B.threads; i++) prepare_thread(i);
}

static u32 dynamic_offset(const Kernel* k) {
    return (k->static_shared + k->dynamic_align - 1) / k->dynamic_align * k->dynamic_align;
}

static void prepare_launch(const Kernel* kernel, const u32* grid, const u32* block, u32 dynamic_shared, u32 seed,
                           double limit_s) {
    alignas(1024) static u8 shared_memory[SHARED_LIMIT];
    static Thread* threads = new Thread[1024];
    if (!stacks)
        stacks = (u8*)mmap(nullptr, STACK * 1024, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                           -1, 0);
    B.kernel = kernel, B.thread = threads, B.shared = shared_memory;
    B.threads = int(block[0] * block[1] * block[2]), B.warps = (B.threads + 31) / 32;
    memcpy(B.ntid, block, sizeof B.ntid);
    memcpy(B.nctaid, grid, sizeof B.nctaid);
    B.dynamic_offset = dynamic_offset(kernel);
    B.shared_bytes = dynamic_shared ? B.dynamic_offset + dynamic_shared : kernel->static_shared;
    B.written.assign(B.shared_bytes, {});
    B.read.assign(size_t(B.shared_bytes) * B.warps, {});
    B.state.assign(B.shared_bytes, 0);
    B.wgmma_reads.assign(B.shared_bytes / 16 + 1, 0);
    memset(B.clock, 0, sizeof B.clock);
    B.shuffle = seed != 0, B.random = seed * 2654435761ull + 88172645463325252ull;
    B.failed = false, B.error.clear(), B.error_kind.clear(), B.switches = B.accesses = B.steps = 0;
    B.limit_s = limit_s, B.deadline = now() + limit_s;
}

static void run_block() {
    prepare_block();
    B.current = pick(B.shuffle ? int(random_number() % B.warps) : 0);
    ptx_switch(&B.main_stack, B.current->stack_pointer);
}

static bool refuse(const std::string& why) {
    B.error_kind = "BadLaunch";
    B.error = why;
    return false;
}

// Shuffled, blocks come in any order: what one of them may rely on is its own, and what it acquires.
static bool run_grid(const u32* grid) {
    std::vector<u64> order(u64(grid[0]) * grid[1] * grid[2]);
    std::iota(order.begin(), order.end(), 0);
    for (u64 left = B.shuffle ? order.size() : 0; left > 1; left--)
        std::swap(order[left - 1], order[random_number() % left]);
    u64 ended = 0;
    for (u64 i : order) {
        B.number = i;
        B.ctaid[0] = i % grid[0], B.ctaid[1] = i / grid[0] % grid[1], B.ctaid[2] = i / (u64(grid[0]) * grid[1]);
        run_block();
        if (B.failed) return false;
        ended++;
        if (now() > B.deadline) {
            B.error = "kernel " + std::string(B.kernel->name) + ": " + std::to_string(ended) + " of " +
                      std::to_string(order.size()) + " blocks ran longer than limit_s";
            return B.error_kind = "TimeLimit", false;
        }
    }
    return true;
}
}  // namespace ptx

using namespace ptx;
extern "C" {
const char* ptx_error_kind() { return B.error_kind.c_str(); }
const char* ptx_error() { return B.error.c_str(); }
void ptx_counters(u64* out) { out[0] = B.switches, out[1] = B.accesses; }

bool ptx_run(const Kernel* k, const u32* grid, const u32* block, u32 dynamic_shared, void** args, u32 seed,
             double limit_s) {
    std::string name = "kernel " + std::string(k->name);
    u64 threads = u64(block[0]) * block[1] * block[2];
    if (threads < 1 || threads > k->max_threads)
        return refuse(name + ": block of " + std::to_string(threads) + " threads, it takes 1 to " +
                      std::to_string(k->max_threads));
    if (!grid[0] || !grid[1] || !grid[2] || grid[1] > 65535 || grid[2] > 65535)
        return refuse(name + ": grid dimensions are 1 to 65535 (x: 2^31-1)");
    if (dynamic_offset(k) + u64(dynamic_shared) > SHARED_LIMIT)
        return refuse(name + ": " + std::to_string(dynamic_offset(k) + u64(dynamic_shared)) +
                      " bytes of shared memory, a block has " + std::to_string(SHARED_LIMIT));
    prepare_launch(k, grid, block, dynamic_shared, seed, limit_s);
    std::vector<u64> params(k->param_bytes / 8 + 16);
    u8* base = (u8*)((u64(params.data()) + 63) & ~63ull);
    for (u32 i = 0; i < k->params; i++) memcpy(base + k->param[i].offset, args[i], k->param[i].bytes);
    B.params = base;
    begin_launch_memory();
    return run_grid(grid);
}
}
