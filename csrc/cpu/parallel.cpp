#include "parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace llmfp4::cpu {
namespace {

// The entry points gcc's `#pragma omp parallel` compiles to; libgomp, libomp and libiomp5 all export them.
struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
    int (*thread_num)();
    int (*num_threads)();

    OpenMP()
        : parallel(reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"))),
          thread_num(reinterpret_cast<decltype(thread_num)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"))),
          num_threads(reinterpret_cast<decltype(num_threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"))) {}
    bool complete() const { return parallel && thread_num && num_threads; }
};

const OpenMP& openmp() {
    static const OpenMP found;
    return found;
}

// Under a passive wait policy a runtime puts the caller to sleep that is done before the others; to be woken takes it
// longer than equal shares differ.
template <class F>
void wait_briefly(F&& done) {
    using clock = std::chrono::steady_clock;
    for (const auto until = clock::now() + std::chrono::microseconds(50); !done() && clock::now() < until;) {}
}

}  // namespace

const char* team_kind() { return openmp().complete() ? "openmp" : "std::thread"; }

void run_team(int threads, void (*body)(int, int, void*), void* context) {
    if (!openmp().complete()) {
        std::vector<std::thread> team;
        for (int t = 1; t < threads; ++t) team.emplace_back(body, t, threads, context);
        body(0, threads, context);
        for (auto& member : team) member.join();
        return;
    }
    struct Region {
        void (*body)(int, int, void*);
        void* context;
        std::atomic<int> finished;
    } region{body, context, {0}};
    // The runtime may grant fewer threads than asked for; shares follow what it granted.
    openmp().parallel(
        [](void* p) {
            auto& r = *static_cast<Region*>(p);
            const int thread = openmp().thread_num(), of = openmp().num_threads();
            r.body(thread, of, r.context);
            r.finished.fetch_add(1, std::memory_order_relaxed);
            if (thread == 0) wait_briefly([&] { return r.finished.load(std::memory_order_relaxed) == of; });
        },
        &region, unsigned(threads), 0);
}

}  // namespace llmfp4::cpu
