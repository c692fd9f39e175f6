#include "parallel.hpp"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <mutex>
#include <string>
#include <thread>

#include <nvpflow/error.hpp>

#include "float_mode.hpp"

#ifdef NVPFLOW_OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif

namespace nvpflow {
namespace {

#ifdef __linux__
/// Whole CPUs of this process's cgroup (v2, then v1), or 0 where there is no quota.
int quota_threads() {
  double quota = -1, period = 0;
  if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "re")) {
    if (std::fscanf(file, "%lf %lf", &quota, &period) != 2) quota = -1;  // "max 100000": no quota
    std::fclose(file);
  } else {
    const auto read_number = [](const char* path, double fallback) {
      double value = fallback;
      if (std::FILE* f = std::fopen(path, "re")) {
        if (std::fscanf(f, "%lf", &value) != 1) value = fallback;
        std::fclose(f);
      }
      return value;
    };
    quota = read_number("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", -1);
    period = read_number("/sys/fs/cgroup/cpu/cpu.cfs_period_us", 0);
  }
  return quota > 0 && period > 0 ? std::max(1, static_cast<int>(std::ceil(quota / period))) : 0;
}
#endif

int count_threads() {
  int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) threads = std::max(1, CPU_COUNT(&set));
  if (const int quota = quota_threads(); quota > 0) threads = std::min(threads, quota);
#endif
  return threads;
}

/// A whole number above 0 that the text is, or begins with before a comma; 0: none.
int leading_number(const char* text) {
  char* end = nullptr;
  errno = 0;
  const long value = std::strtol(text, &end, 10);
  while (*end == ' ' || *end == '\t') ++end;
  const bool good = end != text && errno == 0 && (*end == '\0' || *end == ',') && value > 0;
  return good ? static_cast<int>(std::min<long>(value, std::numeric_limits<int>::max())) : 0;
}

std::atomic<std::uint32_t> forks{0};

/// One parallel_for under way: parts are claimed one by one, so that a thread that the system has put aside holds up at
/// most the part it is in.
class Job {
 public:
  Job(std::int64_t count, std::int64_t grain, int threads, void (*fn)(void*, std::int64_t, std::int64_t), void* context)
      : count_(count), grain_(grain), units_((count + grain - 1) / grain), fn_(fn), context_(context) {
    // A few parts a thread even out differences in speed between them.
    parts_ = std::min<std::int64_t>(units_, threads > 1 ? std::int64_t{4} * threads : 1);
  }

  /// Works until no part is left to claim.
  void work() {
    const FloatMode mode;  // of a thread that started in its creator's, which may have been any
    for (std::int64_t part = 0; (part = next_.fetch_add(1, std::memory_order_relaxed)) < parts_;) {
      const std::int64_t begin = units_ * part / parts_ * grain_;
      const std::int64_t end = std::min(count_, units_ * (part + 1) / parts_ * grain_);
      try {
        fn_(context_, begin, end);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(failure_mutex_);
        if (failure_ == nullptr || part < failed_part_) {
          failed_part_ = part;
          failure_ = std::current_exception();
        }
      }
    }
  }

  void rethrow() const {
    if (failure_ != nullptr) std::rethrow_exception(failure_);
  }
  std::int64_t parts() const { return parts_; }

 private:
  std::int64_t count_, grain_, units_, parts_;
  void (*fn_)(void*, std::int64_t, std::int64_t);
  void* context_;
  std::atomic<std::int64_t> next_{0};
  std::mutex failure_mutex_;
  std::int64_t failed_part_ = 0;
  std::exception_ptr failure_;
};

#ifdef NVPFLOW_OPENMP

// GNU's runtime does not survive fork: the child inherits a team whose threads are gone and waits for them forever. The
// child therefore stays serial.
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });

void run(Job& job, int threads) {
  if (fork_generation() != 0 || omp_in_parallel() != 0) return job.work();
#pragma omp parallel num_threads(threads)
  job.work();
}

#else

