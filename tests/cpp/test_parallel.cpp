// The threads: parts cover a range once, exceptions reach the caller, nobody waits for a pool that is taken, signals
// are left to the program's own threads.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <cfenv>
#include <chrono>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <nvpflow/error.hpp>

#include "float_mode.hpp"
#include "parallel.hpp"

using nvpflow::parallel_for;

namespace {

/// Until so many threads have come here, or five seconds have passed (a busy machine): a part that others are to join.
void linger(std::atomic<int>& arrived, int wanted) {
  arrived.fetch_add(1);
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(5);
  while (arrived.load() < wanted && std::chrono::steady_clock::now() < end) std::this_thread::yield();
}

/// By what sums say: the standard's fegetround may look at another unit than the one that computes.
bool rounds_to_nearest() {
  const volatile double one = 1, little = 1e-30;
  return one + little == 1 && one - little == 1 && -one - little == -1;
}

}  // namespace

TEST_CASE("parts cover the range exactly once, on several threads") {
  for (const std::int64_t count : {0, 1, 7, 64, 1000}) {
    for (const std::int64_t grain : {1, 8, 64}) {
      for (const int threads : {1, 2, 5}) {
        std::vector<std::atomic<int>> seen(static_cast<std::size_t>(count));
        parallel_for(count, grain, threads, [&](std::int64_t begin, std::int64_t end) {
          CHECK(begin % grain == 0);
          CHECK((end % grain == 0 || end == count));
          for (std::int64_t i = begin; i < end; ++i) seen[static_cast<std::size_t>(i)].fetch_add(1);
        });
        for (const std::atomic<int>& times : seen) CHECK(times.load() == 1);
      }
    }
  }
  std::mutex mutex;
  std::set<std::thread::id> ids;
  std::atomic<int> arrived{0};
  parallel_for(3, 1, 3, [&](std::int64_t, std::int64_t) {
    linger(arrived, 3);
    const std::lock_guard<std::mutex> lock(mutex);
    ids.insert(std::this_thread::get_id());
  });
  CHECK(ids.size() == 3);
}

TEST_CASE("the environment bounds the threads") {
  using nvpflow::limited_threads;
  CHECK(limited_threads(8, nullptr, nullptr) == 8);
  CHECK(limited_threads(8, "3", "2") == 3);
  CHECK(limited_threads(8, "16", "2") == 8);
  CHECK(limited_threads(8, "", "2") == 2);
  CHECK(limited_threads(8, nullptr, "4,2") == 4);
  CHECK(limited_threads(8, nullptr, " 5 ,2") == 5);
  for (const char* nonsense : {"", "0", "-1", "many", "3x", ",2", "99999999999999999999"}) {
    CHECK(limited_threads(8, nullptr, nonsense) == 8);
    if (*nonsense != '\0') CHECK_THROWS_AS(limited_threads(8, nonsense, nullptr), nvpflow::Error);
  }
  CHECK_THROWS_AS(limited_threads(8, "4,2", nullptr), nvpflow::Error);  // the list is OpenMP's
}

TEST_CASE("every thread computes in one mode, and the caller gets its own back") {
  // Both ways: threads that start in another mode, and a caller that changes its own when they have started.
  int other_modes = 0;
  for (const int mode : {FE_UPWARD, FE_DOWNWARD, FE_TONEAREST, FE_TOWARDZERO}) {
    std::fesetround(mode);
    std::atomic<int> arrived{0}, wrong{0};
    parallel_for(3, 1, 3, [&](std::int64_t, std::int64_t) {
      linger(arrived, 3);
      wrong.fetch_add(!rounds_to_nearest());
    });
    CHECK(wrong.load() == 0);
    other_modes += std::fegetround() == mode;
    {
      const nvpflow::FloatMode here;
    }
    other_modes += std::fegetround() == mode;
  }
  std::fesetround(FE_TONEAREST);
  CHECK(other_modes == 8);
}

#if defined(__x86_64__)
TEST_CASE("subnormal numbers are kept where the caller flushes them") {
  const unsigned before = _mm_getcsr();
  const unsigned flushing = (before & ~0x3fu) | 0x8040;  // flush to zero, subnormals are zeros
  _mm_setcsr(flushing);
  volatile float tiny = 1e-40f;
  std::atomic<int> arrived{0}, lost{0};
  parallel_for(3, 1, 3, [&](std::int64_t, std::int64_t) {
    linger(arrived, 3);
    lost.fetch_add(tiny * 1.0f == 0.0f);
  });
  const bool kept = (_mm_getcsr() & ~0x3fu) == flushing;
  _mm_setcsr(before);
  CHECK(lost.load() == 0);
  CHECK(kept);
}
#endif

TEST_CASE("the first part's exception reaches the caller, and the threads can be used on") {
  for (int round = 0; round < 200; ++round) {
    std::string message;
    std::atomic<int> arrived{0};
    try {
      parallel_for(4, 1, 4, [&](std::int64_t begin, std::int64_t) {
        if (round == 0) linger(arrived, 4);
        if (begin >= 1) throw std::runtime_error("part " + std::to_string(begin));
      });
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    CHECK(message == "part 1");
  }
}

TEST_CASE("a call from inside another, or beside it, works alone in its own thread") {
  std::atomic<int> inside{0}, elsewhere{0};
  parallel_for(4, 1, 4, [&](std::int64_t, std::int64_t) {
    const std::thread::id mine = std::this_thread::get_id();
    parallel_for(100, 1, 4, [&](std::int64_t begin, std::int64_t end) {
      inside.fetch_add(static_cast<int>(end - begin));
      if (std::this_thread::get_id() != mine) elsewhere.fetch_add(1);
    });
  });
  CHECK(inside.load() == 400);
  CHECK(elsewhere.load() == 0);

  // The pool is taken until the second call is over: if that waited for it, both would wait for ever.
  std::atomic<bool> taken{false}, over{false};
  std::thread first([&] {
    parallel_for(2, 1, 2, [&](std::int64_t, std::int64_t) {
      taken.store(true);
      while (!over.load()) std::this_thread::yield();
    });
  });
  while (!taken.load()) std::this_thread::yield();
  int covered = 0;
  bool same = true;
  const std::thread::id mine = std::this_thread::get_id();
  parallel_for(100, 1, 4, [&](std::int64_t begin, std::int64_t end) {
    covered += static_cast<int>(end - begin);
    same = same && std::this_thread::get_id() == mine;
  });
  over.store(true);
  first.join();
  CHECK(covered == 100);
  CHECK(same);
}

TEST_CASE("workers block every signal, the caller's mask stays") {
  sigset_t before, after;
  pthread_sigmask(SIG_BLOCK, nullptr, &before);
  const std::thread::id mine = std::this_thread::get_id();
  std::atomic<int> arrived{0}, workers{0}, open{0};
  parallel_for(3, 1, 3, [&](std::int64_t, std::int64_t) {
    linger(arrived, 3);
    if (std::this_thread::get_id() == mine) return;
    workers.fetch_add(1);
    sigset_t mask;
    pthread_sigmask(SIG_BLOCK, nullptr, &mask);
    for (const int signal : {SIGINT, SIGTERM, SIGUSR1, SIGALRM, SIGCHLD}) {
      if (sigismember(&mask, signal) != 1) open.fetch_add(1);
    }
  });
  pthread_sigmask(SIG_BLOCK, nullptr, &after);
  CHECK(workers.load() == 2);
  CHECK(open.load() == 0);
  for (const int signal : {SIGINT, SIGTERM, SIGUSR1})
    CHECK(sigismember(&before, signal) == sigismember(&after, signal));
}
