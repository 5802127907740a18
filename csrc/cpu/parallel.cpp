#include "parallel.h"

#include <dlfcn.h>

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
    } region{body, context};
    // The runtime may grant fewer threads than asked for; shares follow what it granted.
    openmp().parallel(
        [](void* p) {
            auto& r = *static_cast<Region*>(p);
            r.body(openmp().thread_num(), openmp().num_threads(), r.context);
        },
        &region, unsigned(threads), 0);
}

}  // namespace llmfp4::cpu
