#include "runtime.hpp"

#include <cuda_runtime_api.h>

#include <atomic>
#include <vector>

#include <nvpflow/error.hpp>

#include "../cpp/src/parallel.hpp"

namespace nvpflow::cuda {
namespace {

void check(cudaError_t status, const char* what) { cuda::check(static_cast<Status>(status), what); }

/// 13000 -> "13.0"; 0 -> "none".
std::string version_text(int version) {
  return version == 0 ? "none" : std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string text_of(cudaError_t status) {
  return std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")";
}

/// The fork generation that first used CUDA; -1: none yet.
std::atomic<std::int64_t> cuda_process{-1};

std::string mebibytes(std::int64_t bytes) { return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB"; }

[[noreturn]] void out_of_memory(const char* what, std::int64_t bytes, Memory::Kind kind, int device) {
  std::string message = "out of memory: " + std::to_string(bytes) + " bytes (" + mebibytes(bytes) + ") for " + what;
  if (kind == Memory::Kind::pinned) {
    message += " in page-locked memory of the host";
  } else {
    std::size_t free = 0, total = 0;
    message += " on cuda:" + std::to_string(device);
    if (cudaMemGetInfo(&free, &total) == cudaSuccess) {
      message += ", of whose " + mebibytes(static_cast<std::int64_t>(total)) + " " +
                 mebibytes(static_cast<std::int64_t>(free)) + " are free";
    }
  }
  throw Error(ErrorCode::out_of_memory, message);
}

/// The newest CUDA that the driver serves, as 13000; 0 without a driver. Starts nothing, so a forked child may ask.
int driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess) return version;
  (void)cudaGetLastError();
  return 0;
}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  return device;
}

}  // namespace

void check(Status status, const char* what) {
  const auto error = static_cast<cudaError_t>(status);
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // forgets it, unless it has spoiled the context
  const ErrorCode code = error == cudaErrorMemoryAllocation ? ErrorCode::out_of_memory : ErrorCode::device;
  throw Error(code, std::string("CUDA failed in ") + what + ": " + text_of(error));
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
  const int driver = driver_version();
  if (driver == 0) return "no CUDA driver is installed (libcuda.so.1 of the NVIDIA driver was not found)";
  enter_cuda();
  int runtime = 0, count = 0;
  (void)cudaRuntimeGetVersion(&runtime);
  const cudaError_t status = cudaGetDeviceCount(&count);
  (void)cudaGetLastError();
  if (status == cudaErrorInsufficientDriver) {
    return "the NVIDIA driver is too old: it serves CUDA " + version_text(driver) + ", this build needs CUDA " +
           version_text(runtime) + "; install a newer driver, or build nvpflow with an older CUDA";
  }
  if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0)) {
    return "the driver sees no CUDA device (CUDA_VISIBLE_DEVICES can hide them)";
  }
  if (status != cudaSuccess) return "the CUDA driver does not start: " + text_of(status);
  return {};
}

std::string architecture_problem(int index, Status (*ask)()) {
  const OnDevice on(index);
  const auto probe = static_cast<cudaError_t>(ask());
  if (probe == cudaSuccess) return {};
  (void)cudaGetLastError();
  const int capability = device_properties(index).compute_capability;
  return "this build has code for compute capability " NVPFLOW_CUDA_ARCHITECTURES " and none for " +
         device_name(index) + ", which is " + std::to_string(capability) + " (" + text_of(probe) +
         "); build nvpflow with NVPFLOW_CUDA_ARCHITECTURES=AUTO on this machine";
}

int device_count() {
  if (driver_version() == 0) return 0;
  enter_cuda();
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  (void)cudaGetLastError();
  return 0;
}

std::string device_name(int index) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, index), "asking for a device's name");
  return properties.name;
}

Device device_properties(int index) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index), "asking for a device's properties");
    return value;
  };
  Device device;
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  device.compute_capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  device.shared_bytes_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.shared_bytes_per_processor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  return device;
}

OnDevice::OnDevice(int index) {
  enter_cuda();
  const int current = current_device();
  if (current == index) return;
  check(cudaSetDevice(index), "choosing the device");
  before_ = current;
}

