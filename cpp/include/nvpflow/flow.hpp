/// @file
/// A normalizing flow of coupling layers on caller-owned memory: exact density, both directions, sampling and
/// gradients.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nvpflow/device.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/execution.hpp>
#include <nvpflow/spec.hpp>
#include <nvpflow/threshold.hpp>
#include <nvpflow/version.hpp>

/// The C++ interface: Flow, FlowSpec, fit() and what they need.
namespace nvpflow {

class ConditionedFlow;
struct FlowAccess;
struct LoadedModel;

/// What a standardize layer is set from.
///
/// - mean: mean and standard deviation.
/// - robust: median and interquartile range over 1.349, the standard deviation of a normal distribution with these
///   quartiles. Where half of a column's values are equal, the range from 5 to 95 % or from 1 to 99 % takes its place.
///   Where both are empty, the column takes mean.
/// - automatic: robust in the columns whose standard deviation is at least 10 times that number, because far rows make
///   it, else mean. With the base student_t robust in all columns.
enum class Statistics { automatic, mean, robust };

/// @{
/// "auto", "mean", "robust"; the parser throws Error(invalid_argument) that lists them.
NVPFLOW_API std::string_view name_of(Statistics statistics);
NVPFLOW_API Statistics parse_statistics(std::string_view name);
/// @}

/// Wherever `T` appears it must be the flow's dtype (float or double), else Error(type_mismatch). There is one
/// exception: rows of data x may be double for a float32 flow that begins with a standardize layer
/// (takes_float64_rows). That layer is then applied in float64, so that values that are large beside their spread keep
/// their digits. Arrays are row-major [B, D]; B follows from the spans. A span of the wrong length, or an output that
/// overlaps an input or another output, is Error(invalid_argument). A row that holds NaN or inf gives NaN in all of
/// that row's results and touches no other.
///
/// A finite row never gives NaN. Where numbers are too large for `T`, its log-density is -inf. Values that are too
/// large are infinite, and inf where they cannot be told (inf - inf). A log-determinant that cannot be told is -inf of
/// forward and inf of inverse, so that the density is 0 either way. A density of 0 has no gradient: it is NaN or
/// infinite. Only a row outside a bounded base has the gradient 0.
///
/// temperature T, of log_prob and the samples: the flow's base is N(0, T I) in this call, in place of N(0, I). This
/// density integrates to 1 as well. T scales the variance of the base. The standard deviation, which Glow's temperature
/// scales, goes with its square root. From 1e-12 to 1e12, and 1 where the base is not normal or the arrays are a
/// device's (Execution::on_stream): else Error(invalid_argument). Other temperatures than 1 allocate 8 MB at most,
/// whatever prepare() promises.
///
/// A flow whose spec has a context_size C is a density p(x | c). Its calls take a context of the flow's dtype. [B, C]
/// has one row for each row of the call. [C] is one for all, which is cheaper and gives the same bits. Without one, or
/// with one that is superfluous or of the wrong size: Error(invalid_argument). condition() binds one. A context row
/// that holds NaN or inf counts as one of x.
///
/// Const members may be called from any number of threads at once. Another thread may replace the parameters meanwhile:
/// each call sees the old or the new ones whole.
///
/// Spans are the host's memory on every device: a CUDA flow copies in chunks, so that they may be larger than the
/// device's memory. Arrays in the device's memory go through the unchecked calls and Execution::on_stream. CUDA flows
/// throw Error(device) where the device fails, and in a forked child; Error(out_of_memory), after which they can be
/// used on.
///
/// The work of forward, inverse, log_prob, the samples and nll does not depend on the values. It is one multiply-add
/// per row and weight (num_parameters() bounds the weights) and one activation per row and hidden unit. There are a
/// tanh and an exp per row and transformed feature, too. Each weight is read once per tile of rows. Gradients take
/// three times as much. Memory: the scratch of one tile per thread, which is allocated by its first call and stays. See
/// prepare() for real-time use.
class NVPFLOW_API Flow {
 public:
  /// A new flow with initialize_parameters() of seed and init. Throws Error(device) where CUDA cannot be used. Throws
  /// Error(invalid_argument) for a device that is not there, or a precision or weights that it does not have.
  explicit Flow(FlowSpec spec, std::uint64_t seed = 0, Device device = {}, Precision precision = Precision::float32,
                Weights weights = Weights::full, Init init = Init::fan_in);
  ~Flow();
  /// What was moved from can be assigned to and destroyed, nothing else.
  Flow(Flow&&) noexcept;
  /// As above.
  Flow& operator=(Flow&&) noexcept;
  /// A copy owns its parameters.
  Flow(const Flow&);
  /// As above.
  Flow& operator=(const Flow&);

