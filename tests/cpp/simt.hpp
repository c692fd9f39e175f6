// The CUDA kernels on a host: a second implementation of what cuda/device.cuh takes from the hardware. Included by it
// where NVPFLOW_SIMT is defined; for tests only.
//
// Every thread of a block is a fiber, blocks run one after the other. Barriers, shuffles and matrix instructions are
// the points where fibers switch. What this finds, and says with the source lines:
//   - threads that wait for each other at different barriers, or for threads that have ended;
//   - reads of shared memory that nothing wrote: it holds NaN before each block;
//   - accesses of several numbers that read some of global memory which nothing wrote, also where nobody uses them:
//   compute-sanitizer's initcheck would call them errors;
//   - accesses beyond the shared memory asked for, or beyond a GuardedArray: both end at a page that may not be
//   touched;
//   - missing barriers: fibers run in ascending, descending or mixed order, so a thread that reads what another has yet
//     to write gets NaN or old numbers in one of the orders;
//   - a missing wait for an asynchronous copy, or a copy over memory still being read: the target turns to NaN when the
//     copy is issued, and the bytes arrive only when the thread waits for them.
// Matrix instructions follow the operand layouts of the PTX manual. Their sums are modelled on the safe side of what is
// known of the hardware (Fasi, Higham, Mikaitis and Pranesh 2021): all addends are cut off, not rounded, at 24 bits
// below the largest one.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace nvpflow::simt {

/// What went wrong in a kernel, with the block, the thread and the source line.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { ascending, descending, mixed };

/// Order in which the runnable threads of a block are taken.
inline Order order = Order::ascending;
/// Largest dynamic shared memory that a launch may ask for.
inline std::int64_t shared_limit = 227 << 10;

