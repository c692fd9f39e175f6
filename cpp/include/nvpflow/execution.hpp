/// @file
/// How one call on a flow runs, and where its arrays are.
#pragma once

namespace nvpflow {

/// data -> latent, latent -> data.
enum class Direction { forward, inverse };

/// How a call runs and where its arrays are.
struct Execution {
  /// Of the host: the CPU's work, or a device's copies from and to arrays of the host. 0: as many as the flow takes
  /// (Flow::num_threads).
  int threads = 0;
  /// All arrays of the call lie in the memory of the flow's device. The call is queued on `stream` (a cudaStream_t;
  /// null: the legacy default stream) and returns at once, unless it returns a number. Once a call of that kind and
  /// size was made on that stream it neither allocates nor synchronises, so that it can be captured in a CUDA graph;
  /// the graph reads the parameters that were set when it was captured, until the second set_parameters after that.
  bool device_arrays = false;
  /// A cudaStream_t, where device_arrays is true.
  void* stream = nullptr;
  /// The rows of data (x: the input of forward, log_prob and their gradients, the output of inverse and sample) are
  /// float64; of flows with takes_float64_rows, whose first layer is then applied in float64, and of arrays of the
  /// host. All other arrays are of the flow's dtype.
  bool float64_rows = false;

  /// Arrays of the host, and the threads that the flow takes.
  Execution() = default;
  /// Arrays of the host.
  explicit Execution(int host_threads) : threads(host_threads) {}
  /// Arrays of the device, on a cudaStream_t.
  static Execution on_stream(void* s) {
    Execution how(1);
    how.device_arrays = true;
    how.stream = s;
    return how;
  }
};

}  // namespace nvpflow