  /// A model file (python/docs/file_format.md). Throws Error(io) or Error(file_format).
  static Flow load(const std::string& path, Device device = {}, Precision precision = Precision::float32,
                   Weights weights = Weights::full);
  /// As load; for a file without a spec of its own (only tensors) whose spec cannot be read off them, or to check it.
  static Flow load(const std::string& path, const FlowSpec& expected, Device device = {},
                   Precision precision = Precision::float32, Weights weights = Weights::full);
  /// Atomic: writes beside `path`, syncs, renames. On failure the old file is as it was.
  void save(const std::string& path) const;

  /// A copy on another device, or of another precision or storage of weights.
  Flow to(Device device, Precision precision = Precision::float32, Weights weights = Weights::full) const;

  /// What the flow is; never changes.
  const FlowSpec& spec() const;
  /// Where it runs.
  Device device() const;
  /// How a CUDA device forms products.
  Precision precision() const;
  /// How the CPU stores the kernels that it computes with.
  Weights weights() const;
  /// Names, shapes and places of the parameters.
  const ParamLayout& layout() const;
  /// Elements of all parameters.
  std::int64_t num_parameters() const;
  /// Names of the columns, in their order, or empty: for people and for those who read tables, no call looks at them. A
  /// file keeps them, and so do copies.
  std::vector<std::string> column_names() const;
  /// One for each column, or none, distinct where they are not empty, and from context_names; else
  /// Error(invalid_argument).
  void set_column_names(std::vector<std::string> names);
  /// Names of the numbers of a context, in their order, or empty; as column_names.
  std::vector<std::string> context_names() const;
  /// One for each of the spec's context_size numbers, or none, distinct where they are not empty, and from
  /// column_names; else Error(invalid_argument).
  void set_context_names(std::vector<std::string> names);
  /// The limit of log p that goes with the parameters, if there is one: for those who score rows, no call looks at it.
  /// A file keeps it, and so do copies. It holds for these parameters: set_parameters and fit() remove it, reload takes
  /// the file's, and swap exchanges it with them.
  std::optional<Threshold> threshold() const;
  /// std::nullopt: none. Error(invalid_argument) where a number is not as Threshold says.
  void set_threshold(std::optional<Threshold> threshold);
  /// Where the parameters come from, as Python's nvpflow.importers wrote it: JSON, or "" for those that were not
  /// imported. Kept and removed as the threshold is.
  std::string import_report() const;
  /// A JSON object, or "" for none; else Error(invalid_argument).
  void set_import_report(std::string text);
  /// Threads of a batch call; small batches use fewer. 0: available_threads(), counted when the process made its first
  /// flow. Any other number is taken as it is.
  int num_threads() const;
  /// See num_threads(); negative: Error(invalid_argument).
  void set_num_threads(int threads);
  /// Prepares this thread for real-time calls of up to max_rows rows: forward, inverse, log_prob, both samples, nll.
  /// From now on such calls on this flow stay on their caller's thread. Those of this thread neither allocate nor lock
  /// nor make a system call, unless they throw. This holds for every flow of the same dtype that is no larger, too.
  /// Each real-time thread must call prepare() itself; the largest max_rows counts. 0: calls may use threads again.
  /// set_parameters, reload and swap on other threads change nothing of this. Throws Error(invalid_argument) on a CUDA
  /// device, whose driver promises nothing.
  ///
  /// Work: allocates and writes the calling thread's scratch, and scores one tile of rows. The scratch does not depend
  /// on max_rows and stays until the thread ends.
  void prepare(std::int64_t max_rows) const;

