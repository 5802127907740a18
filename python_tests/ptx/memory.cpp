// Global memory: bounds, alignment, initialisation, order of accesses within a block, between blocks and kernels.
#include <algorithm>

#include "machine.h"

namespace ptx {
static std::vector<Allocation> allocations;
static size_t last_found;
static std::unordered_map<u64, std::vector<Published>> released;  // by address of the atomic

static Allocation* find(u64 address) {
    auto holds = [&](const Allocation& a) { return address >= (u64)a.base && address < (u64)a.base + a.bytes; };
    if (last_found < allocations.size() && holds(allocations[last_found])) return &allocations[last_found];
    for (last_found = 0; last_found < allocations.size(); last_found++)
        if (holds(allocations[last_found])) return &allocations[last_found];
    return nullptr;
}

static void fail_bounds(Thread& T, u64 address, u32 bytes, Access access) {
    const Allocation* nearest = nullptr;
    auto distance = [&](const Allocation& a) {
        return address < (u64)a.base ? (u64)a.base - address : address - ((u64)a.base + a.bytes) + 1;
    };
    for (const Allocation& a : allocations)
        if (!nearest || distance(a) < distance(*nearest)) nearest = &a;
    if (!nearest)
        fail(T, "OutOfBounds", "global %s of %u bytes at 0x%llx; the launch has no memory", verb(access), bytes,
             (unsigned long long)address);
    fail(T, "OutOfBounds", "global %s of %u bytes at byte %lld of %s, which has %zu", verb(access), bytes,
         (long long)(address - (u64)nearest->base), nearest->name.c_str(), nearest->bytes);
}

static bool ordered_global(Thread& T, u64 block, u32 thread, u32 clock) {
    if (block == B.number + 1) return ordered(T, thread, clock);
    for (const Acquired& a : B.acquired)
        if (a.from.block == block && a.from.clock.t[thread >> 5] >= clock &&
            (a.warp == T.warp || T.seen.t[a.warp] >= a.since))
            return true;
    return false;
}

static std::string who_global(u64 block, u32 thread, u32 site) {
    std::string text = who(thread, site);
    if (block != B.number + 1)
        text = "block " + std::to_string(block - 1) + ", " + text + " (no release and acquire with fences between)";
    return text;
}

static void check_mark(Thread& T, const Allocation& a, size_t at, Access access, GlobalMark& m) {
    const char* name = a.name.c_str();
    if (m.block && access == READ_ONLY_CACHE)
        fail(T, "Race",
             "read through the read-only cache (ld.global.nc) of byte %zu of %s, written in this launch by %s", at,
             name, who_global(m.block, m.thread, m.site).c_str());
    if (m.block && !(m.atomic && (access == ATOMIC || access == ATOMIC_READ)) &&
        !ordered_global(T, m.block, m.thread, m.clock))
        fail(T, "Race", "global %s of byte %zu of %s is not ordered after the write by %s", verb(access), at, name,
             who_global(m.block, m.thread, m.site).c_str());
    bool writes = access == WRITE || access == ATOMIC;
    if (writes && m.read_block && !ordered_global(T, m.read_block, m.read_thread, m.read_clock))
        if (m.read_block != B.number + 1 || int(m.read_thread >> 5) != T.warp)
            fail(T, "Race", "global %s of byte %zu of %s is not ordered after the read by %s", verb(access), at, name,
                 who_global(m.read_block, m.read_thread, m.read_site).c_str());
    if (!writes && a.mode == OUT && !m.block)
        fail(T, "Uninitialised", "global read of byte %zu of output %s before any write", at, name);
}

static bool after_grid_wait(Thread& T) {
    for (int w = 0; w < B.warps && !T.saw_grid_end; w++)
        if (B.grid_wait[w] && T.seen.t[w] >= B.grid_wait[w]) return true;
    return T.saw_grid_end;
}

void wait_for_grid(Thread& T) {
    T.saw_grid_end = true;
    if (!B.grid_wait[T.warp]) B.grid_wait[T.warp] = ++B.clock[T.warp];
}

u8* global(Thread& T, u64 address, u32 bytes, Access access, u32 align) {
    if (address % align)
        fail(T, "Misaligned", "global %s of %u bytes at 0x%llx, not a multiple of %u", verb(access), bytes,
             (unsigned long long)address, align);
    Allocation* a = find(address);
    if (!a || address + bytes > (u64)a->base + a->bytes) fail_bounds(T, address, bytes, access);
    B.accesses++;
    bool writes = access == WRITE || access == ATOMIC;
    size_t begin = address - (u64)a->base;
    if (a->late && !after_grid_wait(T))
        fail(T, "MissingWait",
             "global %s of byte %zu of %s, where the kernel before may be at work, before griddepcontrol.wait",
             verb(access), begin, a->name.c_str());
    if (a->mode == IN) {
        if (writes)
            fail(T, "OutOfBounds", "global %s of byte %zu of %s, which is an input", verb(access), begin,
                 a->name.c_str());
        return (u8*)address;
    }
    for (size_t at = begin; at < begin + bytes; at++) {
        GlobalMark& m = a->marks[at];
        check_mark(T, *a, at, access, m);
        if (writes) {
            // An atomic after a fence is as old as the fence: who acquires it may overwrite it.
            u32 clock = access == ATOMIC && T.has_fenced ? T.fenced.t[T.warp] : B.clock[T.warp];
            m.block = B.number + 1, m.clock = clock, m.site = T.site, m.thread = u16(T.index),
            m.atomic = access == ATOMIC;
            m.read_block = 0;
        } else if (access != ATOMIC_READ) {
            m.read_block = B.number + 1, m.read_clock = B.clock[T.warp], m.read_site = T.site,
            m.read_thread = u16(T.index);
        }
    }
    return (u8*)address;
}

u8* generic(Thread& T, u64 address, u32 bytes, Access access) {
    if (address >= (u64)B.shared && address < (u64)B.shared + SHARED_LIMIT)
        return shared(T, u32(address - (u64)B.shared) + SHARED_BASE, bytes, access);
    if (address >= (u64)T.local && address < (u64)T.local + T.local_bytes) return local(T, address, bytes);
    if (address >= (u64)B.params && address < (u64)B.params + B.kernel->param_bytes) return param(T, address, bytes);
    return global(T, address, bytes, access, bytes);
}

u8* local(Thread& T, u64 address, u32 bytes) {
    if (address < (u64)T.local || address + bytes > (u64)T.local + T.local_bytes)
        fail(T, "OutOfBounds", "local access of %u bytes at byte %lld of %u", bytes,
             (long long)(address - (u64)T.local), T.local_bytes);
    if (address % bytes)
        fail(T, "Misaligned", "local access of %u bytes at 0x%llx", bytes, (unsigned long long)address);
    return (u8*)address;
}

u8* param(Thread& T, u64 address, u32 bytes) {
    if (address < (u64)B.params || address + bytes > (u64)B.params + B.kernel->param_bytes)
        fail(T, "OutOfBounds", "parameter read of %u bytes at byte %lld of %u", bytes,
             (long long)(address - (u64)B.params), B.kernel->param_bytes);
    return (u8*)address;
}

// ---- order between blocks: writes, fence, atomic | atomic, fence, reads
void fence(Thread& T) {
    for (Published& p : T.unfenced) B.acquired.push_back({p, T.warp, B.clock[T.warp]});
    T.unfenced.clear();
    T.fenced = T.seen;
    T.fenced.t[T.warp] = B.clock[T.warp]++;
    T.has_fenced = true;
}

void release(Thread& T, u64 address, bool fence_first) {
    if (fence_first) fence(T);
    if (!T.has_fenced) return;
    std::vector<Published>& list = released[address];
    auto add = [&](const Published& p) {
        for (Published& q : list)
            if (q.block == p.block) return q.clock.join(p.clock);
        list.push_back(p);
    };
    add({B.number + 1, T.fenced});
    for (const Acquired& a : B.acquired)
        if (a.warp == T.warp || T.seen.t[a.warp] >= a.since) add(a.from);
}

void acquire(Thread& T, u64 address, bool fence_after) {
    auto found = released.find(address);
    if (found != released.end())
        for (const Published& p : found->second)
            if (p.block != B.number + 1) T.unfenced.push_back(p);
    if (fence_after) fence(T);
}

void proxy_fence(Thread& T) {
    T.proxy_seen = T.seen;
    T.proxy_seen.t[T.warp] = B.clock[T.warp]++;
}

void begin_launch_memory() {
    released.clear();
    while (!allocations.empty() && allocations.back().name[0] == '.') allocations.pop_back();
    for (u32 i = 0; i < B.kernel->variables; i++) {
        const Variable& v = B.kernel->variable[i];
        allocations.push_back({(u8*)v.base, v.bytes, std::string(".") + v.name, v.constant ? IN : IN_OUT, false, {}});
    }
    for (Allocation& a : allocations) {
        if (a.mode != IN) a.marks.assign(a.bytes, {});
        if (a.mode == OUT) memset(a.base, 0xFF, a.bytes);
    }
}

size_t unwritten_bytes(size_t allocation) {
    const std::vector<GlobalMark>& marks = allocations[allocation].marks;
    return size_t(std::count_if(marks.begin(), marks.end(), [](const GlobalMark& m) { return !m.block; }));
}
}  // namespace ptx

extern "C" {
void ptx_forget_memory() { ptx::allocations.clear(); }
void ptx_memory(void* base, size_t bytes, const char* name, int mode, bool late) {
    ptx::allocations.push_back({(ptx::u8*)base, bytes, name, mode, late, {}});
}
size_t ptx_unwritten(size_t allocation) { return ptx::unwritten_bytes(allocation); }
}
