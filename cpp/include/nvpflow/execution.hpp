/// @file
/// How one call on a flow runs, and where its arrays are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <nvpflow/export.h>

namespace nvpflow {

/// data -> latent, latent -> data.
enum class Direction { forward, inverse };

class Flow;

/// The context of a call through Execution::context, unchecked.
struct ContextRows {
  /// [n, C], of the flow's dtype, in the same memory as the other arrays; null: `folded`, or the flow has no context.
  const void* rows = nullptr;
  /// Row r of the call goes with context row r / repeat; kForAll: all go with the first.
  std::int64_t repeat = 1;
  /// What Flow::condition made of one row.
  const void* folded = nullptr;
  /// Of vector-Jacobian products: receives the cotangent of the context. [C] with kForAll (arrays of the host only),
  /// else [B, C] with a context row for each row. Null: not wanted.
  void* gradient = nullptr;

  /// More than any number of rows.
  static constexpr std::int64_t kForAll = std::int64_t{1} << 62;
};

/// The context of a call, checked by it: [B, C], one row for each row of the call, or [C], one for all.
class Context {
 public:
  /// Of flows without a context.
  Context() = default;
  /// Rows of the flow's dtype, which the caller keeps.
  template <class T, std::size_t extent>
  Context(std::span<T, extent> rows) : data_(rows.data()), size_(rows.size()), element_(sizeof(T)) {}  // NOLINT
  /// The same.
  template <class T>
  Context(const std::vector<T>& rows) : Context(std::span<const T>(rows)) {}  // NOLINT(google-explicit-constructor)

  /// The first element.
  const void* data() const { return data_; }
  /// Elements.
  std::int64_t size() const { return static_cast<std::int64_t>(size_); }
  /// Bytes of one; 0: none was given.
  std::size_t element() const { return element_; }
  /// What Flow::condition computed of one row; null: nothing.
  const void* folded() const { return folded_; }

 private:
  friend class Flow;
  const void *data_ = nullptr, *folded_ = nullptr;
  std::size_t size_ = 0, element_ = 0;
};

/// What the rows of a call count for, in a type of its own, so that no context is taken for it. Finite numbers of at
/// least 0, not all of them 0, which the caller keeps; only their ratios matter.
class NVPFLOW_API SampleWeights {
 public:
  /// One for each row.
  explicit SampleWeights(std::span<const double> values) : values_(values) {}
  /// The numbers.
  std::span<const double> values() const { return values_; }
  /// Throws Error(invalid_argument) that names them so where they are not what is said above, for so many rows.
  void check(const char* name, std::int64_t rows) const;

 private:
  std::span<const double> values_;
};

/// A part of the rows whose mean loss a gradient is of, for batches that come in pieces or from several processes.
/// Arrays of the host, unchecked.
struct BatchPart {
  std::int64_t rows = 0;                ///< that are taken
  const std::int64_t* index = nullptr;  ///< [rows], rows of x and of what goes with x; null: the first ones
  /// As SampleWeights, a number for each row of x; empty: all are 1. They are used as they are where there is an index
  /// or a total.
  std::span<const double> weights;
  double total = 0;         ///< the rows, or the sum of their weights, of the whole batch; 0: those of this part
  bool accumulate = false;  ///< adds to the gradient in place of overwriting it
};

/// How a call runs and where its arrays are.
struct Execution {
  /// Of the host: the CPU's work, or a device's copies from and to arrays of the host. 0: as many as the flow takes
  /// (Flow::num_threads).
  int threads = 0;
  /// All arrays of the call lie in the memory of the flow's device. The call is queued on `stream` (a cudaStream_t;
  /// null: the legacy default stream) and returns at once, unless it returns a number. The second call of that kind and
  /// size on a stream neither allocates nor synchronises, so it can be captured in a CUDA graph. The graph reads the
  /// parameters that were set when it was captured, until the second set_parameters after that.
  bool device_arrays = false;
  /// A cudaStream_t, where device_arrays is true.
  void* stream = nullptr;
  /// The rows of data x are float64: the input of forward, log_prob and their gradients, the output of inverse and
  /// sample. For flows with takes_float64_rows, whose first layer is then applied in float64, and arrays of the host.
  /// All other arrays are of the flow's dtype.
  bool float64_rows = false;
  /// Of a flow with a context.
  ContextRows context;

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