  /// The flat parameters (ParamLayout), replaced only through set_parameters: the flow's own buffer, which a thread
  /// that reads it meanwhile may see half replaced.
  template <class T>
  std::span<const T> parameters() const;
  /// A copy of them, and of mean_low() where asked for, whole also while another thread replaces them.
  template <class T>
  void copy_parameters(std::span<T> out, std::vector<float>* mean_low = nullptr) const;
  /// Replaces them while other threads may call the flow: each call sees the old or the new ones whole. mean_low: see
  /// mean_low(); none: zeros. The threshold and the import report go with the old ones.
  template <class T>
  void set_parameters(std::span<const T> parameters, std::span<const float> mean_low = {});
  /// Of a flow with takes_float64_rows: what the mean of the first layer is beyond its float32 number, [D], or empty
  /// where that is nothing. fit() sets it from float64 rows, in columns where it is more than 1/128 of the standard
  /// deviation. Where there is any, rows of float32 go through the layer in float64 as well. Files and copies keep it.
  std::vector<float> mean_low() const;
  /// Replaces parameters, threshold and import report by those of a model file. The file must have this flow's spec
  /// and, where both have some, its column and context names; else Error(file_format) names the difference. Other
  /// threads may call the flow meanwhile: each call sees the old or the new parameters whole. On failure nothing has
  /// changed. Work: that of load. It waits for calls under way on the old parameters, without making them wait.
  void reload(const std::string& path);
  /// Exchanges the parameters, thresholds and import reports of two flows of the same spec (else
  /// Error(invalid_argument)), whatever their devices, while other threads may call both. Each flow changes at one
  /// moment, for all callers; the two moments differ. On failure nothing has changed. Work: packs both sets of
  /// parameters.
  void swap(Flow& other);

  /// Sets from rows x [N, D] what fit() sets before it trains, and replaces what was set before. That is a standardize
  /// layer that comes first, lu_linear layers that whiten, and actnorm layers. Of a context [N, C] that the flow
  /// standardizes it is the mean and standard deviation. A mixture base that is as a new flow has it is set, too.
  /// Returns, for each column, what a first standardize layer was set from: "mean", "robust", "robust (5 to 95 %)" or
  /// "robust (1 to 99 %)". Throws Error(invalid_argument) for a flow with none of these, for no rows, for NaN or inf,
  /// for a constant column and for a missing context. So it does for columns that follow from others, where they are to
  /// be whitened, unless allow_degenerate (FitOptions). The same for any number of threads and any device. T: also
  /// double, for a float32 flow with takes_float64_rows; mean_low() is then set, too. sample_weight: [N], as of
  /// SampleWeights, so that all is set from weighted moments and quantiles; empty: all rows count alike.
  template <class T>
  std::vector<std::string> initialize_from(std::span<const T> x, Statistics statistics = Statistics::automatic,
                                           const Context& context = {}, std::span<const double> sample_weight = {},
                                           bool allow_degenerate = false);

