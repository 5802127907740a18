#include "parallel.h"

#include <dlfcn.h>
#include <strings.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <exception>
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

template <class F>
void wait_awake(F&& done) {
    for (int i = 0; !done(); ++i)
        if (i > 10000) std::this_thread::yield();
}

void run_region(int threads, void (*body)(int, int, void*), void* context) {
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

// The threads of one region. The first runs what it was given and posts shares; the others wait for them.
class Team {
public:
    Team(void (*f)(void*), void* context) : f_(f), f_context_(context) {}

    void member(int thread, int threads) {
        if (thread == 0)
            lead(threads);
        else
            follow(thread);
    }
    void run(int threads, void (*body)(int, int, void*), void* context) {
        body_ = body, body_context_ = context, shares_ = threads < threads_ ? threads : threads_;
        finished_.store(0, std::memory_order_relaxed);
        posted_.fetch_add(1, std::memory_order_release);
        take(0);
        wait_awake([&] { return finished_.load(std::memory_order_acquire) == threads_; });
        pass_on();
    }
    void pass_on() const {
        if (failed_.load()) std::rethrow_exception(error_);
    }

private:
    static constexpr int dismissed = -1;

    void lead(int threads);
    void follow(int thread) {
        for (int done = 0;;) {
            wait_awake([&] { return posted_.load(std::memory_order_acquire) != done; });
            done = posted_.load(std::memory_order_acquire);
            if (done == dismissed) return;
            take(thread);
        }
    }
    void take(int thread) {
        attempt([&] {
            if (thread < shares_) body_(thread, shares_, body_context_);
        });
        finished_.fetch_add(1, std::memory_order_release);
    }
    template <class F>
    void attempt(F&& f) {
        try {
            f();
        } catch (...) {
            if (!failed_.exchange(true)) error_ = std::current_exception();
        }
    }

    void (*f_)(void*);
    void* f_context_;
    int threads_ = 1, shares_ = 1;
    void (*body_)(int, int, void*) = nullptr;
    void* body_context_ = nullptr;
    std::atomic<int> posted_{0}, finished_{0};
    std::atomic<bool> failed_{false};
    std::exception_ptr error_;
};

thread_local Team* own_team = nullptr;

std::atomic<double>& wake() {
    static std::atomic<double> microseconds = [] {
        const char* policy = std::getenv("OMP_WAIT_POLICY");
        const bool asleep = !openmp().complete() || (policy && !strcasecmp(policy, "passive"));
        return asleep ? 45.0 : 3.0;  // 44-58 and 2.1-2.8 on a Xeon's two virtual cores
    }();
    return microseconds;
}

void Team::lead(int threads) {
    threads_ = threads;
    own_team = this;
    attempt([&] { f_(f_context_); });
    own_team = nullptr;
    posted_.store(dismissed, std::memory_order_release);
}

}  // namespace

double wake_microseconds() { return wake().load(std::memory_order_relaxed); }
void set_wake_microseconds(double microseconds) { wake().store(microseconds, std::memory_order_relaxed); }

const char* team_kind() { return openmp().complete() ? "openmp" : "std::thread"; }

void run_team(int threads, void (*body)(int, int, void*), void* context) {
    if (own_team)
        own_team->run(threads, body, context);
    else
        run_region(threads, body, context);
}

void keep_team(int threads, void (*f)(void*), void* context) {
    Team team(f, context);
    run_region(threads, [](int thread, int of, void* p) { static_cast<Team*>(p)->member(thread, of); }, &team);
    team.pass_on();
}

}  // namespace llmfp4::cpu
