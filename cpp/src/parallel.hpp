// The only place that knows threads.
#pragma once

#include <cstdint>

namespace nvpflow {

/// Threads this process may use: its affinity mask, cut to the cgroup's CPU quota. At least 1.
int available_threads();

/// Calls fn(context, begin, end) on consecutive parts of [0, count) that cover it exactly, each a multiple of `grain`
/// but the last, on at most `threads` threads, and returns when all are done. One part or one thread: a plain call that
/// never touches the threads. A call from inside another, or while another thread's is under way, works alone in its
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