inline std::size_t page_size() {
  static const auto size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

/// Bytes that end, up to their alignment of 16, at a page that may not be touched, and begin after another.
class GuardedBytes {
 public:
  explicit GuardedBytes(std::size_t bytes) : bytes_(bytes) {
    const std::size_t page = page_size();
    inner_ = (bytes + 15 + page) / page * page;
    void* p = mmap(nullptr, inner_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<unsigned char*>(p);
    mprotect(base_ + page, inner_, PROT_READ | PROT_WRITE);
    std::memset(base_ + page, 0xff, inner_);  // NaN, in floats and doubles
    data_ = base_ + page + inner_ - (bytes + 15) / 16 * 16;
  }
  ~GuardedBytes() { munmap(base_, inner_ + 2 * page_size()); }
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;

  unsigned char* data() const { return data_; }
  std::size_t size() const { return bytes_; }
  /// Whether the bytes around the data are as they were.
  bool intact() const {
    for (const unsigned char* p = base_ + page_size(); p < base_ + page_size() + inner_; ++p) {
      if ((p < data_ || p >= data_ + bytes_) && *p != 0xff) return false;
    }
    return true;
  }

 private:
  std::size_t bytes_, inner_ = 0;
  unsigned char* base_ = nullptr;
  unsigned char* data_ = nullptr;
};

/// An array of "global memory": NaN until written, guarded at both ends.
template <class T>
class GuardedArray {
 public:
  explicit GuardedArray(std::size_t count) : count_(count), bytes_(std::make_unique<GuardedBytes>(count * sizeof(T))) {}
  explicit GuardedArray(const std::vector<T>& from) : GuardedArray(from.size()) {
    if (!from.empty()) std::memcpy(bytes_->data(), from.data(), count_ * sizeof(T));
  }
  T* data() const { return reinterpret_cast<T*>(bytes_->data()); }
  std::size_t size() const { return count_; }
  T& operator[](std::size_t i) const { return data()[i]; }
  std::vector<T> values() const { return {data(), data() + count_}; }
  bool intact() const { return bytes_->intact(); }

 private:
  std::size_t count_;
  std::unique_ptr<GuardedBytes> bytes_;
};

// ---- fibers ------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};

/// Saves what a function must preserve, and goes on where `to` left off.
__attribute__((naked, noinline, noipa)) inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
inline void switch_context(Context& from, Context& to) { switch_stack(&from.stack_pointer, to.stack_pointer); }
inline void make_context(Context& context, unsigned char* stack, std::size_t size, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(stack + size - 64);
  top[0] = reinterpret_cast<void*>(entry);
  top[1] = nullptr;
  context.stack_pointer = top - 6;
  std::memset(top - 6, 0, 6 * sizeof(void*));
}
#else
struct Context {
  ucontext_t context;
};
inline void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
inline void make_context(Context& context, unsigned char* stack, std::size_t size, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = size;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
#endif

struct Copy {
  void* to;
  const void* from;
};

struct Thread {
  Context context;
  bool done = false;
  const std::uint64_t* generation = nullptr;  // waits while it equals `seen`; null: runs
  std::uint64_t seen = 0;
  const char* operation = "";
  std::source_location where;
  std::vector<std::vector<Copy>> groups;  // asynchronous copies committed and not yet waited for
  std::vector<Copy> open;                 // and not yet committed

  bool runnable() const { return !done && (generation == nullptr || *generation != seen); }
};

/// A point where `members` threads meet.
struct Meeting {
  int arrived = 0;
  std::uint64_t generation = 0;
  const char* operation = "";
  std::source_location where;
};

struct Warp : Meeting {
  void* operands[32] = {};
};

constexpr std::size_t kStackBytes = 64 << 10;

/// One block at a time.
class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  void run(const std::function<void()>& kernel, std::int64_t blocks, int threads, std::int64_t shared_bytes) {
    if (threads <= 0 || threads > 1024 || threads % 32 != 0) throw Failure("a block of " + std::to_string(threads));
    if (shared_bytes > shared_limit) throw Failure("shared memory of " + std::to_string(shared_bytes) + " bytes");
    kernel_ = &kernel;
    num_blocks_ = static_cast<int>(blocks);
    if (stacks_.size() < static_cast<std::size_t>(threads) * kStackBytes) {
      stacks_.resize(static_cast<std::size_t>(threads) * kStackBytes);
    }
    const Signals signals;
    for (block_ = 0; block_ < num_blocks_; ++block_) {
      const GuardedBytes shared(static_cast<std::size_t>(shared_bytes));
      shared_ = shared.data();
      shared_bytes_ = shared_bytes;
      run_block(threads);
      if (!shared.intact()) throw Failure("block " + std::to_string(block_) + " wrote outside its shared memory");
    }
  }

  int thread() const { return static_cast<int>(current_); }
  int threads() const { return static_cast<int>(threads_.size()); }
  int block() const { return block_; }
  int blocks() const { return num_blocks_; }
  unsigned char* shared() const { return shared_; }
  bool is_shared(const void* p) const { return p >= shared_ && p < shared_ + shared_bytes_; }
  Thread& me() { return threads_[current_]; }

  /// Waits until all threads of the block are here.
  void meet_block(std::source_location where) { meet(block_meeting_, threads(), "barrier", where); }

  /// Waits until the warp is here; the last thread runs `work` on what all of them brought.
  void meet_warp(const char* operation, void* operand, void (*work)(void* const*), std::source_location where) {
    Warp& warp = warps_[current_ / 32];
    warp.operands[current_ % 32] = operand;
    if (warp.arrived == 31 && work != nullptr && warp.operation == operation) work(warp.operands);
    meet(warp, 32, operation, where);
  }

  /// Ends the kernel: back to run(), which throws.
  [[noreturn]] void fail(const std::string& message) {
    failure_ = message;
    switch_context(dead_, main_);
    std::abort();
  }

  std::string place() const { return "block " + std::to_string(block_) + ", thread " + std::to_string(current_); }

 private:
  static std::string describe(const char* operation, const std::source_location& where) {
    return std::string(operation) + " at " + where.file_name() + ":" + std::to_string(where.line());
  }

  /// Turns a touch of a guard page into a Failure.
  class Signals {
   public:
    Signals() {
      struct sigaction action = {};
      action.sa_handler = [](int) {
        get().fail("out of bounds: " + get().place() + " touched memory beyond an array");
      };
      action.sa_flags = SA_NODEFER;
      sigemptyset(&action.sa_mask);
      sigaction(SIGSEGV, &action, &segv_);
      sigaction(SIGBUS, &action, &bus_);
    }
    ~Signals() {
      sigaction(SIGSEGV, &segv_, nullptr);
      sigaction(SIGBUS, &bus_, nullptr);
    }
    Signals(const Signals&) = delete;
    Signals& operator=(const Signals&) = delete;

   private:
    struct sigaction segv_ = {}, bus_ = {};
  };

  static void entry() {
    Machine& m = get();
    (*m.kernel_)();
    m.me().done = true;
    ++m.ended_;
    m.next();
    std::abort();  // a thread that has ended is never chosen again
  }

  void run_block(int threads) {
    threads_.clear();
    threads_.resize(static_cast<std::size_t>(threads));
    warps_.assign(static_cast<std::size_t>(threads / 32), Warp{});
    block_meeting_ = Meeting{};
    ended_ = 0;
    failure_.clear();
    for (std::size_t i = 0; i < threads_.size(); ++i) {
      make_context(threads_[i].context, stacks_.data() + i * kStackBytes, kStackBytes, entry);
    }
    current_ = order == Order::descending ? threads_.size() - 1 : 0;
    switch_context(main_, threads_[current_].context);
    if (!failure_.empty()) throw Failure(failure_);
  }

  void meet(Meeting& meeting, int members, const char* operation, std::source_location where) {
    if (meeting.arrived > 0 && (meeting.operation != operation || meeting.where.line() != where.line())) {
      fail("divergent: " + place() + " is at " + describe(operation, where) + ", others wait at " +
           describe(meeting.operation, meeting.where));
    }
    meeting.operation = operation;
    meeting.where = where;
    if (++meeting.arrived == members) {
      meeting.arrived = 0;
      ++meeting.generation;
      return;
    }
    Thread& thread = me();
    thread.generation = &meeting.generation;
    thread.seen = meeting.generation;
    thread.operation = operation;
    thread.where = where;
    next();
    thread.generation = nullptr;
  }

  /// The next thread: of the same warp if one can run, so that a warp stays in the cache.
  void next() {
    const std::size_t before = current_, n = threads_.size(), warp = before / 32 * 32;
    for (std::size_t i = 1; i <= 32; ++i) {
      if (try_switch(warp + step(before % 32, i, 32), before)) return;
    }
    for (std::size_t i = 1; i <= n; ++i) {
      if (try_switch(step(before, i, n), before)) return;
    }
    if (ended_ == threads_.size()) {
      switch_context(threads_[before].context, main_);
      return;
    }
    std::string message = "divergent: block " + std::to_string(block_) + " cannot go on, " + std::to_string(ended_) +
                          " threads have ended";
    for (std::size_t i = 0; i < n; ++i) {
      if (threads_[i].done) continue;
      message += "; thread " + std::to_string(i) + " waits at " + describe(threads_[i].operation, threads_[i].where);
      break;
    }
    fail(message);
  }

  static std::size_t step(std::size_t from, std::size_t i, std::size_t n) {
    if (order == Order::ascending) return (from + i) % n;
    if (order == Order::descending) return (from + n - i) % n;
    return (from + 13 * i) % n;  // 13 is prime to every block size
  }

  bool try_switch(std::size_t to, std::size_t from) {
    if (!threads_[to].runnable()) return false;
    current_ = to;
    if (to != from) switch_context(threads_[from].context, threads_[to].context);
    return true;
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Meeting block_meeting_;
  std::vector<unsigned char> stacks_;
  Context main_, dead_;
  std::size_t current_ = 0, ended_ = 0;
  int block_ = 0, num_blocks_ = 0;
  unsigned char* shared_ = nullptr;
  std::int64_t shared_bytes_ = 0;
  std::string failure_;
};

// ---- matrix arithmetic -------------------------------------------------------------------------------------------

/// c + the products, each cut off 24 bits below the largest of them, then cut off to a float.
template <int K>
float truncated_sum(float c, const double (&products)[K]) {
  double largest = std::fabs(static_cast<double>(c)), plain = static_cast<double>(c);
  for (const double p : products) {
    largest = std::fabs(p) > largest ? std::fabs(p) : largest;
    plain += p;
  }
  if (!(plain - plain == 0)) return static_cast<float>(plain);  // NaN, inf
  if (largest == 0) return 0.0f;
  const auto exponent = static_cast<int>(std::bit_cast<std::uint64_t>(largest) >> 52) - 1023;
  if (exponent < -140) return static_cast<float>(plain);
  const double up = std::bit_cast<double>(static_cast<std::uint64_t>(23 - exponent + 1023) << 52);
  auto sum = static_cast<std::int64_t>(static_cast<double>(c) * up);
  for (const double p : products) sum += static_cast<std::int64_t>(p * up);
  if (sum == 0) return 0.0f;
  const int bits = 64 - std::countl_zero(static_cast<std::uint64_t>(sum < 0 ? -sum : sum));
  if (bits > 24) sum = sum / (std::int64_t{1} << (bits - 24)) * (std::int64_t{1} << (bits - 24));
  return static_cast<float>(static_cast<double>(sum) / up);
}

struct MatrixOperands {
  float* d;
  const unsigned* a;
  const unsigned* b;
};

/// Lane 4 g + t: a (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b (t, g), (t + 4, g); d as in PTX.
inline void work_tf32(void* const* operands) {
  double a[16][8], b[8][8];
  const auto value = [](unsigned bits) { return static_cast<double>(std::bit_cast<float>(bits & 0xffffe000u)); };
  for (int lane = 0; lane < 32; ++lane) {
    const auto& o = *static_cast<MatrixOperands*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = value(o.a[i]);
    for (int i = 0; i < 2; ++i) b[t + i * 4][g] = value(o.b[i]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& o = *static_cast<MatrixOperands*>(operands[lane]);
    for (int i = 0; i < 4; ++i) {
      const int m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
      double products[8];
      for (int k = 0; k < 8; ++k) products[k] = a[m][k] * b[k][n];
      o.d[i] = truncated_sum(o.d[i], products);
    }
  }
}

inline void work_bf16(void* const* operands) {
  double a[16][16], b[16][8];
  const auto low = [](unsigned bits) { return static_cast<double>(std::bit_cast<float>(bits << 16)); };
  const auto high = [](unsigned bits) { return static_cast<double>(std::bit_cast<float>(bits & 0xffff0000u)); };
  for (int lane = 0; lane < 32; ++lane) {
    const auto& o = *static_cast<MatrixOperands*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      a[g + i % 2 * 8][2 * t + i / 2 * 8] = low(o.a[i]);
      a[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = high(o.a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      b[2 * t + i * 8][g] = low(o.b[i]);
      b[2 * t + i * 8 + 1][g] = high(o.b[i]);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& o = *static_cast<MatrixOperands*>(operands[lane]);
    for (int i = 0; i < 4; ++i) {
      const int m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
      double products[16];
      for (int k = 0; k < 16; ++k) products[k] = a[m][k] * b[k][n];
      o.d[i] = truncated_sum(o.d[i], products);
    }
  }
}

template <class T>
struct ShuffleOperand {
  T value, result;
  int from;  // lane
};

template <class T>
void work_shuffle(void* const* operands) {
  for (int lane = 0; lane < 32; ++lane) {
    auto& mine = *static_cast<ShuffleOperand<T>*>(operands[lane]);
    mine.result = static_cast<ShuffleOperand<T>*>(operands[mine.from & 31])->value;
  }
}

}  // namespace nvpflow::simt

namespace nvpflow::cuda {

using Here = std::source_location;

inline constexpr bool kHasMatrixUnits = true;

inline int thread_index() { return simt::Machine::get().thread(); }
inline int num_threads() { return simt::Machine::get().threads(); }
inline int block_index() { return simt::Machine::get().block(); }
inline int num_blocks() { return simt::Machine::get().blocks(); }
inline unsigned char* shared_memory() { return simt::Machine::get().shared(); }

inline void block_barrier(Here here = Here::current()) { simt::Machine::get().meet_block(here); }
inline void warp_barrier(Here here = Here::current()) {
  simt::Machine::get().meet_warp("warp barrier", nullptr, nullptr, here);
}

template <class T>
T shuffle(T value, int lane, Here here = Here::current()) {
  simt::ShuffleOperand<T> operand{value, value, lane};
  simt::Machine::get().meet_warp("shuffle", &operand, simt::work_shuffle<T>, here);
  return operand.result;
}
template <class T>
T shuffle_xor(T value, int mask, Here here = Here::current()) {
  return shuffle(value, simt::Machine::get().thread() % 32 ^ mask, here);
}

template <class T>
struct alignas(16) Vec4;
template <class T>
struct alignas(2 * sizeof(T)) Vec2;

inline void require_aligned(const void* p, std::size_t bytes = 16) {
  if (reinterpret_cast<std::uintptr_t>(p) % bytes == 0) return;
  simt::Machine::get().fail("misaligned: " + simt::Machine::get().place() + " accesses " + std::to_string(bytes) +
                            " bytes at an odd address");
}
/// Fails where nothing wrote. Of shared memory a block may read such numbers, for outputs that it does not have.
template <std::size_t bytes>
void require_written(const void* p) {
  static const std::vector<unsigned char> poison(bytes, 0xff);
  simt::Machine& machine = simt::Machine::get();
  if (machine.is_shared(p) || std::memcmp(p, poison.data(), bytes) != 0) return;
  machine.fail("unwritten: " + machine.place() + " reads memory that nothing wrote");
}
template <class T>
Vec4<T> load4(const T* p) {
  require_aligned(p);
  for (int i = 0; i < 4; ++i) require_written<sizeof(T)>(p + i);
  return *reinterpret_cast<const Vec4<T>*>(p);
}
template <class T>
void store4(T* p, Vec4<T> v) {
  require_aligned(p);
  *reinterpret_cast<Vec4<T>*>(p) = v;
}

template <class T>
Vec2<T> load2(const T* p) {
  require_aligned(p, 2 * sizeof(T));
  for (int i = 0; i < 2; ++i) require_written<sizeof(T)>(p + i);
  return *reinterpret_cast<const Vec2<T>*>(p);
}
template <class T>
void store2(T* p, Vec2<T> v) {
  require_aligned(p, 2 * sizeof(T));
  *reinterpret_cast<Vec2<T>*>(p) = v;
}

inline void copy16_async(void* shared, const void* global) {
  require_aligned(shared);
  require_aligned(global);
  require_written<16>(global);
  std::memset(shared, 0xff, 16);
  simt::Machine::get().me().open.push_back({shared, global});
}
inline void copies_commit() {
  simt::Thread& me = simt::Machine::get().me();
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}
template <int pending>
void copies_wait() {
  auto& groups = simt::Machine::get().me().groups;
  while (groups.size() > static_cast<std::size_t>(pending)) {
    for (const simt::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
    groups.erase(groups.begin());
  }
}

inline void multiply_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Here here = Here::current()) {
  simt::MatrixOperands operands{d, a, b};
  simt::Machine::get().meet_warp("matrix product", &operands, simt::work_tf32, here);
}
inline void multiply_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Here here = Here::current()) {
  simt::MatrixOperands operands{d, a, b};
  simt::Machine::get().meet_warp("matrix product", &operands, simt::work_bf16, here);
}
inline unsigned round_bf16(float x) {
  const auto bits = std::bit_cast<unsigned>(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline unsigned pack_bf16(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }

inline unsigned to_bits(float x) { return std::bit_cast<unsigned>(x); }
inline float from_bits(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned long long to_bits(double x) { return std::bit_cast<unsigned long long>(x); }
inline double from_bits(unsigned long long x) { return std::bit_cast<double>(x); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline double multiply_add(double a, double b, double c) { return std::fma(a, b, c); }
inline float divide_inside(float a, float b) { return a / b; }
inline double divide_inside(double a, double b) { return a / b; }
inline float positive_part(float x) { return x <= 0.0f ? 0.0f : x; }
inline double positive_part(double x) { return x <= 0.0 ? 0.0 : x; }
inline float square_root(float x) { return std::sqrt(x); }
inline double square_root(double x) { return std::sqrt(x); }

template <class... P, class... A>
Status launch(void (*kernel)(P...), std::int64_t blocks, int threads, std::int64_t shared_bytes, Stream,
              A... arguments) {
  simt::Machine::get().run([&] { kernel(static_cast<P>(arguments)...); }, blocks, threads, shared_bytes);
  return 0;
}
template <class... P>
Status allow_shared(void (*)(P...), std::int64_t) {
  return 0;
}

}  // namespace nvpflow::cuda
