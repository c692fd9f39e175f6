// cuda/runtime.hpp without CUDA, for tests (NVPFLOW_CUDA=EMULATED): two devices whose memory is the host's.
//
// As strict as a device may be. Work is queued and runs when somebody waits for it, so that what is read too early
// shows; what is copied to the host is poison until then. Device memory is poisoned when it is allocated, lies between
// guard pages, and can be touched by queued work alone: code of the host that looks into it crashes. Copies check that
// the host's side is pinned and both sides are large enough. NVPFLOW_EMULATED_BYTES bounds a device's memory.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>

#include <nvpflow/error.hpp>

#include "../../cpp/src/parallel.hpp"
#include "../../cuda/runtime.hpp"

// Handles are pointers to these.
struct CUevent_st {
  CUstream_st* stream = nullptr;
  std::uint64_t ticket = 0;  // of the work that it stands after
};
struct CUstream_st {};

namespace nvpflow::cuda {
namespace {

constexpr int kDevices = 2;
constexpr std::int64_t kDefaultBytes = std::int64_t{8} << 30;

struct Block {
  unsigned char* begin;
  std::int64_t bytes;
  std::int64_t mapped;
  Memory::Kind kind;
  int device;
};

struct Work {
  std::function<Status()> run;
  CUstream_st* wait_stream = nullptr;  // not null with wait_ticket: that work comes first
  std::uint64_t wait_ticket = 0;
};

struct Queue {
  std::deque<Work> work;
  std::uint64_t first = 1;  // ticket of work.front()
  std::uint64_t next() const { return first + work.size(); }
};

struct Driver {
  std::recursive_mutex mutex;
  std::map<const unsigned char*, Block> blocks;
  std::map<CUstream_st*, Queue> queues;
  std::int64_t used[kDevices] = {};
  int running = 0;
};

/// A child of fork starts with a driver of its own, but may not use it (enter_cuda).
Driver& driver() {
  static auto* const made = new PerProcess<Driver>;
  return made->get();
}

thread_local int current = 0;
std::atomic<std::int64_t> cuda_process{-1};

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::device, "emulator: " + message); }

/// The legacy default stream has two names, and one name is another stream in every thread.
CUstream_st* canonical(CUstream_st* stream) {
  thread_local CUstream_st of_this_thread;
  if (is_per_thread(stream)) return &of_this_thread;
  return reinterpret_cast<std::uintptr_t>(stream) <= 1 ? nullptr : stream;
}

void protect(const Driver& d, int protection) {
  for (const auto& [begin, block] : d.blocks) {
    if (block.kind == Memory::Kind::device) {
      mprotect(block.begin, static_cast<std::size_t>(block.mapped), protection);
    }
  }
}

/// While it lives, device memory can be touched.
class Running {
 public:
  explicit Running(Driver& d) : driver_(d) {
    if (driver_.running++ == 0) protect(driver_, PROT_READ | PROT_WRITE);
  }
  ~Running() {
    if (--driver_.running == 0) protect(driver_, PROT_NONE);
  }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

 private:
  Driver& driver_;
};

void run_until(Driver& d, CUstream_st* stream, std::uint64_t ticket) {
  Queue& queue = d.queues[stream];
  while (queue.first <= ticket && !queue.work.empty()) {
    const Work work = std::move(queue.work.front());
    queue.work.pop_front();
    ++queue.first;
    if (work.wait_ticket != 0) run_until(d, work.wait_stream, work.wait_ticket);
    if (!work.run) continue;
    const Running running(d);
    check(work.run(), "emulated work");
  }
}

void push(CUstream_st* stream, Work work) {
  enter_cuda();
  Driver& d = driver();
  const std::lock_guard<std::recursive_mutex> lock(d.mutex);
  d.queues[canonical(stream)].work.push_back(std::move(work));
}

const Block* block_of(const Driver& d, const void* pointer) {
  const auto* p = static_cast<const unsigned char*>(pointer);
  auto after = d.blocks.upper_bound(p);
  if (after == d.blocks.begin()) return nullptr;
  const Block& block = (--after)->second;
  return p < block.begin + block.bytes ? &block : nullptr;
}

void require(const void* pointer, std::int64_t bytes, Memory::Kind kind, const char* what) {
  const Driver& d = driver();
  const Block* block = block_of(d, pointer);
  const std::string name = kind == Memory::Kind::device ? "device memory" : "pinned memory";
  if (block == nullptr || block->kind != kind) fail(std::string(what) + " is not " + name);
  if (static_cast<const unsigned char*>(pointer) + bytes > block->begin + block->bytes) {
    fail(std::string(what) + " is " + name + " that is too small for " + std::to_string(bytes) + " bytes");
  }
}

