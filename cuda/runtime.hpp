// The small part of CUDA's runtime that the backend uses, every return code checked: memory, streams, events, copies,
// properties. runtime.cpp is the real one; tests put tests/cpp/emulated_runtime.cpp in its place.
//
// Functions act on the calling thread's current device, which OnDevice sets and puts back. They throw Error(device)
// where CUDA fails, Error(out_of_memory) with sizes, and Error(device) in a child forked after the parent first used
// CUDA. Destructors never throw; in such a child they leave everything alone.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <utility>

#include "kernels.hpp"

struct CUevent_st;

namespace nvpflow::cuda {

using Event = CUevent_st*;  // cudaEvent_t

/// Throws Error(device) for a status that is not 0; `what` is what was tried.
void check(Status status, const char* what);

/// Why no CUDA device can be used at all, or empty; starts none. Without a driver it says so in a forked child, too.
std::string driver_problem();
/// Why this build cannot use a device, or empty; starts it. ask: the status of asking for a kernel (probe_kernels).
std::string architecture_problem(int index, Status (*ask)());
/// 0 where there is no driver; throws Error(device) in a forked child where there is one that the parent has used.
int device_count();
std::string device_name(int index);
/// What the plans of the kernels need to know.
Device device_properties(int index);
/// Throws Error(device) in a forked child of a process that has used CUDA; notes that this process has.
void enter_cuda();

/// The calling thread's current device, for a scope.
class OnDevice {
 public:
  explicit OnDevice(int index);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = -1;  // -1: nothing to put back
};

/// Where a pointer points: the device's index, or -1 for memory of the host (or unknown memory).
int device_of(const void* pointer);
/// Whether copies from and to it need no staging: memory of the host that CUDA has pinned.
bool is_pinned(const void* pointer);

/// Memory, of the device or pinned memory of the host, kept as long as it is large enough. Giving memory of the device
/// back waits for what the device does.
class Memory {
 public:
  enum class Kind { device, pinned };
  explicit Memory(Kind kind) : kind_(kind) {}
  ~Memory() { release(); }
  Memory(Memory&& other) noexcept
      : kind_(other.kind_), data_(std::exchange(other.data_, nullptr)), capacity_(std::exchange(other.capacity_, 0)) {}
  Memory& operator=(Memory&&) = delete;

  /// At least that many bytes, at a multiple of 256; the contents are lost when it grows. `what` names it in the error.
  void* reserve(std::int64_t bytes, const char* what);
  void* data() const { return data_; }
  std::int64_t capacity() const { return capacity_; }
  void release() noexcept;

 private:
  Kind kind_;
  void* data_ = nullptr;
  std::int64_t capacity_ = 0;
  std::uint32_t process_ = 0;  // the fork generation that allocated it
  int device_ = -1;
};

class OwnedStream {
 public:
  OwnedStream();
  ~OwnedStream();
  OwnedStream(const OwnedStream&) = delete;
  OwnedStream& operator=(const OwnedStream&) = delete;
  operator Stream() const { return stream_; }  // NOLINT(misc-explicit-constructor): it is one

 private:
  Stream stream_ = nullptr;
  std::uint32_t process_;
};

class OwnedEvent {
 public:
  OwnedEvent();
  ~OwnedEvent();
  OwnedEvent(const OwnedEvent&) = delete;
  OwnedEvent& operator=(const OwnedEvent&) = delete;
  operator Event() const { return event_; }  // NOLINT(misc-explicit-constructor): it is one

 private:
  Event event_ = nullptr;
  std::uint32_t process_;
};

void record(Event event, Stream stream);
/// What is queued on `stream` from now on begins after the event.
void wait(Stream stream, Event event);
void synchronize(Event event);
void synchronize(Stream stream);
void synchronize_device();
bool is_capturing(Stream stream);
/// The default stream "of each thread": the value by which cudaStreamPerThread, DLPack and __cuda_array_interface__
/// name it is another stream in every thread.
inline bool is_per_thread(Stream stream) { return reinterpret_cast<std::uintptr_t>(stream) == 2; }

/// Bytes of a chunk of rows on its way to or from the device: long enough that the link runs at its full rate, short
/// enough that the first and the last chunk, which nothing overlaps, do not count.
std::int64_t chunk_bytes();

/// Memory of the host must be pinned and stay as it is until the copy is done.
void copy_to_device(void* to, const void* from, std::int64_t bytes, Stream stream);
void copy_to_host(void* to, const void* from, std::int64_t bytes, Stream stream);
void copy_on_device(void* to, const void* from, std::int64_t bytes, Stream stream);
void fill_zero(void* to, std::int64_t bytes, Stream stream);

#if defined(NVPFLOW_SIMT)
/// The emulator runs work when somebody waits for it, as late as a device may.
void enqueue(Stream stream, std::function<Status()> work);
/// Throws where one is not null and not memory of the current device.
void require_on_device(std::initializer_list<const void*> pointers);
#else
inline void require_on_device(std::initializer_list<const void*>) {}
#endif

/// Queues launches: f() calls one of the launch functions on `stream` and returns its status.
template <class F>
void launch_on([[maybe_unused]] Stream stream, const char* what, F&& f) {
#if defined(NVPFLOW_SIMT)
  (void)what;
  enqueue(stream, std::forward<F>(f));
#else
  check(f(), what);
#endif
}

}  // namespace nvpflow::cuda
