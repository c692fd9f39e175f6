// The only place that knows threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

#include <nvpflow/threads.hpp>

namespace nvpflow {

/// `wanted`, or as many as this process may use where that is 0.
inline int threads_or_available(int wanted) { return wanted > 0 ? wanted : available_threads(); }

/// `threads`, or the limit that NVPFLOW_NUM_THREADS (`own`) or else OMP_NUM_THREADS (`openmp`) sets where that is less;
/// null or empty: not set. Of OpenMP's list, one number for each level of nesting, the first counts; it sets no limit
/// unless it is a number above 0. In our own variable anything else is Error(unavailable).
int limited_threads(int threads, const char* own, const char* openmp);

/// How many forks lie between this process and the one that loaded the library.
std::uint32_t fork_generation();

/// A value that is created again in a forked child. Threads of the parent, which do not exist in the child, may have
/// locked the parent's copy or counted themselves in it. Its state is unknown, so the child leaves it as it is.
template <class Value>
class PerProcess {
 public:
  PerProcess() : current_(new Tagged{fork_generation(), {}}) {}
  ~PerProcess() { delete current_.load(); }
  PerProcess(const PerProcess&) = delete;
  PerProcess& operator=(const PerProcess&) = delete;

  Value& get() {
    Tagged* found = current_.load(std::memory_order_acquire);
    if (found->generation == fork_generation()) return found->value;
    auto* made = new Tagged{fork_generation(), {}};
    if (current_.compare_exchange_strong(found, made)) return made->value;
    delete made;
    return found->value;
  }

 private:
  struct Tagged {
    std::uint32_t generation;
    Value value;
  };
  std::atomic<Tagged*> current_;
};

/// A std::mutex that a forked child can lock whoever held it in the parent.
class ForkSafeMutex {
 public:
  void lock() { mutex_.get().lock(); }
  void unlock() { mutex_.get().unlock(); }

 private:
  PerProcess<std::mutex> mutex_;
};

/// Calls fn(context, begin, end) on consecutive parts of [0, count) that cover it exactly, each a multiple of `grain`
/// but the last, on at most `threads` threads, and returns when all are done. One part or one thread: a plain call that
/// never touches the threads. A call from inside another, or while another thread's is under way, uses only its
/// own thread. An exception is carried to the caller (the first in order of the parts). Results must not depend on how
/// the range is cut.
void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  void (*fn)(void* context, std::int64_t begin, std::int64_t end), void* context);

template <class F>
void parallel_for(std::int64_t count, std::int64_t grain, int threads, F&& f) {
  parallel_for(
      count, grain, threads,
      [](void* context, std::int64_t begin, std::int64_t end) { (*static_cast<F*>(context))(begin, end); }, &f);
}

}  // namespace nvpflow