std::int64_t device_bytes() {
  const char* text = std::getenv("NVPFLOW_EMULATED_BYTES");
  return text == nullptr ? kDefaultBytes : std::atoll(text);
}

std::int64_t page() { return sysconf(_SC_PAGESIZE); }

}  // namespace

void check(Status status, const char* what) {
  if (status != 0) fail(std::string(what) + " returned status " + std::to_string(status));
}

void enter_cuda() {
  const std::int64_t here = fork_generation();
  std::int64_t first = -1;
  if (cuda_process.compare_exchange_strong(first, here) || first == here) return;
  throw Error(ErrorCode::device,
              "CUDA was used before this process was forked, and cannot be used in a forked child; start processes by "
              "'spawn' (multiprocessing.get_context('spawn')), or use a flow on the CPU");
}

std::string driver_problem() {
  enter_cuda();
  return {};
}
std::string architecture_problem(int, Status (*)()) { return {}; }
int device_count() {
  enter_cuda();
  return kDevices;
}
std::string device_name(int) { return "emulated device"; }

Device device_properties(int) {
  Device device;
  device.multiprocessors = 2;
  device.compute_capability = 90;
  device.shared_bytes_per_block = 227 << 10;
  device.shared_bytes_per_processor = 228 << 10;
  device.workspace_bytes = 32 << 20;
  return device;
}

OnDevice::OnDevice(int index) {
  enter_cuda();
  if (current == index) return;
  before_ = current;
  current = index;
}
OnDevice::~OnDevice() {
  if (before_ >= 0) current = before_;
}

int device_of(const void* pointer) {
  Driver& d = driver();
  const std::lock_guard<std::recursive_mutex> lock(d.mutex);
  const Block* block = block_of(d, pointer);
  return block != nullptr && block->kind == Memory::Kind::device ? block->device : -1;
}

bool is_pinned(const void* pointer) {
  Driver& d = driver();
  const std::lock_guard<std::recursive_mutex> lock(d.mutex);
  const Block* block = block_of(d, pointer);
  return block != nullptr && block->kind == Memory::Kind::pinned;
}

void require_on_device(std::initializer_list<const void*> pointers) {
  Driver& d = driver();
  const std::lock_guard<std::recursive_mutex> lock(d.mutex);
  for (const void* p : pointers) {
    if (p != nullptr) require(p, 1, Memory::Kind::device, "an array of a kernel");
    if (p != nullptr && block_of(d, p)->device != current) fail("an array of a kernel is on another device");
  }
}

