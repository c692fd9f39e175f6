// The seam between a flow and the hardware that runs it. Few, fat calls on whole flows: fusion is each backend's
// private matter. Arrays are row-major, of the flow's dtype, non-overlapping and already checked by the caller;
// const calls may run concurrently with each other and with set_parameters. They lie in the host's memory unless
// Execution, whose number of threads is settled here, says otherwise.
#pragma once

#include <cstdint>
#include <memory>

#include <nvpflow/device.hpp>
#include <nvpflow/execution.hpp>
#include <nvpflow/spec.hpp>

namespace nvpflow {

class Training;
struct TrainingData;

/// Which rows of x a mean is of, and what each counts for.
struct WeighedRows {
  std::int64_t count = 0;
  const std::int64_t* index = nullptr;  ///< [count], the rows to take, in order; null: the first ones
  const double* weights = nullptr;      ///< above 0, of the rows of x, in the host's memory; null: all are 1

  /// Of row i of those that are taken.
  double weight(std::int64_t i) const { return weights == nullptr ? 1 : weights[index == nullptr ? i : index[i]]; }
};

/// What a device can do with a whole flow. Made by make_cpu_backend and make_cuda_backend, used by Flow and
/// training.
class Backend {
 public:
  virtual ~Backend() = default;

  /// Takes a copy of the flat parameters into the backend's own packed form. Calls in flight finish on the old
  /// ones; calls that start after it returns see the new ones. mean_low [D]: what a first standardize layer's mean is
  /// beyond its float32 number (Flow::mean_low); null: nothing.
  virtual void set_parameters(const void* parameters, const float* mean_low = nullptr) = 0;

  /// out [rows, D]; log_det [rows] may be null; it belongs to the direction that is run.
  virtual void transform(Direction direction, const void* in, std::int64_t rows, void* out, void* log_det,
                         const Execution& how) const = 0;
  /// out [rows] = log base(z) + log|det dz/dx|, nats.
  virtual void log_prob(const void* x, std::int64_t rows, void* out, const Execution& how) const = 0;
  /// x [rows, D] = inverse(noise), row i from the noise of row first_row + i of `seed`; log_prob [rows], may be null:
  /// log base(noise) - log|det dx/dz|, nats.
  virtual void sample(std::uint64_t seed, std::uint64_t first_row, std::int64_t rows, void* x, void* log_prob,
                      const Execution& how) const = 0;
  /// noise [rows, D]: the latents that sample() starts from.
  virtual void noise(std::uint64_t seed, std::uint64_t first_row, std::int64_t rows, void* z,
                     const Execution& how) const = 0;
  /// Log-scale s and shift t, each [rows, |b|], of coupling layer `layer` on its own input [rows, D].
  virtual void conditioner(std::int64_t layer, const void* in, std::int64_t rows, void* s, void* t,
                           const Execution& how) const = 0;

  /// Vector-Jacobian product of `direction`. Given grad_out [rows, D] and grad_log_det [rows] (either may be null:
  /// zero), writes grad_in [rows, D] (may be null) and writes or adds to grad_parameters (may be null), flat.
  virtual void vjp(Direction direction, const void* in, std::int64_t rows, const void* grad_out,
                   const void* grad_log_det, void* grad_in, void* grad_parameters, bool accumulate,
                   const Execution& how) const = 0;
  /// The same for log_prob: from grad_log_prob [rows] (null: ones); also writes log_prob [rows] (may be null), the bits
  /// of log_prob().
  virtual void log_prob_vjp(const void* x, std::int64_t rows, const void* grad_log_prob, void* log_prob, void* grad_x,
                            void* grad_parameters, bool accumulate, const Execution& how) const = 0;
  /// Sum by weight over the rows of log p, nats. Writes or adds to grad_parameters, flat, the gradient of -(1 / total)
  /// times that sum. total: of the weights of the whole batch.
  virtual double nll_gradient(const void* x, const WeighedRows& rows, double total, void* grad_parameters,
                              bool accumulate, const Execution& how) const = 0;
  /// Sum by weight over the rows of log p, in float64, in a fixed order.
  virtual double sum_log_prob(const void* x, const WeighedRows& rows, const Execution& how) const = 0;

  /// Makes the calling thread's working memory for every const call of any number of rows but those that form
  /// gradients, so that they allocate nothing from then on. Backends whose calls allocate all the same do nothing.
  virtual void prepare() const {}

  /// What Execution's ContextRows::folded points to, of one context row [C], for calls on this backend: it is folded
  /// anew by each call after set_parameters. null: the backend has no such thing.
  virtual std::shared_ptr<const void> fold(const void* /*context*/) const { return nullptr; }

  /// A training run that starts from the flat `parameters`. A batch of more than `slice_rows` comes in slices of so
  /// many, of which only the last one may be shorter.
  virtual std::unique_ptr<Training> begin_training(const TrainingData& data, const void* parameters,
                                                   std::int64_t slice_rows, const Execution& how) const = 0;
};

/// The CPU backend, on the instruction set that isa.cpp chose. Throws Error(unavailable) where NVPFLOW_ISA names an
/// unknown or unsupported one.
std::unique_ptr<Backend> make_cpu_backend(const FlowSpec& spec, const ParamLayout& layout, Weights weights);

/// The CUDA backend on one device. Throws Error(device) where CUDA cannot be used, with the reason of
/// cuda_why_unavailable(), and Error(invalid_argument) for a device that is not there.
std::unique_ptr<Backend> make_cuda_backend(const FlowSpec& spec, const ParamLayout& layout, int device_index,
                                           Precision precision);

}  // namespace nvpflow