  /// z [B, D] and log|det dz/dx| [B] (may be empty: not wanted), nats.
  template <class T>
  void forward(std::span<const T> x, std::span<T> z, std::span<T> log_det = {}, const Context& context = {}) const;
  /// float64 rows of a float32 flow.
  void forward(std::span<const double> x, std::span<float> z, std::span<float> log_det = {},
               const Context& context = {}) const;
  /// x [B, D] and log|det dx/dz| [B] (may be empty).
  template <class T>
  void inverse(std::span<const T> z, std::span<T> x, std::span<T> log_det = {}, const Context& context = {}) const;
  /// float64 rows of a float32 flow.
  void inverse(std::span<const float> z, std::span<double> x, std::span<float> log_det = {},
               const Context& context = {}) const;
  /// How far x is from inverse(forward(x)): the largest |x' - x| / (sigma + |x|) over all elements, in float64. sigma
  /// is the standard deviation of the column where the flow begins with a standardize layer, else 1. |x| is counted
  /// from the column's mean for float64 rows of a float32 flow. Rows of x with NaN or inf do not count. Infinite where
  /// a finite row does not come back finite; 0 without rows.
  template <class T>
  double round_trip_error(std::span<const T> x, const Context& context = {}) const;
  /// log p(x) [B], nats.
  template <class T>
  void log_prob(std::span<const T> x, std::span<T> out, const Context& context = {}, double temperature = 1) const;
  /// float64 rows of a float32 flow.
  void log_prob(std::span<const double> x, std::span<float> out, const Context& context = {},
                double temperature = 1) const;
  /// x [B, D]: rows first_row .. first_row + B of the endless sample that `seed` names. The same for every batch size
  /// and thread count (Philox 4x32-10, Salmon et al. 2011, keyed by seed, counter = row and column). Of a float32 flow
  /// with takes_float64_rows also as float64. A context of [M, C], M a divisor of B, gives B / M consecutive rows under
  /// each of its rows.
  template <class T>
  void sample(std::uint64_t seed, std::span<T> x, std::uint64_t first_row = 0, const Context& context = {},
              double temperature = 1) const;
  /// The rows of sample, with the same bits, and log p [B] of each, nats, in the same pass. It is that of the numbers
  /// before they are rounded: from log p(x) it differs by what log_prob makes of the rounding.
  template <class T>
  void sample_and_log_prob(std::uint64_t seed, std::span<T> x, std::span<T> log_prob, std::uint64_t first_row = 0,
                           const Context& context = {}, double temperature = 1) const;
  /// float64 rows of a float32 flow.
  void sample_and_log_prob(std::uint64_t seed, std::span<double> x, std::span<float> log_prob,
                           std::uint64_t first_row = 0, const Context& context = {}, double temperature = 1) const;
  /// -mean log p(x) over the batch, nats; at least one row. Also of float64 rows of a float32 flow.
  template <class T>
  double nll(std::span<const T> x, const Context& context = {}) const;
  /// -sum w log p(x) / sum w. A row of weight 0 is not looked at, whatever it holds. Weights that are all 1 give the
  /// bits of the call without them. Throws Error(invalid_argument) for weights that are no such (SampleWeights).
  template <class T>
  double nll(std::span<const T> x, const SampleWeights& weights, const Context& context = {}) const;
  /// nll(x); its gradient with respect to the flat parameters overwrites `gradient`.
  template <class T>
  double nll_gradient(std::span<const T> x, std::span<T> gradient, const Context& context = {}) const;
  /// float64 rows of a float32 flow.
  double nll_gradient(std::span<const double> x, std::span<float> gradient, const Context& context = {}) const;
  /// nll(x, weights) and its gradient, of which a row of weight 0 changes no bit.
  template <class T>
  double nll_gradient(std::span<const T> x, std::span<T> gradient, const SampleWeights& weights,
                      const Context& context = {}) const;
  /// float64 rows of a float32 flow.
  double nll_gradient(std::span<const double> x, std::span<float> gradient, const SampleWeights& weights,
                      const Context& context = {}) const;
  /// The gradient of log p(x) by x [B, D], nats per unit of x: the score.
  template <class T>
  void score(std::span<const T> x, std::span<T> out, const Context& context = {}) const;
  /// float64 rows of a float32 flow.
  void score(std::span<const double> x, std::span<float> out, const Context& context = {}) const;
  /// Vector-Jacobian products. grad_out [B, D] and grad_log_det [B] may be empty (zero), grad_in [B, D] and
  /// grad_parameters too (not wanted). accumulate adds to grad_parameters instead of overwriting them.
  /// Forward: `in` is x, grad_out is dL/dz. Inverse: `in` is z, grad_out is dL/dx. grad_context, of the context's own
  /// size, may be empty.
  template <class T>
  void vjp(Direction direction, std::span<const T> in, std::span<const T> grad_out, std::span<const T> grad_log_det,
           std::span<T> grad_in, std::span<T> grad_parameters, bool accumulate = false, const Context& context = {},
           std::span<T> grad_context = {}) const;
  /// float64 rows x of a float32 flow, forward.
  void vjp(std::span<const double> x, std::span<const float> grad_out, std::span<const float> grad_log_det,
           std::span<float> grad_x, std::span<float> grad_parameters, bool accumulate = false,
           const Context& context = {}, std::span<float> grad_context = {}) const;
  /// The flow under one context [C]: x -> p(x | c), with the same bits as the calls above with `context`. What the
  /// context comes to in each network is computed here and not in each call. The view must not outlive the flow. Makes
  /// copies, which allocates: where the context is new in every call, `context` is for real time.
  template <class T>
  ConditionedFlow condition(std::span<const T> context) const;
  /// Log-scale s and shift t [B, |b|] of layer `layer`, which must be a coupling, on that layer's own input [B, D].
  template <class T>
  void conditioner(std::int64_t layer, std::span<const T> in, std::span<T> s, std::span<T> t,
                   const Context& context = {}) const;