void* Memory::reserve(std::int64_t bytes, const char* what) {
  if (bytes <= capacity_) return data_;
  release();
  enter_cuda();
  Driver& d = driver();
  const std::lock_guard<std::recursive_mutex> lock(d.mutex);
  device_ = current;
  const std::int64_t limit = device_bytes();
  if (kind_ == Kind::device && d.used[device_] + bytes > limit) {
    throw Error(ErrorCode::out_of_memory, "out of memory: " + std::to_string(bytes) + " bytes for " + what +
                                              " on cuda:" + std::to_string(device_) + ", of whose " +
                                              std::to_string(limit) + " bytes " +
                                              std::to_string(limit - d.used[device_]) + " are free");
  }
  const std::int64_t mapped = round_up(bytes, page());
  auto* whole = static_cast<unsigned char*>(
      mmap(nullptr, static_cast<std::size_t>(mapped + 2 * page()), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (whole == MAP_FAILED) throw Error(ErrorCode::out_of_memory, "emulator: mmap failed");
  unsigned char* begin = whole + page();
  mprotect(begin, static_cast<std::size_t>(mapped), PROT_READ | PROT_WRITE);
  std::memset(begin, 0xff, static_cast<std::size_t>(mapped));
  if (kind_ == Kind::device) {
    if (d.running == 0) mprotect(begin, static_cast<std::size_t>(mapped), PROT_NONE);
    d.used[device_] += bytes;
  }
  d.blocks[begin] = {begin, bytes, mapped, kind_, device_};
  data_ = begin;
  capacity_ = bytes;
  process_ = fork_generation();
  return data_;
}

void Memory::release() noexcept {
  void* p = std::exchange(data_, nullptr);
  capacity_ = 0;
  if (p == nullptr || process_ != fork_generation()) return;
  Driver& d = driver();
  const std::lock_guard<std::recursive_mutex> lock(d.mutex);
  try {
    synchronize_device();
  } catch (const std::exception&) {  // reported to whom it concerns
  }
  const Block block = d.blocks[static_cast<unsigned char*>(p)];
  d.blocks.erase(block.begin);
  if (block.kind == Kind::device) d.used[block.device] -= block.bytes;
  munmap(block.begin - page(), static_cast<std::size_t>(block.mapped + 2 * page()));
}

OwnedStream::OwnedStream() : process_(fork_generation()) {
  enter_cuda();
  stream_ = new CUstream_st;
}
OwnedStream::~OwnedStream() {
  if (process_ != fork_generation()) return;
  Driver& d = driver();
  const std::lock_guard<std::recursive_mutex> lock(d.mutex);
  try {
    synchronize(stream_);
  } catch (const std::exception&) {
  }
  d.queues.erase(stream_);
  delete stream_;
}

OwnedEvent::OwnedEvent() : event_(new CUevent_st), process_(fork_generation()) {}
OwnedEvent::~OwnedEvent() {
  if (process_ == fork_generation()) delete event_;
}

void enqueue(Stream stream, std::function<Status()> work) { push(stream, {std::move(work), nullptr, 0}); }

void record(Event event, Stream stream) {
  Driver& d = driver();
  const std::lock_guard<std::recursive_mutex> lock(d.mutex);
  event->stream = canonical(stream);
  event->ticket = d.queues[event->stream].next();
  push(stream, {});
}

void wait(Stream stream, Event event) {
  Driver& d = driver();
  const std::lock_guard<std::recursive_mutex> lock(d.mutex);
  push(stream, {nullptr, event->stream, event->ticket});
}

void synchronize(Event event) {
  enter_cuda();
  Driver& d = driver();
  const std::lock_guard<std::recursive_mutex> lock(d.mutex);
  run_until(d, event->stream, event->ticket);
}

void synchronize(Stream stream) {
  enter_cuda();
  Driver& d = driver();
  const std::lock_guard<std::recursive_mutex> lock(d.mutex);
  run_until(d, canonical(stream), ~std::uint64_t{0});
}

void synchronize_device() {
  enter_cuda();
  Driver& d = driver();
  const std::lock_guard<std::recursive_mutex> lock(d.mutex);
  for (auto& [stream, queue] : d.queues) run_until(d, stream, ~std::uint64_t{0});
}

bool is_capturing(Stream) { return false; }

std::int64_t emulated_bytes_in_use(int device) {
  Driver& d = driver();
  const std::lock_guard<std::recursive_mutex> lock(d.mutex);
  return d.used[device];
}

/// Short, so that tests see many chunks.
std::int64_t chunk_bytes() { return 16 << 10; }

void copy_to_device(void* to, const void* from, std::int64_t bytes, Stream stream) {
  if (bytes == 0) return;
  enqueue(stream, [=] {
    require(to, bytes, Memory::Kind::device, "the target of a copy");
    require(from, bytes, Memory::Kind::pinned, "the source of a copy");
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
    return 0;
  });
}

void copy_to_host(void* to, const void* from, std::int64_t bytes, Stream stream) {
  if (bytes == 0) return;
  {
    const std::lock_guard<std::recursive_mutex> lock(driver().mutex);
    require(to, bytes, Memory::Kind::pinned, "the target of a copy");
  }
  std::memset(to, 0xff, static_cast<std::size_t>(bytes));
  enqueue(stream, [=] {
    require(from, bytes, Memory::Kind::device, "the source of a copy");
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
    return 0;
  });
}

void copy_on_device(void* to, const void* from, std::int64_t bytes, Stream stream) {
  if (bytes == 0) return;
  enqueue(stream, [=] {
    require(from, bytes, Memory::Kind::device, "the source of a copy");
    require(to, bytes, Memory::Kind::device, "the target of a copy");
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
    return 0;
  });
}

void fill_zero(void* to, std::int64_t bytes, Stream stream) {
  if (bytes == 0) return;
  enqueue(stream, [=] {
    require(to, bytes, Memory::Kind::device, "the target of a fill");
    std::memset(to, 0, static_cast<std::size_t>(bytes));
    return 0;
  });
}

}  // namespace nvpflow::cuda
