// wgmma.mma_async: a warpgroup multiplies tiles that descriptors name in shared memory; reads end at wgmma.wait_group.
#include <algorithm>

#include "numbers.h"

namespace ptx {
int bits(Type t);
float decode_float(Type t, const u8* p, int i);
s32 decode_int(Type t, const u8* p, int i);

struct WgmmaArg {
    Thread* thread;
    u32** d;
    const u32* a;
    u64 desc_a, desc_b;
    bool accumulate;
};

template <class F>
static void warpgroup(Thread& T, void* arg, F&& act) {
    WarpGroup& g = B.group[T.warp >> 2];
    if (B.warps < (T.warp | 3) + 1) fail(T, "Misuse", "wgmma in an incomplete warpgroup");
    if (g.arrived && g.site != T.site)
        fail(T, "DivergentWarp", "other threads of the warpgroup are at %s", describe(g.site).c_str());
    g.site = T.site;
    g.arg[T.index & 127] = arg;
    if (++g.arrived < 128) return wait(T, "a warpgroup instruction");
    g.arrived = 0;
    act(g);
    for (int q = 0; q < 128; q++)
        if (Thread* t = &B.thread[(T.index & ~127) + q]; t != &T) wake(t);
}

// Order before the whole warpgroup, and of generic writes also a fence.proxy.async by the writer or by a reader of each
// warp.
static void check_byte(Thread& T, void** arg, u32 at) {
    const SharedMark& w = B.written[at];
    u32 address = at + SHARED_BASE;
    if (B.state[at] & COPY_IN_FLIGHT)
        fail(T, "MissingWait", "wgmma reads 0x%x while an asynchronous copy into it is in flight", address);
    if (w.clock < B.first_clock)
        fail(T, "Uninitialised", "wgmma reads 0x%x, which no thread of the block has written", address);
    int warp = w.thread == 0xFFFF ? TMA_AGENT : w.thread >> 5;
    bool fenced = warp == TMA_AGENT || B.thread[w.thread].proxy_seen.t[warp] >= w.clock, fenced_here = true;
    for (int q = 0; q < 128; q += 32) {
        Thread* t = ((WgmmaArg*)arg[q])->thread;
        if (t->warp != warp && t->seen.t[warp] < w.clock)
            fail(T, "Race", "wgmma read of 0x%x is not ordered after the write at %s", address,
                 describe(w.site).c_str());
        fenced_here = fenced_here && t->proxy_seen.t[warp] >= w.clock;
    }
    if (!fenced && !fenced_here)
        fail(T, "MissingFence", "wgmma reads 0x%x, written by thread %u at %s, with no fence.proxy.async between",
             address, w.thread, describe(w.site).c_str());
}

static const u8* chunk(Thread& T, WarpGroup& g, u64 descriptor, u32 address) {
    if (address < SHARED_BASE || address - SHARED_BASE + 16 > B.shared_bytes)
        fail(T, "OutOfBounds", "wgmma reads shared 0x%x; the block has %u bytes (descriptor 0x%llx)", address,
             B.shared_bytes, (unsigned long long)descriptor);
    u32 at = address - SHARED_BASE;
    for (u32 i = at; i < at + 16; i++) check_byte(T, g.arg, i);
    B.wgmma_reads[at >> 4]++;
    g.open.push_back(at >> 4);
    return B.shared + at;
}

struct Descriptor {
    u32 start, leading, stride, swizzle;
    Descriptor(Thread& T, u64 d)
        : start(u32(d & 0x3fff) << 4), leading(u32(d >> 16 & 0x3fff) << 4), stride(u32(d >> 32 & 0x3fff) << 4) {
        if (d >> 49 & 7) fail(T, "Misuse", "a wgmma descriptor with base offset %u is not modelled", u32(d >> 49 & 7));
        swizzle =
            (4 - u32(d >> 62)) & 3;  // the descriptor counts 128, 64, 32 bytes as 1, 2, 3; swizzled() the other way
    }
    u32 k_major(u32 row, u32 byte) const {
        if (!swizzle) return start + (row >> 3) * stride + (byte >> 4) * leading + (row & 7) * 16 + (byte & 15);
        return swizzled(start + (row >> 3) * stride + (row & 7) * (16u << swizzle) + byte, swizzle);
    }
    u32 mn_major(u32 row, u32 k) const {
        return swizzled(start + row % 64 * 2 + k % 8 * 128 + row / 64 * leading + k / 8 * stride, swizzle);
    }
};

// out[row * k + i], rows along M or N.
template <class V, class Decode>
static void load_tile(Thread& T, WarpGroup& g, u64 descriptor, int rows, int k, Type type, bool mn_major, Decode decode,
                      V* out) {
    Descriptor d(T, descriptor);
    if (mn_major && (bits(type) != 16 || d.swizzle != 3))
        fail(T, "Misuse", "MN-major wgmma operands are modelled for 16-bit types with the 128-byte swizzle only");
    int per_chunk = 128 / bits(type);
    for (int r = 0; !mn_major && r < rows; r++)
        for (int i = 0; i < k; i += per_chunk) {
            const u8* p = chunk(T, g, descriptor, d.k_major(u32(r), u32(i * bits(type) / 8)));
            for (int e = 0; e < per_chunk; e++) out[r * k + i + e] = V(decode(type, p, e));
        }
    for (int i = 0; mn_major && i < k; i++)
        for (int r = 0; r < rows; r += 8) {
            const u8* p = chunk(T, g, descriptor, d.mn_major(u32(r), u32(i)));
            for (int e = 0; e < 8; e++) out[(r + e) * k + i] = V(decode(type, p, e));
        }
}

template <class V, class Decode>
static void load_registers(WarpGroup& g, int k, Type type, Decode decode, V* out) {
    int per_word = 32 / bits(type);
    for (int q = 0; q < 128; q++)
        for (int r = 0; r < 4; r++)
            for (int e = 0; e < per_word; e++) {
                int row = (q >> 5) * 16 + (q & 31) / 4 + 8 * (r & 1), at = ((q & 3) + 4 * (r >> 1)) * per_word + e;
                out[row * k + at] = V(decode(type, (const u8*)&((WgmmaArg*)g.arg[q])->a[r], e));
            }
}

template <class V>
static V added(V sum, const V* a, const V* b, int k, int sign) {
    for (int x = 0; x < k; x++) sum += V(sign) * a[x] * b[x];
    return sum;
}

static int exponent_of(float f) { return int(of_f32(f) >> 23 & 255) - 127; }

// Sums of 8-bit floats, as MMA-Sim (arXiv 2511.10909) has found Hopper's and Ada's: products and the sum before them
// are aligned to the largest exponent (a product's is its operands' together), cut toward zero 13 bits below it and
// added; their sum is cut 13 bits below its leading one.
float added_in_14_bits(float sum, const float* a, const float* b, int k, int sign) {
    int largest = sum == 0 ? -1000 : exponent_of(sum);
    for (int x = 0; x < k; x++) {
        if (!std::isfinite(a[x] * b[x])) return added(sum, a, b, k, sign);
        if (a[x] != 0 && b[x] != 0) largest = std::max(largest, exponent_of(a[x]) + exponent_of(b[x]));
    }
    if (largest == -1000 || !std::isfinite(sum)) return sum;
    const double steps = f64(u64(1023 + 13 - largest) << 52);
    s64 total = s64(double(sum) * steps);
    for (int x = 0; x < k; x++) total += s64(double(a[x] * b[x]) * steps) * sign;
    double cut = 1;
    for (; std::abs(total) >= 1 << 14; cut *= 2) total /= 2;
    return float(double(total) * cut / steps);
}

template <class V, class Decode, class AddUp>
static void multiply(Thread& T, WarpGroup& g, int n, int k, Type ta, Type tb, Decode decode, AddUp add_up, int sign,
                     int major_a, int major_b) {
    static V a[64 * 64], b[256 * 64];
    WgmmaArg* first = (WgmmaArg*)g.arg[0];
    for (void* p : g.arg) {
        WgmmaArg* w = (WgmmaArg*)p;
        if ((!first->a && w->desc_a != first->desc_a) || w->desc_b != first->desc_b ||
            w->accumulate != first->accumulate)
            fail(T, "DivergentWarp", "threads of the warpgroup have different wgmma descriptors or scale-d");
    }
    first->a ? load_registers(g, k, ta, decode, a) : load_tile(T, g, first->desc_a, 64, k, ta, major_a, decode, a);
    load_tile(T, g, first->desc_b, n, k, tb, major_b, decode, b);
    for (int q = 0; q < 128; q++)
        for (int i = 0; i < n / 2; i++) {
            int row = (q >> 5) * 16 + (q & 31) / 4 + 8 * (i >> 1 & 1), column = (q & 3) * 2 + (i & 1) + 8 * (i >> 2);
            u32* d = ((WgmmaArg*)g.arg[q])->d[i];
            V sum = 0;
            if (first->accumulate) memcpy(&sum, d, 4);
            sum = add_up(sum, a + row * k, b + column * k, k, sign);
            memcpy(d, &sum, 4);
        }
}

void wgmma(Thread& T, int n, int k, Type ta, Type tb, bool integer, u32** d, const u32* a, u64 desc_a, u64 desc_b,
           bool accumulate, int sign_a, int sign_b, int major_a, int major_b) {
    WgmmaArg mine{&T, d, a, desc_a, desc_b, accumulate};
    warpgroup(T, &mine, [&](WarpGroup& g) {
        if (integer)
            multiply<s32>(T, g, n, k, ta, tb, decode_int, added<s32>, 1, major_a, major_b);
        else
            multiply<float>(T, g, n, k, ta, tb, decode_float, bits(ta) == 8 ? added_in_14_bits : added<float>,
                            sign_a * sign_b, major_a, major_b);
    });
}

void wgmma_commit(Thread& T) {
    warpgroup(T, nullptr, [](WarpGroup& g) {
        g.groups.push_back(std::move(g.open));
        g.open.clear();
    });
}

void wgmma_wait(Thread& T, u32 groups_left) {
    warpgroup(T, nullptr, [&](WarpGroup& g) {
        for (; g.groups.size() > groups_left; g.groups.pop_front())
            for (u32 c : g.groups.front()) {
                B.wgmma_reads[c]--;
                for (u32 at = c * 16; at < c * 16 + 16; at++)
                    B.read[size_t(at) * B.warps + T.warp] = {B.clock[T.warp], T.site, u16(T.lane)};
            }
    });
}
}  // namespace ptx
