// One-row calls after the first allocate nothing and take no lock: malloc and pthread_mutex_lock are interposed and
// counted.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <dlfcn.h>
#include <doctest/doctest.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <vector>

#include <nvpflow/flow.hpp>

namespace {

std::atomic<long> allocations{0};
std::atomic<long> locks{0};

template <class F>
F* next(const char* name) {
  return reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

// Visible, or calls from within libstdc++ would not come here: the build hides symbols, and clang these too.
#pragma GCC visibility push(default)
extern "C" {

// glibc's own names for the functions that are replaced here.
void* __libc_malloc(std::size_t size);
void* __libc_calloc(std::size_t count, std::size_t size);
void* __libc_realloc(void* p, std::size_t size);
void* __libc_memalign(std::size_t alignment, std::size_t size);

void* malloc(std::size_t size) {
  allocations.fetch_add(1);
  return __libc_malloc(size);
}
void* calloc(std::size_t count, std::size_t size) {
  allocations.fetch_add(1);
  return __libc_calloc(count, size);
}
void* realloc(void* p, std::size_t size) {
  allocations.fetch_add(1);
  return __libc_realloc(p, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) {
  allocations.fetch_add(1);
  return __libc_memalign(alignment, size);
}

int pthread_mutex_lock(pthread_mutex_t* mutex) {
  locks.fetch_add(1);
  static auto* const real = next<int(pthread_mutex_t*)>("pthread_mutex_lock");
  return real(mutex);
}

}  // extern "C"
#pragma GCC visibility pop

namespace {

struct Counts {
  long allocations, locks;
};

template <class F>
Counts counted(F f) {
  const Counts before = {allocations.load(), locks.load()};
  for (int i = 0; i < 100; ++i) f();
  return {allocations.load() - before.allocations, locks.load() - before.locks};
}

template <class T>
void check_calls(std::int64_t rows, nvpflow::DType dtype) {
  const nvpflow::FlowSpec spec = nvpflow::FlowSpec::real_nvp(16, 4, {128}, nvpflow::Activation::silu, 1.0, true, dtype);
  nvpflow::Flow flow(spec, 1);
  flow.set_num_threads(1);
  const std::vector<T> x(static_cast<std::size_t>(rows * 16), T(0.5));
  std::vector<T> z(x.size()), out(static_cast<std::size_t>(rows));
  const auto calls = [&] {
    flow.log_prob<T>(x, out);
    flow.forward<T>(x, z, out);
    flow.inverse<T>(x, z, out);
    flow.sample<T>(7, z);
  };
  calls();  // the first call of a thread makes its scratch
  const Counts counts = counted(calls);
  CHECK(counts.allocations == 0);
  CHECK(counts.locks == 0);
}

}  // namespace

TEST_CASE("the counters count") {
  // Through volatile pointers, or the compiler would leave the pairs out (clang does).
  void* (*volatile allocate)(std::size_t) = std::malloc;
  void (*volatile release)(void*) = std::free;
  CHECK(counted([&] { release(allocate(100)); }).allocations == 100);
  std::vector<int>* volatile kept;
  CHECK(counted([&] {
          kept = new std::vector<int>(10);
          delete kept;
        }).allocations >= 100);
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  CHECK(counted([&] {
          pthread_mutex_lock(&mutex);
          pthread_mutex_unlock(&mutex);
        }).locks == 100);
}

TEST_CASE("calls on one thread neither allocate nor lock") {
  for (const std::int64_t rows : {1, 3, 16, 100, 1000}) {
    CAPTURE(rows);
    check_calls<float>(rows, nvpflow::DType::float32);
    check_calls<double>(rows, nvpflow::DType::float64);
  }
}