  /// @{
  /// The calls above for arrays that the caller has checked. Behind each pointer are `rows` rows of the types that
  /// `how` says; it is null where a span may be empty. Sizes, dtypes and overlaps are not checked. The calls
  /// above go through these: threads, prepare(), the sign of a mean and its refusal of an empty batch are the same. A
  /// CUDA flow also takes arrays of its device (Execution::on_stream).
  void transform_unchecked(Direction direction, const void* in, std::int64_t rows, void* out, void* log_det,
                           const Execution& how = {}) const;
  void log_prob_unchecked(const void* x, std::int64_t rows, void* out, const Execution& how = {}) const;
  void sample_unchecked(std::uint64_t seed, std::uint64_t first_row, std::int64_t rows, void* x,
                        void* log_prob = nullptr, const Execution& how = {}) const;
  /// These two at a temperature, which is checked.
  void tempered_log_prob_unchecked(double temperature, const void* x, std::int64_t rows, void* out,
                                   const Execution& how = {}) const;
  void tempered_sample_unchecked(double temperature, std::uint64_t seed, std::uint64_t first_row, std::int64_t rows,
                                 void* x, void* log_prob = nullptr, const Execution& how = {}) const;
  double nll_unchecked(const void* x, std::int64_t rows, const Execution& how = {}) const;
  double nll_gradient_unchecked(const void* x, std::int64_t rows, void* gradient, const Execution& how = {}) const;
  /// With weights: arrays of the host.
  double nll_unchecked(const void* x, const SampleWeights& weights, const Execution& how = {}) const;
  double nll_gradient_unchecked(const void* x, const SampleWeights& weights, void* gradient,
                                const Execution& how = {}) const;
  /// Of a part of a batch: returns its share -sum(w log p) / total of the loss, and writes or adds that share's
  /// gradient. A part of no rows has the share 0 where the total is given.
  double nll_gradient_unchecked(const void* x, const BatchPart& part, void* gradient, const Execution& how = {}) const;
  void vjp_unchecked(Direction direction, const void* in, std::int64_t rows, const void* grad_out,
                     const void* grad_log_det, void* grad_in, void* grad_parameters, bool accumulate,
                     const Execution& how = {}) const;
  void conditioner_unchecked(std::int64_t layer, const void* in, std::int64_t rows, void* s, void* t,
                             const Execution& how = {}) const;
  /// Vector-Jacobian product of log_prob: from grad_log_prob [B], null for ones; also writes log_prob [B] where that is
  /// not null.
  void log_prob_vjp_unchecked(const void* x, std::int64_t rows, const void* grad_log_prob, void* log_prob, void* grad_x,
                              void* grad_parameters, bool accumulate, const Execution& how = {}) const;
  /// The latents [B, D] that sample starts from.
  void noise_unchecked(std::uint64_t seed, std::uint64_t first_row, std::int64_t rows, void* z,
                       const Execution& how = {}) const;
  /// A flow on the CPU with these parameters: for each tensor of ParamLayout(spec), in its order, where it lies.
  static Flow of_tensors(FlowSpec spec, std::span<const void* const> tensors);
  /// As set_parameters, from such tensors. If it throws, the flow's parameters are undefined.
  void set_tensors_unchecked(std::span<const void* const> tensors);
  /// @}

 private:
  struct State;
  friend struct FlowAccess;
  explicit Flow(std::unique_ptr<State> state);
  static Flow from_model(LoadedModel&& model, Device device, Precision precision, Weights weights);
  std::unique_ptr<State> state_;
};

/// A flow under one context, made by Flow::condition, which it must not outlive. Its calls are the flow's without a
/// context, on the flow's present parameters. After they change each call computes anew what the view was made to save:
/// make it again. Copies share what was computed.
class ConditionedFlow {
 public:
  /// The flow.
  const Flow& flow() const { return *flow_; }
  /// What it is conditioned on, for the flow's own calls.
  const Context& context() const { return context_; }

