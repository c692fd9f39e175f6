#include "parallel.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <exception>
#include <string>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
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

#ifdef _OPENMP
// GNU's runtime does not survive fork: the child inherits a team whose threads are gone and waits for them forever. The
// child therefore stays serial.
std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

bool may_start_team() { return !forked.load(std::memory_order_relaxed) && omp_in_parallel() == 0; }
#endif

}  // namespace

int available_threads() {
  static const int threads = count_threads();
  return threads;
}

void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  void (*fn)(void* context, std::int64_t begin, std::int64_t end), void* context) {
  if (count <= 0) return;
  const std::int64_t units = (count + grain - 1) / grain;
  const int parts = static_cast<int>(std::min<std::int64_t>(units, std::max(1, threads)));
#ifdef _OPENMP
  if (parts > 1 && may_start_team()) {
    std::atomic<int> first_failed{parts};
    std::exception_ptr failure;
#pragma omp parallel for num_threads(parts) schedule(static, 1)
    for (int part = 0; part < parts; ++part) {
      const std::int64_t begin = units * part / parts * grain;
      const std::int64_t end = std::min(count, units * (part + 1) / parts * grain);
      try {
        fn(context, begin, end);
      } catch (...) {
#pragma omp critical(nvpflow_failure)
        if (part < first_failed.load()) {
          first_failed.store(part);
          failure = std::current_exception();
        }
      }
    }
    if (failure) std::rethrow_exception(failure);
    return;
  }
#endif
  fn(context, 0, count);
}

}  // namespace nvpflow