void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Waits until done(), a short while on the processor, so that the next of several jobs in a row finds everyone awake.
template <class Done>
bool spin_until(Done done) {
  constexpr auto kSpin = std::chrono::microseconds(30);
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      pause_briefly();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

/// Worker threads of this process; started when first needed, asleep when idle, never joined. One job at a time:
/// a call that comes while it runs uses only its own thread, so that neither threads nor waiting pile up.
class Pool {
 public:
  /// False: the pool is taken; nothing was done.
  bool run(Job& job, int threads) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    grow(threads - 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      vacancies_ = threads - 1;
    }
    generation_.fetch_add(1);
    if (asleep_.load() > 0) generation_.notify_all();
    job.work();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;  // no worker joins any more
    }
    if (!spin_until([this] { return working_.load() == 0; })) {
      for (int n = working_.load(); n != 0; n = working_.load()) working_.wait(n);
    }
    busy_.store(false, std::memory_order_release);
    return true;
  }

 private:
  void grow(int workers) {
    if (workers_ >= workers) return;
    // Signals are the business of the program's own threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; workers_ < workers; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::exception&) {
      // No more threads or memory to be had: the caller does the work with those there are.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  [[noreturn]] void serve() {
    for (int seen = 0;;) {
      if (!spin_until([&] { return generation_.load() != seen; })) {
        asleep_.fetch_add(1);
        generation_.wait(seen);
        asleep_.fetch_sub(1);
      }
      seen = generation_.load();
      Job* job = nullptr;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (job_ == nullptr || vacancies_ == 0) continue;
        job = job_;
        --vacancies_;
        working_.fetch_add(1);
      }
      job->work();
      if (working_.fetch_sub(1) == 1) working_.notify_all();
    }
  }

  std::atomic<bool> busy_{false};
  int workers_ = 0;  // only the holder of busy_ looks at it
  std::mutex mutex_;
  Job* job_ = nullptr;
  int vacancies_ = 0;
  std::atomic<int> generation_{0};
  std::atomic<int> asleep_{0};
  std::atomic<int> working_{0};
};

std::atomic<Pool*> the_pool{nullptr};
// A child of fork has none of its parent's threads: it forgets the pool, whose locks may be held for ever, and makes
// a new one when it needs it.
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] {
  the_pool.store(nullptr);
  forks.fetch_add(1);
});

/// Never freed: workers may look at it until the process ends.
Pool& pool() {
  Pool* found = the_pool.load();
  if (found != nullptr) return *found;
  Pool* made = new Pool;
  if (the_pool.compare_exchange_strong(found, made)) return *made;
  delete made;
  return *found;
}

void run(Job& job, int threads) {
  if (!pool().run(job, threads)) job.work();
}

#endif

}  // namespace

std::uint32_t fork_generation() { return forks.load(std::memory_order_relaxed); }

int limited_threads(int threads, const char* own, const char* openmp) {
  if (own != nullptr && *own != '\0') {
    const int limit = std::strchr(own, ',') == nullptr ? leading_number(own) : 0;
    if (limit > 0) return std::min(threads, limit);
    throw Error(ErrorCode::unavailable, "NVPFLOW_NUM_THREADS is \"" + std::string(own).substr(0, 80) +
                                            "\", expected a whole number of threads from 1 on; change or unset it");
  }
  const int limit = openmp == nullptr ? 0 : leading_number(openmp);
  return limit > 0 ? std::min(threads, limit) : threads;
}

int available_threads() {
  // NOLINTNEXTLINE(concurrency-mt-unsafe): nothing here sets variables
  static const int threads = limited_threads(count_threads(), std::getenv("NVPFLOW_NUM_THREADS"),
                                             std::getenv("OMP_NUM_THREADS"));  // NOLINT(concurrency-mt-unsafe)
  return threads;
}

void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  void (*fn)(void* context, std::int64_t begin, std::int64_t end), void* context) {
  if (count <= 0) return;
  if (threads <= 1 || count <= grain) return fn(context, 0, count);
  Job job(count, grain, threads, fn, context);
  run(job, static_cast<int>(std::min<std::int64_t>(threads, job.parts())));
  job.rethrow();
}

}  // namespace nvpflow
