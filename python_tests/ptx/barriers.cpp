// Block barriers and warp collectives.
#include <algorithm>

#include "machine.h"

namespace ptx {
void publish(Thread& T, Clock& clock) {
    clock.join(T.seen);
    clock.t[T.warp] = std::max(clock.t[T.warp], B.clock[T.warp]);
}

static void complete(Barrier& b) {
    bool warps[MAX_WARPS] = {};
    for (Thread* t : b.waiting) {
        t->seen.join(b.clock);
        warps[t->warp] = true;
        wake(t);
    }
    for (int w = 0; w < B.warps; w++) B.clock[w] += warps[w];
    b.waiting.clear();
    b.arrived = b.expected = 0;
    memset(&b.clock, 0, sizeof b.clock);
    memset(b.warp_site, 0, sizeof b.warp_site);
}

static void check_arrival(Thread& T, Barrier& b, u32 id, u32 count, bool aligned) {
    if (id > 15) fail(T, "Misuse", "barrier %u, a block has 0 to 15", id);
    if (count % 32) fail(T, "Misuse", "barrier %u with thread count %u, not a multiple of 32", id, count);
    if (count > u32(B.threads)) fail(T, "Misuse", "barrier %u waits for %u of %d threads", id, count, B.threads);
    if (b.arrived && b.expected != count)
        fail(T, "Misuse", "barrier %u with thread counts %u and %u", id, b.expected, count);
    if (!count && B.live < B.threads)
        fail(T, "DivergentBarrier", "barrier %u of all %d threads, but %d have exited", id, B.threads,
             B.threads - B.live);
    u32& site = b.warp_site[T.warp];
    if (aligned && site && site != T.site + 1)
        fail(T, "DivergentBarrier", "lanes of warp %d are at different barriers; another lane waits at %s", T.warp,
             describe(site - 1).c_str());
    for (const Collective& c : B.warp[T.warp].pending)
        if (aligned)
            fail(T, "DivergentBarrier", "lanes 0x%08x of this warp are at %s", c.arrived, describe(c.site).c_str());
    site = T.site + 1;
}

void check_converged(Thread& T) {
    for (u32 id = 0; id < 16; id++)
        if (u32 site = B.barrier[id].warp_site[T.warp])
            fail(T, "DivergentBarrier", "other lanes of this warp wait at barrier %u, at %s", id,
                 describe(site - 1).c_str());
}

void bar_sync(Thread& T, u32 id, u32 count, bool aligned) {
    Barrier& b = B.barrier[id & 15];
    check_arrival(T, b, id, count, aligned);
    b.expected = count;
    b.arrived++;
    publish(T, b.clock);
    b.waiting.push_back(&T);
    if (b.arrived < (count ? count : u32(B.threads))) return wait(T, "a barrier");
    complete(b);
    B.warp[T.warp].ready &= ~(1u << T.lane);
}

void bar_arrive(Thread& T, u32 id, u32 count) {
    Barrier& b = B.barrier[id & 15];
    check_arrival(T, b, id, count, true);
    b.expected = count;
    b.arrived++;
    publish(T, b.clock);
    B.clock[T.warp]++;
    if (b.arrived >= count) complete(b);
}

u32 bar_red(Thread& T, u32 id, u32 count, bool p, Reduction op) {
    Barrier& b = B.barrier[id & 15];
    if (!b.arrived) b.reduction = op == AND;
    b.reduction = op == POPC ? b.reduction + p : op == AND ? b.reduction & u32(p) : b.reduction | u32(p);
    u32 site = T.site;
    bar_sync(T, id, count, true);
    u32 result = b.reduction;  // the second wait keeps an early thread from starting the next reduction
    T.site = site;
    bar_sync(T, id, count, true);
    return result;
}

void check_barriers_at_exit(Thread& T) {
    for (u32 id = 0; id < 16; id++) {
        Barrier& b = B.barrier[id];
        if (b.arrived && !b.expected)
            fail(T, "DivergentBarrier", "this thread exits while %u others wait at barrier %u, at %s", b.arrived, id,
                 describe(b.waiting.front()->site).c_str());
    }
}

// The last lane of the mask returns true and acts for all; the others sleep until it has.
bool collective_last(Thread& T, int kind, u32 mask, void* arg, Collective& done) {
    Warp& warp = B.warp[T.warp];
    u32 me = 1u << T.lane;
    if (!(mask & me))
        fail(T, "DivergentWarp", "lane %d executes a warp instruction whose member mask is 0x%08x", T.lane, mask);
    if (mask & ~warp.alive)
        fail(T, "DivergentWarp", "member mask 0x%08x names exited or absent lanes (alive: 0x%08x)", mask, warp.alive);
    std::vector<Collective>& list = warp.pending;
    size_t i = 0;
    while (i < list.size() && !(list[i].mask == mask && list[i].kind == kind && list[i].site == T.site)) i++;
    if (i == list.size()) {
        for (const Collective& c : list)
            if (c.mask & mask)
                fail(T, "DivergentWarp",
                     "lanes 0x%08x of this warp wait with mask 0x%08x at %s, this lane has mask 0x%08x", c.arrived,
                     c.mask, describe(c.site).c_str(), mask);
        list.push_back({kind, T.site, mask, 0, {}});
    }
    list[i].arg[T.lane] = arg;
    list[i].arrived |= me;
    if (list[i].arrived != mask) return wait(T, "a warp instruction"), false;
    done = list[i];
    list.erase(list.begin() + long(i));
    return true;
}

void collective_done(Thread& T, u32 mask) {
    for (u32 m = mask & ~(1u << T.lane); m; m &= m - 1) wake(&B.thread[T.warp * 32 + __builtin_ctz(m)]);
}

template <class F>
static void each_lane(u32 mask, F&& f) {
    for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

void syncwarp(Thread& T, u32 mask) {
    collective(T, SYNCWARP, mask, &T, [&](void** arg) {
        Clock all = {};
        each_lane(mask, [&](int l) { all.join(((Thread*)arg[l])->seen); });
        each_lane(mask, [&](int l) { ((Thread*)arg[l])->seen = all; });
        B.clock[T.warp]++;
    });
}

struct LaneValue {
    u32 value, b, result;
    bool p;
};

static void shuffle_lanes(Thread& T, ShuffleMode mode, u32 c, u32 mask, void** arg) {
    int clamp = c & 31, segment = c >> 8 & 31;
    each_lane(mask, [&](int lane) {
        LaneValue* x = (LaneValue*)arg[lane];
        int b = x->b & 31, low = lane & segment, high = low | (clamp & ~segment);
        int from = mode == UP ? lane - b : mode == DOWN ? lane + b : mode == BFLY ? lane ^ b : low | (b & ~segment);
        x->p = mode == UP ? from >= high : from <= high;
        if (!x->p) from = lane;
        if (!(mask >> from & 1))
            fail(T, "DivergentWarp", "shfl: lane %d reads lane %d, which is not in the mask 0x%08x", lane, from, mask);
        x->result = ((LaneValue*)arg[from])->value;
    });
}

u32 shfl(Thread& T, ShuffleMode mode, u32 value, u32 b, u32 c, u32 mask, bool* in_range) {
    LaneValue mine{value, b, 0, false};
    collective(T, SHFL, mask, &mine, [&](void** arg) { shuffle_lanes(T, mode, c, mask, arg); });
    if (in_range) *in_range = mine.p;
    return mine.result;
}

u32 vote(Thread& T, VoteMode mode, bool p, u32 mask) {
    LaneValue mine{p, 0, 0, false};
    collective(T, VOTE, mask, &mine, [&](void** arg) {
        u32 yes = 0;
        each_lane(mask, [&](int l) { yes |= ((LaneValue*)arg[l])->value << l; });
        u32 result = mode == BALLOT ? yes
                     : mode == ALL  ? yes == mask
                     : mode == ANY  ? yes != 0
                                    : yes == 0 || yes == mask;
        each_lane(mask, [&](int l) { ((LaneValue*)arg[l])->result = result; });
    });
    return mine.result;
}

static u32 reduce(ReduxOp op, u32 a, u32 b) {
    switch (op) {
        case RX_ADD:
            return a + b;
        case RX_MINU:
            return std::min(a, b);
        case RX_MAXU:
            return std::max(a, b);
        case RX_MINS:
            return u32(std::min(s32(a), s32(b)));
        case RX_MAXS:
            return u32(std::max(s32(a), s32(b)));
        case RX_AND:
            return a & b;
        case RX_OR:
            return a | b;
        default:
            return a ^ b;
    }
}

u32 redux(Thread& T, ReduxOp op, u32 value, u32 mask) {
    LaneValue mine{value, 0, 0, false};
    collective(T, REDUX, mask, &mine, [&](void** arg) {
        int first = __builtin_ctz(mask);
        u32 result = ((LaneValue*)arg[first])->value;
        each_lane(mask & (mask - 1), [&](int l) { result = reduce(op, result, ((LaneValue*)arg[l])->value); });
        each_lane(mask, [&](int l) { ((LaneValue*)arg[l])->result = result; });
    });
    return mine.result;
}

u32 elect(Thread& T, u32 mask, bool* elected) {
    collective(T, ELECT, mask, nullptr, [](void**) {});
    *elected = T.lane == __builtin_ctz(mask);
    return u32(__builtin_ctz(mask));
}
}  // namespace ptx