OnDevice::~OnDevice() {
  if (before_ >= 0) (void)cudaSetDevice(before_);
}

int device_of(const void* pointer) {
  cudaPointerAttributes attributes;
  if (cudaPointerGetAttributes(&attributes, pointer) != cudaSuccess) {
    (void)cudaGetLastError();
    return -1;
  }
  const bool on_device = attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
  return on_device ? attributes.device : -1;
}

bool is_pinned(const void* pointer) {
  cudaPointerAttributes attributes;
  if (cudaPointerGetAttributes(&attributes, pointer) != cudaSuccess) {
    (void)cudaGetLastError();
    return false;
  }
  return attributes.type == cudaMemoryTypeHost;
}

void* Memory::reserve(std::int64_t bytes, const char* what) {
  if (bytes <= capacity_) return data_;
  release();
  device_ = current_device();
  void* p = nullptr;
  const auto size = static_cast<std::size_t>(bytes);
  const cudaError_t status =
      kind_ == Kind::device ? cudaMalloc(&p, size) : cudaHostAlloc(&p, size, cudaHostAllocPortable);
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    out_of_memory(what, bytes, kind_, device_);
  }
  check(status, kind_ == Kind::device ? "allocating device memory" : "allocating page-locked memory");
  data_ = p;
  capacity_ = bytes;
  process_ = fork_generation();
  return p;
}

void Memory::release() noexcept {
  void* p = std::exchange(data_, nullptr);
  capacity_ = 0;
  // In a forked child the memory is the parent's.
  if (p == nullptr || process_ != fork_generation()) return;
  if (kind_ == Kind::device) {
    int before = 0;
    const bool elsewhere = cudaGetDevice(&before) == cudaSuccess && before != device_;
    if (elsewhere) (void)cudaSetDevice(device_);
    (void)cudaFree(p);
    if (elsewhere) (void)cudaSetDevice(before);
  } else {
    (void)cudaFreeHost(p);
  }
}

OwnedStream::OwnedStream() : process_(fork_generation()) {
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream");
}
OwnedStream::~OwnedStream() {
  if (process_ == fork_generation()) (void)cudaStreamDestroy(stream_);
}

OwnedEvent::OwnedEvent() : process_(fork_generation()) {
  check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "making an event");
}
OwnedEvent::~OwnedEvent() {
  if (process_ == fork_generation()) (void)cudaEventDestroy(event_);
}

void record(Event event, Stream stream) { check(cudaEventRecord(event, stream), "recording an event"); }
void wait(Stream stream, Event event) { check(cudaStreamWaitEvent(stream, event, 0), "waiting for an event"); }
void synchronize(Event event) { check(cudaEventSynchronize(event), "waiting for the device"); }
void synchronize(Stream stream) { check(cudaStreamSynchronize(stream), "waiting for the device"); }
void synchronize_device() { check(cudaDeviceSynchronize(), "waiting for the device"); }

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "asking whether a stream is captured");
  return status != cudaStreamCaptureStatusNone;
}

std::int64_t chunk_bytes() { return 4 << 20; }

namespace {

void copy(void* to, const void* from, std::int64_t bytes, cudaMemcpyKind kind, Stream stream) {
  if (bytes == 0) return;
  check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), kind, stream), "copying");
}

}  // namespace

void copy_to_device(void* to, const void* from, std::int64_t bytes, Stream stream) {
  copy(to, from, bytes, cudaMemcpyHostToDevice, stream);
}
void copy_to_host(void* to, const void* from, std::int64_t bytes, Stream stream) {
  copy(to, from, bytes, cudaMemcpyDeviceToHost, stream);
}
void copy_on_device(void* to, const void* from, std::int64_t bytes, Stream stream) {
  copy(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}
void fill_zero(void* to, std::int64_t bytes, Stream stream) {
  if (bytes == 0) return;
  check(cudaMemsetAsync(to, 0, static_cast<std::size_t>(bytes), stream), "clearing device memory");
}

}  // namespace nvpflow::cuda
