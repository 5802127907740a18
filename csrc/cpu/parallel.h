// One thread team per process: the OpenMP runtime that torch already loaded, found at run time.
// Linking our own would give a second team, and two teams spinning on the same cores cost more than they bring.
#pragma once
#include <type_traits>

namespace llmfp4::cpu {

// Run body(thread, threads, context) on `threads` threads, the caller being one of them, and wait for all.
void run_team(int threads, void (*body)(int thread, int threads, void* context), void* context);

// Calls f(context) on this thread while threads - 1 others are awake for each run_team within it, and passes on what
// they throw. A product of many rows has up to three shares, and a passive team would be woken for each (192 x 576, m =
// 512: two threads took 1.2 times as long as one, with this 0.62).
void keep_team(int threads, void (*f)(void* context), void* context);

template <class F>
void with_team(int threads, F&& f) {
    if (threads <= 1) return f();
    keep_team(threads, [](void* p) { (*static_cast<std::remove_reference_t<F>*>(p))(); }, &f);
}

// What the start of a team takes: its threads sleep under OMP_WAIT_POLICY=passive, otherwise they spin for a while.
double wake_microseconds();
void set_wake_microseconds(double);

// "openmp" if the process has an OpenMP runtime, otherwise "std::thread".
const char* team_kind();

// Runs f(begin, end) on contiguous shares of 0..count; no more threads than there are items.
template <class F>
void parallel_ranges(int threads, long count, F&& f) {
    if (count <= 0) return;
    if (threads > count) threads = int(count);
    if (threads <= 1) return f(0L, count);
    struct Context {
        F* f;
        long count;
    } context{&f, count};
    run_team(
        threads,
        [](int thread, int of, void* p) {
            auto& c = *static_cast<Context*>(p);
            const long begin = c.count * thread / of, end = c.count * (thread + 1) / of;
            if (begin < end) (*c.f)(begin, end);
        },
        &context);
}

// Threads worth waking to convert so many numbers.
inline int threads_to_convert(long numbers, int threads) { return numbers < 65536 ? 1 : threads; }

}  // namespace llmfp4::cpu
