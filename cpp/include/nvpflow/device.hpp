/// @file
/// Where a flow runs and how it rounds. Nothing here touches CUDA before a function whose name begins with cuda_ is
/// called or a CUDA device is named.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include <nvpflow/export.h>
#include <nvpflow/precision.hpp>

namespace nvpflow {

/// The processors that flows run on.
enum class DeviceKind { cpu, cuda };

/// One of the machine's processors: the CPU, all of it, or a CUDA device.
struct Device {
  DeviceKind kind = DeviceKind::cpu;  ///< which of the two
  int index = 0;  ///< of the CUDA device, in the driver's order (CUDA_VISIBLE_DEVICES applies); 0 for the CPU

  /// The same device.
  bool operator==(const Device&) const = default;
};

/// How the CPU stores the kernels that it computes with. full: as the parameters are. bfloat16, for float32 flows:
/// rounded to 8 significant bits, ties to even, so that calls of a few rows read half the bytes. Arithmetic is float32
/// either way. The rounded flow is a flow of its own: its density integrates to one and its inverse is exact. Its bits
/// are the same for every batch size, and its gradients are those at the rounded kernels. Biases, standardize layers
/// and the parameters that are read, saved and trained stay as they are.
enum class Weights { full, bfloat16 };

/// @{
/// "cpu", "cuda:0"; "float32"; "full".
NVPFLOW_API std::string name_of(const Device& device);
NVPFLOW_API std::string_view name_of(Precision precision);
NVPFLOW_API std::string_view name_of(Weights weights);
/// @}
/// "cpu", "cuda" (device 0) or "cuda:N". Throws Error(invalid_argument).
NVPFLOW_API Device parse_device(std::string_view name);
/// @{
/// The name of one of the enum's values. Throws Error(invalid_argument).
NVPFLOW_API Precision parse_precision(std::string_view name);
NVPFLOW_API Weights parse_weights(std::string_view name);
/// @}

/// Empty where at least one CUDA device can be used, else the one reason why not. It is one of: built without CUDA, no
/// driver, a driver too old (with versions), no device, no code for the devices' architecture.
NVPFLOW_API std::string cuda_why_unavailable();
/// CUDA devices that the driver shows; 0 without a driver. Throws Error(device) in a child forked after CUDA was used.
NVPFLOW_API int cuda_device_count();
/// "NVIDIA H100 80GB HBM3". Throws Error(invalid_argument) for an index that cuda_device_count() does not know.
NVPFLOW_API std::string cuda_device_name(int index);

/// Memory of a CUDA device, shared by its copies; the last one waits for the device and frees it.
class NVPFLOW_API DeviceMemory {
 public:
  /// Throws Error(device) or Error(out_of_memory).
  DeviceMemory(int device, std::int64_t bytes);
  /// The first byte, on the device.
  void* data() const;
  /// The device's index.
  int device() const;
  /// Copies from the host's memory and waits.
  void upload(const void* from, std::int64_t bytes);

 private:
  struct State;
  std::shared_ptr<State> state_;
};

/// Copies to the host's memory, after the work queued on `stream`, and waits.
NVPFLOW_API void cuda_download(int device, void* to, const void* from, std::int64_t bytes, void* stream);
/// Work queued on `waiting` from now on begins after the work that is queued on `for_stream` now.
NVPFLOW_API void cuda_wait(int device, void* waiting, void* for_stream);
/// Waits for the work that is queued on `stream` now.
NVPFLOW_API void cuda_synchronize(int device, void* stream);
/// The index of the device whose memory a pointer points into; -1: none.
NVPFLOW_API int cuda_device_of(const void* pointer);

/// "baseline", "avx2", "avx512" or "neon": what the CPU kernels run on in this process.
NVPFLOW_API const char* cpu_isa();
/// Instruction sets built in and supported by this processor, best first, comma-separated.
NVPFLOW_API const char* cpu_isas_available();

}  // namespace nvpflow
