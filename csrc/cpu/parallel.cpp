#include "parallel.h"

#include <dlfcn.h>
#include <strings.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
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

// Looks for so long; whether done() came true.
template <class F>
bool spin(int microseconds, F&& done) {
    using clock = std::chrono::steady_clock;
    for (const auto until = clock::now() + std::chrono::microseconds(microseconds); clock::now() < until;)
        if (done()) return true;
    return false;
}

// Threads spin for a while for what others do, then they sleep: beside a busy process spinning ones use up the time
// that those with something to do wait for.
class Meeting {
public:
    template <class F>
    void wait(F&& done) {
        if (spin(200, done)) return;
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        changed_.wait(lock, done);
        sleepers_.fetch_sub(1);
    }
    // To be called after every change that somebody waits for. Whoever is not counted yet looks once more.
    void tell() {
        if (!sleepers_.load()) return;
        std::lock_guard<std::mutex> lock(mutex_);
        changed_.notify_all();
    }

private:
    std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable changed_;
};

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
            // Under a passive wait policy a runtime puts the caller to sleep that is done before the others; to be
            // woken takes it longer than equal shares differ.
            if (thread == 0) spin(50, [&] { return r.finished.load(std::memory_order_relaxed) == of; });
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
        finished_ = 0;
        ++posted_;
        meeting_.tell();
        take(0);
        meeting_.wait([&] { return finished_ == threads_; });
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
            meeting_.wait([&] { return posted_ != done; });
            done = posted_;
            if (done == dismissed) return;
            take(thread);
        }
    }
    void take(int thread) {
        attempt([&] {
            if (thread < shares_) body_(thread, shares_, body_context_);
        });
        ++finished_;
        meeting_.tell();
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
    Meeting meeting_;
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
    posted_ = dismissed;
    meeting_.tell();
}

}  // namespace

double wake_microseconds() { return wake().load(std::memory_order_relaxed); }
void set_wake_microseconds(double microseconds) { wake().store(microseconds, std::memory_order_relaxed); }

const char* team_kind() { return openmp().complete() ? "openmp" : "std::thread"; }

void run_team(int threads, void (*body)(int, int, void*), void* context) {
    if (!own_team) return run_region(threads, body, context);
    Team* const team = own_team;
    own_team = nullptr;  // a share that is split again would wait for itself
    team->run(threads, body, context);
    own_team = team;
}

void keep_team(int threads, void (*f)(void*), void* context) {
    Team team(f, context);
    run_region(threads, [](int thread, int of, void* p) { static_cast<Team*>(p)->member(thread, of); }, &team);
    team.pass_on();
}

}  // namespace llmfp4::cpu
