// Copies that run beside the threads: cp.async with its groups, mbarriers, bulk and tensor (TMA) loads.
#include "machine.h"

namespace ptx {
// ---- cp.async: bytes arrive as late as they may, at the wait
static void set_in_flight(u32 address, u32 bytes) { memset(&B.state[address - SHARED_BASE], COPY_IN_FLIGHT, bytes); }

void cp_async(Thread& T, u32 dst, u64 src, u32 bytes, u32 src_bytes) {
    if (src_bytes > bytes) fail(T, "Misuse", "cp.async of %u bytes with a source of %u", bytes, src_bytes);
    check_shared(T, dst, bytes, WRITE, bytes);
    if (src % bytes)
        fail(T, "Misaligned", "cp.async of %u bytes from 0x%llx, not a multiple of %u", bytes, (unsigned long long)src,
             bytes);
    if (src_bytes) global(T, src, src_bytes, READ, 1);
    set_in_flight(dst, bytes);
    T.open_copies.push_back({dst, bytes, src_bytes, (const u8*)src});
}

void cp_commit(Thread& T) {
    T.copy_groups.push_back(std::move(T.open_copies));
    T.open_copies.clear();
}

void cp_wait(Thread& T, u32 groups_left) {
    for (; T.copy_groups.size() > groups_left; T.copy_groups.pop_front())
        for (const Copy& c : T.copy_groups.front()) {
            u8* to = B.shared + (c.dst - SHARED_BASE);
            memcpy(to, c.src, c.src_bytes);
            memset(to + c.src_bytes, 0, c.bytes - c.src_bytes);
            mark_written(c.dst, c.bytes, B.clock[T.warp], u16(T.index), T.site);
        }
}

// ---- mbarrier
void mbarrier_init(Thread& T, u32 address, u32 count) {
    if (!count || count >= 1u << 20) fail(T, "Misuse", "mbarrier.init with count %u", count);
    if (B.mbarrier.count(address))
        fail(T, "Misuse", "mbarrier at 0x%x initialised twice without mbarrier.inval", address);
    check_shared(T, address, 8, WRITE, 8);
    MBarrier m = {s32(count), s32(count), 0, 0, {}, {}};
    B.mbarrier[address] = m;
    memset(&B.state[address - SHARED_BASE], IS_MBARRIER, 8);
}

static MBarrier& find(Thread& T, u32 address) {
    auto found = B.mbarrier.find(address);
    if (found == B.mbarrier.end()) fail(T, "Misuse", "0x%x is not an initialised mbarrier", address);
    const SharedMark& w = B.written[address - SHARED_BASE];
    if (w.thread >> 5 != T.warp && T.seen.t[w.thread >> 5] < w.clock)
        fail(T, "Race",
             "mbarrier 0x%x is used before its mbarrier.init by thread %u is visible here (barrier missing), at %s",
             address, w.thread, describe(w.site).c_str());
    return found->second;
}

void mbarrier_inval(Thread& T, u32 address) {
    find(T, address);
    B.mbarrier.erase(address);
    memset(&B.state[address - SHARED_BASE], 0, 8);
}

static void try_phase(MBarrier& m) {
    if (m.pending || m.bytes) return;
    m.phase++;
    m.pending = m.count;
    for (Thread* t : m.waiting) wake(t);
    m.waiting.clear();
}

u64 mbarrier_arrive(Thread& T, u32 address, u32 count, s64 expected_bytes, bool arrives) {
    MBarrier& m = find(T, address);
    u64 before = m.phase;
    m.bytes += expected_bytes;
    if (arrives) {
        if (s32(count) > m.pending)
            fail(T, "Misuse", "mbarrier 0x%x: more arrivals than its count %d", address, m.count);
        publish(T, m.clock);
        B.clock[T.warp]++;
        m.pending -= s32(count);
    }
    try_phase(m);
    return before;
}

bool mbarrier_wait(Thread& T, u32 address, u32 parity, bool blocking) {
    MBarrier& m = find(T, address);
    while ((m.phase & 1) == (parity & 1)) {
        if (!blocking) {
            B.warp[T.warp].ready |= 1u << T.lane;
            yield(T);
            if ((m.phase & 1) == (parity & 1)) return false;
            break;
        }
        m.waiting.push_back(&T);
        wait(T, "mbarrier.try_wait");
    }
    T.seen.join(m.clock);
    return true;
}

// ---- bulk and tensor loads: performed when no thread can run, or at a random moment
static void start(Thread& T, const TmaCopy& c) {
    find(T, c.mbarrier);
    const SharedMark& init = B.written[c.mbarrier - SHARED_BASE];
    const Thread& by = B.thread[init.thread];
    if (by.proxy_seen.t[by.warp] < init.clock && T.proxy_seen.t[by.warp] < init.clock)
        fail(T, "MissingFence",
             "a copy arrives at mbarrier 0x%x, initialised by thread %u at %s, with no "
             "fence.proxy.async between",
             c.mbarrier, init.thread, describe(init.site).c_str());
    check_shared(T, c.dst, c.bytes, WRITE, 16);
    set_in_flight(c.dst, c.bytes);
    B.tma.push_back(c);
}

void bulk_load(Thread& T, u32 dst, u64 src, u32 bytes, u32 mbarrier) {
    if (!bytes || bytes % 16 || src % 16 || dst % 16)
        fail(T, "Misaligned", "cp.async.bulk of %u bytes from 0x%llx to 0x%x: all are multiples of 16", bytes,
             (unsigned long long)src, dst);
    global(T, src, bytes, READ, 16);
    TmaCopy c = {};
    c.map.base = (u8*)src, c.dst = dst, c.mbarrier = mbarrier, c.bytes = bytes;
    start(T, c);
}

void tma_load(Thread& T, u32 dst, u64 map, u32 mbarrier, int rank, const s32* at) {
    TmaCopy c = {};
    if (map < (u64)B.params || map + sizeof c.map > (u64)B.params + B.kernel->param_bytes || map % 64)
        fail(T, "Misuse", "the tensor map at 0x%llx is not a kernel parameter at a multiple of 64",
             (unsigned long long)map);
    memcpy(&c.map, (const void*)map, sizeof c.map);
    if (c.map.magic != TENSOR_MAP) fail(T, "Misuse", "the tensor map was not made by tensor_map()");
    if (c.map.rank != rank) fail(T, "Misuse", "a load of rank %d with a tensor map of rank %u", rank, c.map.rank);
    u32 align[] = {128, 256, 512, 1024}, want = align[c.map.swizzle & 3];
    if (dst % want) fail(T, "Misaligned", "tensor load to 0x%x, not a multiple of the swizzle's %u bytes", dst, want);
    c.bytes = c.map.element_bytes;
    for (int i = 0; i < rank; i++) c.bytes *= c.map.box[i], c.at[i] = at[i];
    c.dst = dst, c.mbarrier = mbarrier;
    start(T, c);
}

u32 swizzled(u32 address, u32 mode) {
    u32 bits[] = {0, 1, 3, 7};
    return address ^ ((address >> 7 & bits[mode & 3]) << 4);
}

// One row of a box (its innermost dimension); what lies outside the tensor is zero.
static u32 copy_row(const TmaCopy& c, u32 to, const s64* at) {
    const TensorMap& m = c.map;
    bool inside = true;
    const u8* row = m.base;
    for (int i = 1; i < m.rank; i++) {
        inside = inside && at[i] >= 0 && at[i] < s64(m.dim[i]);
        row += at[i] * s64(m.stride[i]);
    }
    for (u32 x = 0; x < m.box[0] * u32(m.element_bytes); x++, to++) {
        s64 column = at[0] + s64(x / m.element_bytes);
        bool in = inside && column >= 0 && column < s64(m.dim[0]);
        B.shared[swizzled(to, m.swizzle) - SHARED_BASE] = in ? row[at[0] * m.element_bytes + s64(x)] : 0;
    }
    return to;
}

static void copy_box(const TmaCopy& c) {
    u32 box[5] = {1, 1, 1, 1, 1}, to = c.dst;
    for (int i = 1; i < c.map.rank; i++) box[i] = c.map.box[i];
    for (u32 i4 = 0; i4 < box[4]; i4++)
        for (u32 i3 = 0; i3 < box[3]; i3++)
            for (u32 i2 = 0; i2 < box[2]; i2++)
                for (u32 i1 = 0; i1 < box[1]; i1++) {
                    s64 at[5] = {c.at[0], c.at[1] + s64(i1), c.at[2] + s64(i2), c.at[3] + s64(i3), c.at[4] + s64(i4)};
                    to = copy_row(c, to, at);
                }
}

void run_tma() {
    size_t i = B.shuffle ? random_number() % B.tma.size() : 0;
    TmaCopy c = B.tma[i];
    B.tma.erase(B.tma.begin() + long(i));
    if (c.map.magic == TENSOR_MAP)
        copy_box(c);
    else
        memcpy(B.shared + (c.dst - SHARED_BASE), c.map.base, c.bytes);
    u32 clock = ++B.clock[TMA_AGENT];
    mark_written(c.dst, c.bytes, clock, 0xFFFF, 0);
    auto found = B.mbarrier.find(c.mbarrier);
    if (found == B.mbarrier.end()) return;
    found->second.clock.t[TMA_AGENT] = clock;
    found->second.bytes -= c.bytes;
    try_phase(found->second);
}
}  // namespace ptx

extern "C" void ptx_tensor_map(void* out, void* base, ptx::u32 element_bytes, ptx::u32 rank, const ptx::u64* dim,
                               const ptx::u64* stride, const ptx::u32* box, ptx::u32 swizzle) {
    ptx::TensorMap m = {};
    static_assert(sizeof m <= 128, "a CUtensorMap has 128 bytes");
    m.magic = ptx::TENSOR_MAP, m.base = (ptx::u8*)base, m.swizzle = ptx::u8(swizzle);
    m.rank = ptx::u8(rank), m.element_bytes = ptx::u8(element_bytes);
    for (ptx::u32 i = 0; i < rank; i++)
        m.dim[i] = ptx::u32(dim[i]), m.box[i] = ptx::u16(box[i]), m.stride[i] = i ? stride[i - 1] : element_bytes;
    memset(out, 0, 128);
    memcpy(out, &m, sizeof m);
}
