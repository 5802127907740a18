// Shared memory: bounds, alignment, initialisation, and order of accesses; words that global memory's faults use, too.
#include "machine.h"

namespace ptx {
const char* verb(Access access) {
    return access == WRITE         ? "write"
           : access == ATOMIC      ? "atomic access"
           : access == ATOMIC_READ ? "atomic read"
                                   : "read";
}

std::string who(u32 thread, u32 site) {
    if (thread == 0xFFFF) return "an asynchronous copy";
    return "thread " + std::to_string(thread) + " at " + describe(site);
}

// ---- shared memory
bool ordered(Thread& T, u32 thread, u32 clock) {
    if (thread == 0xFFFF) return T.seen.t[TMA_AGENT] >= clock;
    int warp = int(thread >> 5);
    if (warp != T.warp) return T.seen.t[warp] >= clock;
    return thread == u32(T.index) || clock < B.clock[warp];
}

static void check_state(Thread& T, u32 at, Access access) {
    u32 address = at + SHARED_BASE;
    if (B.state[at] & COPY_IN_FLIGHT)
        fail(T, "MissingWait",
             "shared %s at 0x%x while an asynchronous copy into it is in flight; the copy was issued by %s",
             verb(access), address, who(B.written[at].thread, B.written[at].site).c_str());
    if (B.state[at] & IS_MBARRIER)
        fail(T, "Misuse", "ordinary %s of an mbarrier object at 0x%x", verb(access), address);
    if (access == WRITE && B.wgmma_reads[at >> 4])
        fail(T, "MissingWait", "shared write at 0x%x while a wgmma that reads it is in flight", address);
}

static void check_after_write(Thread& T, u32 at, Access access) {
    SharedMark& w = B.written[at];
    u32 address = at + SHARED_BASE;
    if (w.clock < B.first_clock) {
        if (access != WRITE)
            fail(T, "Uninitialised", "shared %s at 0x%x, which no thread of the block has written", verb(access),
                 address);
        return;
    }
    if (w.atomic && (access == ATOMIC || access == ATOMIC_READ)) return;
    if (!ordered(T, w.thread, w.clock))
        fail(T, "Race", "shared %s at 0x%x is not ordered after the write by %s%s", verb(access), address,
             who(w.thread, w.site).c_str(), int(w.thread >> 5) == T.warp ? " (same warp, no __syncwarp between)" : "");
}

static void check_after_reads(Thread& T, u32 at, Access access) {
    const ReadMark* r = &B.read[size_t(at) * B.warps];
    for (int w = 0; w < B.warps; w++)
        if (r[w].clock >= B.first_clock && w != T.warp && r[w].clock > T.seen.t[w])
            fail(T, "Race", "shared %s at 0x%x is not ordered after the read by %s", verb(access), at + SHARED_BASE,
                 who(w * 32 + r[w].lane, r[w].site).c_str());
}

// Where lanes of a warp write one place by one instruction, hardware performs one of the writes: of one value that is
// no race, and Triton 3.9 reduces so. The value is known after the instruction, and compared at the next access.
static struct {
    u32 at, bytes, clock, site;
    u16 thread, other;
    u8 before[32];
} repeated;

static bool repeats(const Thread& T, const SharedMark& w) {
    return w.clock >= B.first_clock && w.site == T.site && !w.atomic && w.thread != 0xFFFF && w.thread != T.index &&
           int(w.thread >> 5) == T.warp && w.clock == B.clock[T.warp];
}

static void settle_repeated() {
    auto r = repeated;
    repeated.bytes = 0;
    if (!r.bytes || r.at + r.bytes > B.shared_bytes) return;
    const SharedMark& w = B.written[r.at];  // of this block and launch?
    if (w.clock != r.clock || w.clock < B.first_clock || w.thread != r.thread || w.site != r.site) return;
    if (!memcmp(B.shared + r.at, r.before, r.bytes)) return;
    Thread& writer = B.thread[r.thread];
    writer.site = r.site;
    fail(writer, "Race",
         "shared write at 0x%x is not ordered after the write by %s (same warp, no __syncwarp between), and of another "
         "value",
         r.at + SHARED_BASE, who(r.other, r.site).c_str());
}

static void check(Thread& T, u32 address, u32 bytes, Access access, u32 align, bool plain_store) {
    settle_repeated();
    if (address < SHARED_BASE || address - SHARED_BASE + u64(bytes) > B.shared_bytes)
        fail(T, "OutOfBounds", "shared %s of %u bytes at 0x%x; the block's %u bytes lie at 0x%x to 0x%x", verb(access),
             bytes, address, B.shared_bytes, SHARED_BASE, SHARED_BASE + B.shared_bytes);
    if (address % align)
        fail(T, "Misaligned", "shared %s of %u bytes at 0x%x, not a multiple of %u", verb(access), bytes, address,
             align);
    B.accesses++;
    u32 now = B.clock[T.warp];
    for (u32 at = address - SHARED_BASE, end = at + bytes; at < end; at++) {
        if (B.state[at] || B.wgmma_reads[at >> 4]) check_state(T, at, access);
        if (plain_store && repeats(T, B.written[at])) {
            u32 begin = address - SHARED_BASE;
            repeated = {begin, bytes, now, T.site, u16(T.index), B.written[at].thread, {}};
            memcpy(repeated.before, B.shared + begin, bytes);
        } else {
            check_after_write(T, at, access);
        }
        if (access == ATOMIC_READ) continue;
        if (access == READ) {
            B.read[size_t(at) * B.warps + T.warp] = {now, T.site, u16(T.lane)};
            continue;
        }
        check_after_reads(T, at, access);
        B.written[at] = {now, T.site, u16(T.index), access == ATOMIC};
    }
}

void check_shared(Thread& T, u32 address, u32 bytes, Access access, u32 align) {
    check(T, address, bytes, access, align, false);
}

void mark_written(u32 address, u32 bytes, u32 clock, u16 thread, u32 site) {
    for (u32 at = address - SHARED_BASE; at < address - SHARED_BASE + bytes; at++) {
        B.state[at] &= u8(~COPY_IN_FLIGHT);
        B.written[at] = {clock, site, thread, false};
    }
}

u8* shared(Thread& T, u32 address, u32 bytes, Access access) {
    check(T, address, bytes, access, bytes, access == WRITE);
    return B.shared + (address - SHARED_BASE);
}

u64 generic_of_shared(u64 address) { return (u64)B.shared + u32(address) - SHARED_BASE; }

u64 shared_of_generic(Thread& T, u64 address) {
    if (address < (u64)B.shared || address > (u64)B.shared + B.shared_bytes)
        fail(T, "OutOfBounds", "cvta.to.shared of 0x%llx, which is no shared address", (unsigned long long)address);
    return address - (u64)B.shared + SHARED_BASE;
}
}  // namespace ptx
