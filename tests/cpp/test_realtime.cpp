// Real-time use: after prepare() calls allocate nothing, take no lock, start no thread and make no system call. What
// could is interposed and counted; system calls are counted by the kernel, which refuses each of them while a test
// counts.

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <dlfcn.h>
#include <doctest/doctest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include <nvpflow.h>
#include <nvpflow/flow.hpp>

#include "mixed_spec.hpp"

namespace {

// Of each thread.
thread_local constinit long allocations = 0;  // also what gives memory back
thread_local constinit long locks = 0;        // mutexes, conditions, semaphores
thread_local constinit long threads = 0;

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
void __libc_free(void* p);

void* malloc(std::size_t size) {
  ++allocations;
  return __libc_malloc(size);
}
void* calloc(std::size_t count, std::size_t size) {
  ++allocations;
  return __libc_calloc(count, size);
}
void* realloc(void* p, std::size_t size) {
  ++allocations;
  return __libc_realloc(p, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) {
  ++allocations;
  return __libc_memalign(alignment, size);
}
void* memalign(std::size_t alignment, std::size_t size) {
  ++allocations;
  return __libc_memalign(alignment, size);
}
int posix_memalign(void** p, std::size_t alignment, std::size_t size) {
  ++allocations;
  *p = __libc_memalign(alignment, size);
  return *p == nullptr ? ENOMEM : 0;
}
void free(void* p) {
  if (p != nullptr) ++allocations;
  __libc_free(p);
}

#define NVPFLOW_COUNTED(counter, name, parameters, arguments) \
  int name parameters {                                       \
    ++(counter);                                              \
    static auto* const real = next<int parameters>(#name);    \
    return real arguments;                                    \
  }
NVPFLOW_COUNTED(locks, pthread_mutex_lock, (pthread_mutex_t * m), (m))
NVPFLOW_COUNTED(locks, pthread_mutex_trylock, (pthread_mutex_t * m), (m))
NVPFLOW_COUNTED(locks, pthread_rwlock_rdlock, (pthread_rwlock_t * l), (l))
NVPFLOW_COUNTED(locks, pthread_rwlock_wrlock, (pthread_rwlock_t * l), (l))
NVPFLOW_COUNTED(locks, pthread_spin_lock, (pthread_spinlock_t * l), (l))
NVPFLOW_COUNTED(locks, pthread_cond_wait, (pthread_cond_t * c, pthread_mutex_t* m), (c, m))
NVPFLOW_COUNTED(locks, pthread_cond_signal, (pthread_cond_t * c), (c))
NVPFLOW_COUNTED(locks, pthread_cond_broadcast, (pthread_cond_t * c), (c))
NVPFLOW_COUNTED(locks, sem_wait, (sem_t * s), (s))
NVPFLOW_COUNTED(locks, sem_post, (sem_t * s), (s))
NVPFLOW_COUNTED(threads, pthread_create, (pthread_t * t, const pthread_attr_t* a, void* (*f)(void*), void* argument),
                (t, a, f, argument))

}  // extern "C"
#pragma GCC visibility pop

namespace {

struct Counts {
  long allocations, locks, threads;
};

template <class F>
Counts counted(F f) {
  const Counts before = {allocations, locks, threads};
  for (int i = 0; i < 100; ++i) f();
  return {allocations - before.allocations, locks - before.locks, threads - before.threads};
}

void check_none(const Counts& counts) {
  CHECK(counts.allocations == 0);
  CHECK(counts.locks == 0);
  CHECK(counts.threads == 0);
}

// ---- system calls ------------------------------------------------------------------------------------------------

volatile sig_atomic_t refused_calls = 0;
void count_refused(int) { refused_calls = refused_calls + 1; }

/// From now on every system call of this thread but exit_group and the return from a signal's handler is refused, with
/// SIGSYS, for ever. Calls of the vDSO (clock_gettime) are none. False: this kernel has no such filters.
bool refuse_system_calls() {
  struct sigaction action = {};
  action.sa_handler = count_refused;
  sigaction(SIGSYS, &action, nullptr);
  std::array<sock_filter, 5> program = {{
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),  // offsetof(seccomp_data, nr)
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_exit_group, 2, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_rt_sigreturn, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  }};
  sock_fprog filter = {static_cast<unsigned short>(program.size()), program.data()};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

constexpr int kNoFilter = 255;

/// How many system calls 100 times f() makes on its thread, up to 250, or kNoFilter. before() runs first and is not
/// counted. In a child process, for the refusal is for ever.
int system_calls(const std::function<void()>& before, const std::function<void()>& f) {
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    before();
    if (!refuse_system_calls()) _exit(kNoFilter);
    for (int i = 0; i < 100; ++i) f();
    syscall(SYS_exit_group, refused_calls < 250 ? static_cast<int>(refused_calls) : 250);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  REQUIRE(WIFEXITED(status));
  return WEXITSTATUS(status);
}

// ---- what is called ------------------------------------------------------------------------------------------------

template <class T>
struct Calls {
  nvpflow::Flow flow;
  std::int64_t rows;
  std::vector<T> x, z, out;

  Calls(std::int64_t n, nvpflow::DType dtype, nvpflow::Weights weights = nvpflow::Weights::full)
      : flow(nvpflow::FlowSpec::real_nvp(16, 4, {128}, nvpflow::Activation::silu, 1.0, true, dtype), 1, {},
             nvpflow::Precision::float32, weights),
        rows(n),
        x(static_cast<std::size_t>(n * 16), T(0.5)),
        z(x.size()),
        out(static_cast<std::size_t>(n)) {
    flow.set_num_threads(4);
  }

  void operator()() {
    flow.log_prob<T>(x, out);
    flow.forward<T>(x, z, out);
    flow.inverse<T>(x, z, out);
    flow.sample<T>(7, z);
    flow.sample_and_log_prob<T>(7, z, out);
    sum += flow.nll<T>(x);
  }
  double sum = 0;
};

/// The same of a flow with a context, in every way that a context is given: by rows, one for all, one for several rows
/// of a sample, and bound before the call.
template <class T>
struct ConditionalCalls {
  nvpflow::Flow flow;
  std::int64_t rows;
  std::vector<T> x, z, out, contexts;
  std::vector<double> x64;
  std::span<const T> one, half;
  nvpflow::ConditionedFlow given;

  ConditionalCalls(const nvpflow::FlowSpec& spec, std::int64_t n)
      : flow(spec, 1),
        rows(n),
        x(static_cast<std::size_t>(n * spec.input_size), T(0.5)),
        z(x.size()),
        out(static_cast<std::size_t>(n)),
        contexts(static_cast<std::size_t>(n * spec.context_size), T(0.25)),
        x64(x.begin(), x.end()),
        one(std::span(contexts).first(static_cast<std::size_t>(spec.context_size))),
        half(std::span(contexts).first(contexts.size() / (n % 2 == 0 ? 2 : 1))),
        given(flow.condition<T>(one)) {
    flow.set_num_threads(4);
  }

  void operator()() {
    for (const std::span<const T> context : {std::span<const T>(contexts), one}) {
      flow.log_prob<T>(x, out, context);
      flow.forward<T>(x, z, out, context);
      flow.inverse<T>(x, z, out, context);
      flow.sample<T>(7, z, 0, context);
      sum += flow.nll<T>(x, context);
      if (sizeof(T) == 4 && takes_float64_rows(flow.spec())) wide_rows(context);
    }
    flow.sample<T>(7, z, 0, half);
    given.template log_prob<T>(x, out);
    given.template forward<T>(x, z, out);
    given.template inverse<T>(x, z, out);
    given.template sample<T>(7, z);
    given.template sample_and_log_prob<T>(7, z, out);
    sum += given.template nll<T>(x);
  }
  void wide_rows(std::span<const T> context) {
    if constexpr (sizeof(T) == 4) {
      flow.log_prob(std::span<const double>(x64), std::span<float>(out), context);
      flow.inverse(std::span<const float>(z), std::span<double>(x64), std::span<float>(out), context);
      flow.sample_and_log_prob(7, std::span<double>(x64), std::span<float>(out), 0, context);
    }
  }
  double sum = 0;
};

/// Calls that work on calls.flow.
template <class C>
void check_calls(C& calls, std::int64_t rows) {
  Counts counts{};
  std::thread([&] {  // a thread that has called nothing yet
    calls.flow.prepare(rows);
    counts = counted(std::ref(calls));
  })
      .join();
  check_none(counts);
  int found = -1;
  std::thread([&] { found = system_calls([&] { calls.flow.prepare(rows); }, std::ref(calls)); }).join();
  if (found == kNoFilter) {
    MESSAGE("system calls not counted: this kernel has no seccomp filters");
  } else {
    CHECK(found == 0);
  }
}

template <class T>
void check_calls(std::int64_t rows, nvpflow::DType dtype, nvpflow::Weights weights = nvpflow::Weights::full) {
  Calls<T> calls(rows, dtype, weights);
  check_calls(calls, rows);
}

/// Calls while another thread replaces the parameters of calls.flow.
template <class C>
void check_calls_across_swaps(C& calls, std::int64_t rows) {
  nvpflow::Flow other(calls.flow.spec(), 2);
  std::atomic<bool> stop{false};
  std::atomic<long> swaps{0};
  std::thread writer;
  const auto start = [&] {
    calls.flow.prepare(rows);
    writer = std::thread([&] {
      while (!stop.load()) {
        calls.flow.swap(other);
        swaps.fetch_add(1);
      }
    });
  };
  const auto calls_across_a_swap = [&] {
    const long before = swaps.load();
    do calls();
    while (swaps.load() < before + 2);
  };
  const int found = system_calls(start, calls_across_a_swap);
  CHECK((found == 0 || found == kNoFilter));
  start();
  const Counts counts = counted(calls_across_a_swap);
  stop.store(true);
  writer.join();
  check_none(counts);
}

}  // namespace

TEST_CASE("the counters count") {
  // Through volatile pointers, or the compiler would leave the pairs out (clang does).
  void* (*volatile allocate)(std::size_t) = std::malloc;
  void (*volatile release)(void*) = std::free;
  CHECK(counted([&] { release(allocate(100)); }).allocations == 200);
  std::vector<int>* volatile kept;
  CHECK(counted([&] {
          kept = new std::vector<int>(10);
          delete kept;
        }).allocations >= 200);
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  CHECK(counted([&] {
          pthread_mutex_lock(&mutex);
          pthread_mutex_unlock(&mutex);
        }).locks == 100);
  CHECK(counted([] { std::thread([] {}).join(); }).threads == 100);
  const int found = system_calls([] {}, [] { syscall(SYS_getppid); });
  CHECK((found == 100 || found == kNoFilter));
}

TEST_CASE("after prepare, calls neither allocate nor lock nor make a system call nor use a thread") {
  for (const std::int64_t rows : {1, 3, 16, 100, 1000}) {
    CAPTURE(rows);
    check_calls<float>(rows, nvpflow::DType::float32);
    check_calls<float>(rows, nvpflow::DType::float32, nvpflow::Weights::bfloat16);
    check_calls<double>(rows, nvpflow::DType::float64);
  }
}

#ifndef NVPFLOW_OPENMP  // whose runtime is not interposed
TEST_CASE("without prepare a large batch does use threads: the test above is none that cannot fail") {
  Calls<float> calls(4000, nvpflow::DType::float32);
  calls();
  const Counts counts = counted(std::ref(calls));
  CHECK(counts.locks > 0);
  calls.flow.prepare(4000);
  check_none(counted(std::ref(calls)));
  calls.flow.prepare(0);
  CHECK(counted(std::ref(calls)).locks > 0);
}
#endif

TEST_CASE_TEMPLATE("the same with a context, through all kinds of layers and networks", T, float, double) {
  const nvpflow::DType dtype = sizeof(T) == 4 ? nvpflow::DType::float32 : nvpflow::DType::float64;
  const auto check = [&](std::int64_t features, std::uint64_t seed, std::int64_t rows) {
    CAPTURE(features);
    CAPTURE(seed);
    CAPTURE(rows);
    ConditionalCalls<T> calls(nvpflow::conditional_spec(features, seed, 3, dtype), rows);
    check_calls(calls, rows);
  };
  for (const std::int64_t rows : {1, 3, 16, 100}) {
    for (std::uint64_t seed = 0; seed < 4; ++seed) {
      check(1, seed, rows);
      check(6, seed, rows);
    }
  }
  check(6, 2, 1000);
}

TEST_CASE("a prepared thread stays real-time while another replaces the parameters") {
  Calls<float> calls(1, nvpflow::DType::float32);
  check_calls_across_swaps(calls, 1);
  for (const std::int64_t rows : {1, 20}) {
    ConditionalCalls<float> conditional(nvpflow::conditional_spec(6, 2, 3, nvpflow::DType::float32), rows);
    check_calls_across_swaps(conditional, rows);
  }
}

TEST_CASE("the C interface") {
  const std::string path = "test_realtime.safetensors";
  nvpflow::Flow(nvpflow::FlowSpec::real_nvp(5, 2, {32}), 3).save(path);
  nvpflow_flow* flow = nullptr;
  REQUIRE(nvpflow_load(path.c_str(), &flow) == NVPFLOW_OK);
  std::remove(path.c_str());
  REQUIRE(nvpflow_prepare(flow, 8) == NVPFLOW_OK);
  std::vector<float> x(40, 0.25f), z(40), out(8);
  long bad = 0;
  const auto calls = [&] {
    bad += nvpflow_log_prob_f32(flow, x.data(), 8, out.data());
    bad += nvpflow_forward_f32(flow, x.data(), 8, z.data(), out.data());
    bad += nvpflow_inverse_f32(flow, x.data(), 8, z.data(), nullptr);
    bad += nvpflow_sample_f32(flow, 1, 0, 8, z.data());
  };
  check_none(counted(calls));
  const int found = system_calls([&] { nvpflow_prepare(flow, 8); }, calls);
  CHECK((found == 0 || found == kNoFilter));
  CHECK(bad == 0);
  nvpflow_free(flow);
}

TEST_CASE("the C interface with a context") {
  const std::string path = "test_realtime_context.safetensors";
  nvpflow::Flow(nvpflow::conditional_spec(5, 2, 3, nvpflow::DType::float32), 3).save(path);
  nvpflow_flow *flow = nullptr, *given = nullptr;
  REQUIRE(nvpflow_load(path.c_str(), &flow) == NVPFLOW_OK);
  std::remove(path.c_str());
  std::vector<float> x(40, 0.25f), z(40), out(8), contexts(24, 0.5f);
  const float* c = contexts.data();
  REQUIRE(nvpflow_condition_f32(flow, c, &given) == NVPFLOW_OK);
  REQUIRE(nvpflow_prepare(given, 8) == NVPFLOW_OK);
  long bad = 0;
  const auto calls = [&] {
    for (const std::int64_t n : {1, 8}) {
      bad += nvpflow_log_prob_context_f32(flow, x.data(), 8, c, n, out.data());
      bad += nvpflow_forward_context_f32(flow, x.data(), 8, c, n, z.data(), out.data());
      bad += nvpflow_inverse_context_f32(flow, x.data(), 8, c, n, z.data(), nullptr);
      bad += nvpflow_sample_context_f32(flow, 1, 0, 8, c, n == 1 ? 1 : 4, z.data());
      bad += nvpflow_log_prob_f32(given, x.data(), n, out.data());
      bad += nvpflow_forward_f32(given, x.data(), n, z.data(), out.data());
      bad += nvpflow_inverse_f32(given, x.data(), n, z.data(), nullptr);
      bad += nvpflow_sample_f32(given, 1, 0, n, z.data());
    }
  };
  check_none(counted(calls));
  const int found = system_calls([&] { nvpflow_prepare(given, 8); }, calls);
  CHECK((found == 0 || found == kNoFilter));
  CHECK(bad == 0);
  nvpflow_free(flow);
  nvpflow_free(given);
}