  /// @{
  /// As the calls of Flow by the same names.
  template <class T>
  void forward(std::span<const T> x, std::span<T> z, std::span<T> log_det = {}) const {
    flow_->forward<T>(x, z, log_det, context_);
  }
  void forward(std::span<const double> x, std::span<float> z, std::span<float> log_det = {}) const {
    flow_->forward(x, z, log_det, context_);
  }
  template <class T>
  void inverse(std::span<const T> z, std::span<T> x, std::span<T> log_det = {}) const {
    flow_->inverse<T>(z, x, log_det, context_);
  }
  void inverse(std::span<const float> z, std::span<double> x, std::span<float> log_det = {}) const {
    flow_->inverse(z, x, log_det, context_);
  }
  template <class T>
  double round_trip_error(std::span<const T> x) const {
    return flow_->round_trip_error<T>(x, context_);
  }
  template <class T>
  void log_prob(std::span<const T> x, std::span<T> out, double temperature = 1) const {
    flow_->log_prob<T>(x, out, context_, temperature);
  }
  void log_prob(std::span<const double> x, std::span<float> out, double temperature = 1) const {
    flow_->log_prob(x, out, context_, temperature);
  }
  template <class T>
  void sample(std::uint64_t seed, std::span<T> x, std::uint64_t first_row = 0, double temperature = 1) const {
    flow_->sample<T>(seed, x, first_row, context_, temperature);
  }
  template <class T>
  void sample_and_log_prob(std::uint64_t seed, std::span<T> x, std::span<T> log_prob, std::uint64_t first_row = 0,
                           double temperature = 1) const {
    flow_->sample_and_log_prob<T>(seed, x, log_prob, first_row, context_, temperature);
  }
  void sample_and_log_prob(std::uint64_t seed, std::span<double> x, std::span<float> log_prob,
                           std::uint64_t first_row = 0, double temperature = 1) const {
    flow_->sample_and_log_prob(seed, x, log_prob, first_row, context_, temperature);
  }
  template <class T>
  void score(std::span<const T> x, std::span<T> out) const {
    flow_->score<T>(x, out, context_);
  }
  void score(std::span<const double> x, std::span<float> out) const { flow_->score(x, out, context_); }
  template <class T>
  double nll(std::span<const T> x) const {
    return flow_->nll<T>(x, context_);
  }
  template <class T>
  double nll_gradient(std::span<const T> x, std::span<T> gradient) const {
    return flow_->nll_gradient<T>(x, gradient, context_);
  }
  double nll_gradient(std::span<const double> x, std::span<float> gradient) const {
    return flow_->nll_gradient(x, gradient, context_);
  }
  template <class T>
  double nll(std::span<const T> x, const SampleWeights& weights) const {
    return flow_->nll<T>(x, weights, context_);
  }
  template <class T>
  double nll_gradient(std::span<const T> x, std::span<T> gradient, const SampleWeights& weights) const {
    return flow_->nll_gradient<T>(x, gradient, weights, context_);
  }
  double nll_gradient(std::span<const double> x, std::span<float> gradient, const SampleWeights& weights) const {
    return flow_->nll_gradient(x, gradient, weights, context_);
  }
  template <class T>
  void vjp(Direction direction, std::span<const T> in, std::span<const T> grad_out, std::span<const T> grad_log_det,
           std::span<T> grad_in, std::span<T> grad_parameters, bool accumulate = false) const {
    flow_->vjp<T>(direction, in, grad_out, grad_log_det, grad_in, grad_parameters, accumulate, context_);
  }
  void vjp(std::span<const double> x, std::span<const float> grad_out, std::span<const float> grad_log_det,
           std::span<float> grad_x, std::span<float> grad_parameters, bool accumulate = false) const {
    flow_->vjp(x, grad_out, grad_log_det, grad_x, grad_parameters, accumulate, context_);
  }
  template <class T>
  void conditioner(std::int64_t layer, std::span<const T> in, std::span<T> s, std::span<T> t) const {
    flow_->conditioner<T>(layer, in, s, t, context_);
  }
  /// @}

 private:
  friend class Flow;
  ConditionedFlow(const Flow& flow, std::shared_ptr<const void> row, std::shared_ptr<const void> folded,
                  const Context& context)
      : flow_(&flow), row_(std::move(row)), folded_(std::move(folded)), context_(context) {}

  const Flow* flow_;
  std::shared_ptr<const void> row_, folded_;  // what context_ points to
  Context context_;
};

}  // namespace nvpflow
