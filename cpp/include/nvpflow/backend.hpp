// The seam between a flow and the hardware that runs it. Few, fat calls on whole flows: fusion is each backend's
// private matter. Arrays are row-major, of the flow's dtype, non-overlapping and already checked by the caller;
// const calls may run concurrently with each other and with set_parameters.
#pragma once

#include <cstdint>
#include <memory>

#include <nvpflow/spec.hpp>

namespace nvpflow {

enum class Direction { forward, inverse };  // data -> latent, latent -> data

/// Adam with decoupled weight decay (Kingma and Ba 2015; Loshchilov and Hutter 2019).
struct AdamStep {
  double learning_rate = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;
  double weight_decay = 0.0;
  std::int64_t step = 1;         // 1 for the first update: bias correction
  double gradient_factor = 1.0;  // multiplies every gradient first (norm clipping)
};

class Backend {
 public:
  virtual ~Backend() = default;

  /// Takes a copy of the flat parameters into the backend's own packed form. Calls in flight finish on the old
  /// ones; calls that start after it returns see the new ones.
  virtual void set_parameters(const void* parameters) = 0;

  /// out [rows, D]; log_det [rows] may be null; it belongs to the direction that is run.
  virtual void transform(Direction direction, const void* in, std::int64_t rows, void* out, void* log_det,
                         int threads) const = 0;
  /// out [rows] = log N(z; 0, I) + log|det dz/dx|, nats.
  virtual void log_prob(const void* x, std::int64_t rows, void* out, int threads) const = 0;
  /// x [rows, D] = inverse(noise), row i from the noise of row first_row + i of `seed`.
  virtual void sample(std::uint64_t seed, std::uint64_t first_row, std::int64_t rows, void* x, int threads) const = 0;
  /// noise [rows, D]: the standard normals that sample() starts from.
  virtual void noise(std::uint64_t seed, std::uint64_t first_row, std::int64_t rows, void* z, int threads) const = 0;
  /// Log-scale s and shift t, each [rows, |b|], of coupling layer `layer` on its own input [rows, D].
  virtual void conditioner(std::int64_t layer, const void* in, std::int64_t rows, void* s, void* t,
                           int threads) const = 0;

  /// Vector-Jacobian product of `direction`. Given grad_out [rows, D] and grad_log_det [rows] (either may be null:
  /// zero), writes grad_in [rows, D] (may be null) and writes or adds to grad_parameters (may be null), flat.
  virtual void vjp(Direction direction, const void* in, std::int64_t rows, const void* grad_out,
                   const void* grad_log_det, void* grad_in, void* grad_parameters, bool accumulate,
                   int threads) const = 0;
  /// Sum over the rows of log p, nats. Writes or adds to grad_parameters, flat, the gradient of
  /// -(1 / total_rows) times that sum: a batch of total_rows may come in slices. index: null, or the rows of x to
  /// take, in order.
  virtual double nll_gradient(const void* x, const std::int64_t* index, std::int64_t rows, std::int64_t total_rows,
                              void* grad_parameters, bool accumulate, int threads) const = 0;
  /// Sum over rows of log p, in float64, in a fixed order.
  virtual double sum_log_prob(const void* x, const std::int64_t* index, std::int64_t rows, int threads) const = 0;

  /// One Adam update of `count` elements; all arrays of the flow's dtype.
  virtual void adam_step(const AdamStep& step, std::int64_t count, const void* gradient, void* first_moment,
                         void* second_moment, void* parameters) const = 0;
  /// Sum of squares in float64, in a fixed order.
  virtual double sum_of_squares(const void* values, std::int64_t count) const = 0;
};

/// The CPU backend, on the instruction set that isa.cpp chose. Throws Error(unavailable) where NVPFLOW_ISA names an
/// unknown or unsupported one.
std::unique_ptr<Backend> make_cpu_backend(const FlowSpec& spec, const ParamLayout& layout);

/// "baseline", "avx2", "avx512" or "neon": what the CPU kernels run on in this process.
const char* cpu_isa();
/// Instruction sets built in and supported by this processor, best first, comma-separated.
const char* cpu_isas_available();

}  // namespace nvpflow
