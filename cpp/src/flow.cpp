// Flow: owns the parameters, checks arguments, calls the backend.

#include <nvpflow/flow.hpp>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <nvpflow/device.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/execution.hpp>
#include <nvpflow/overlap.hpp>
#include <nvpflow/spec.hpp>

#include "backend.hpp"
#include "bounded_backend.hpp"
#include "bounds_map.hpp"
#include "float_mode.hpp"
#include "flow_access.hpp"
#include "io/model_file.hpp"
#include "io/spec_json.hpp"
#include "layers/layer.hpp"
#include "parallel.hpp"
#include "sample_weights.hpp"

namespace nvpflow {
namespace {

template <class T>
constexpr DType dtype_of = sizeof(T) == 4 ? DType::float32 : DType::float64;

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

/// A span with the name that its errors use.
template <class Span>
struct Named {
  const char* name;
  Span span;
};
template <class Span>
Named(const char*, Span) -> Named<Span>;  // clang before 17 does not deduce it for aggregates

template <class Span>
NamedMemory memory_of(const Named<Span>& s) {
  return {s.name, s.span.data(), static_cast<std::int64_t>(s.span.size_bytes())};
}

template <class A, class B>
void refuse_overlap(const Named<A>& a, const Named<B>& b) {
  nvpflow::refuse_overlap(memory_of(a), memory_of(b));
}

template <class... Outputs>
void refuse_overlap(const Context& context, const Named<Outputs>&... outputs) {
  const NamedMemory given = {"context", context.data(), context.size() * static_cast<std::int64_t>(context.element())};
  (nvpflow::refuse_overlap(memory_of(outputs), given), ...);
}

template <class Span>
void check_length(const Named<Span>& s, std::int64_t expected, const char* shape) {
  if (static_cast<std::int64_t>(s.span.size()) != expected) {
    fail(std::string(s.name) + " holds " + std::to_string(s.span.size()) + " elements, expected " +
         std::to_string(expected) + " (" + shape + ")");
  }
}

/// An empty span means: not wanted.
template <class Span>
auto* data_or_null(const Span& s) {
  return s.empty() ? nullptr : s.data();
}

std::unique_ptr<Backend> make_backend(const FlowSpec& spec, const ParamLayout& layout, Device device,
                                      Precision precision, Weights weights) {
  const FloatMode mode;
  if (spec.bounds() != nullptr) {
    const FlowSpec behind = spec.behind_bounds();
    return make_bounded_backend(spec, make_backend(behind, ParamLayout(behind), device, precision, weights));
  }
  const std::string asked = "precision is '" + std::string(name_of(precision)) + "', ";
  if (precision != Precision::float32 && spec.dtype == DType::float64) {
    fail(asked + "which is for float32 flows; this one is float64, expected 'float32'");
  }
  if (weights == Weights::bfloat16 && spec.dtype == DType::float64) {
    fail("weights is 'bfloat16', which is for float32 flows; this one is float64, expected 'full'");
  }
  if (weights == Weights::bfloat16 && device.kind == DeviceKind::cuda) {
    fail("weights is 'bfloat16', expected 'full' on a CUDA device; see precision='bfloat16' there");
  }
  if (device.kind == DeviceKind::cuda) return make_cuda_backend(spec, layout, device.index, precision);
  if (precision != Precision::float32) fail(asked + "which only CUDA devices have; on the CPU expected 'float32'");
  return make_cpu_backend(spec, layout, weights);
}

}  // namespace

struct Flow::State {
  /// What is known of some parameters, and not of other ones.
  struct OfParameters {
    std::optional<Threshold> threshold;
    std::string import_report;
  };

  FlowSpec spec;
  ParamLayout layout;
  Device device;
  Precision precision;
  Weights weights;
  // One buffer for the flow's whole life, so that views of it stay valid; bytes, because the dtype is known at run
  // time.
  std::vector<unsigned char> parameters;
  std::vector<float> mean_low;  // [D]; empty: zeros
  std::vector<std::string> column_names, context_names;
  OfParameters known;
  std::unique_ptr<Backend> backend;
  ForkSafeMutex write_mutex;
  std::atomic<int> num_threads{0};
  std::atomic<std::int64_t> prepared_rows{0};

  State(FlowSpec s, Device d, Precision p, Weights w)
      : spec((s.validate(), std::move(s))),
        layout(spec),
        device(d),
        precision(p),
        weights(w),
        parameters(static_cast<std::size_t>(layout.size() * size_of(spec.dtype))),
        backend(make_backend(spec, layout, device, precision, weights)) {
    (void)available_threads();  // which reads the environment, and may refuse what it finds: now, not in a call
  }

  template <class T>
  void check_dtype() const {
    if (spec.dtype != dtype_of<T>) {
      std::string message =
          "the flow is " + std::string(name_of(spec.dtype)) + ", the arrays are " + std::string(name_of(dtype_of<T>));
      if (spec.dtype == DType::float32) {
        message += "; a float32 flow takes and gives rows of float64 where it begins with a standardize layer";
      }
      throw Error(ErrorCode::type_mismatch, message);
    }
  }

  /// Rows of data: of the flow's dtype, or of float64 where it takes them.
  template <class T>
  std::int64_t check_data(const Named<std::span<const T>>& x) const {
    if (!is_wide<T>()) check_dtype<T>();
    return count_rows(x);
  }

  /// float64 rows beside arrays of float32.
  std::int64_t check_wide(const Named<std::span<const double>>& x) const {
    check_dtype<float>();
    return check_data(x);
  }

  /// Whether rows of data of type T are float64 rows of a float32 flow that takes them.
  template <class T>
  bool is_wide() const {
    return sizeof(T) == 8 && takes_float64_rows(spec);
  }

  template <class T>
  std::int64_t check_rows(const Named<std::span<const T>>& in) const {
    check_dtype<T>();
    return count_rows(in);
  }

  template <class T>
  std::int64_t count_rows(const Named<std::span<const T>>& in) const {
    const auto size = static_cast<std::int64_t>(in.span.size());
    if (size % spec.input_size != 0) {
      fail(std::string(in.name) + " holds " + std::to_string(size) + " elements, expected a multiple of input_size " +
           std::to_string(spec.input_size));
    }
    return size / spec.input_size;
  }

  /// Threads of a batch call.
  int threads() const { return threads_or_available(num_threads.load(std::memory_order_relaxed)); }

  /// Execution with its threads settled.
  Execution settled(Execution how) const {
    require_context(how);
    if (how.threads == 0) how.threads = threads();
    return how;
  }
  /// The same for a call of the kind that prepare() speaks of.
  Execution settled(Execution how, std::int64_t rows) const {
    require_context(how);
    if (how.threads == 0) how.threads = rows <= prepared_rows.load(std::memory_order_relaxed) ? 1 : threads();
    return how;
  }

  /// How a call on data of type T runs.
  template <class T>
  Execution execution() const {
    Execution how;
    how.float64_rows = is_wide<T>();
    return how;
  }
  /// The same with a context for so many rows. divides: also one row for each of several consecutive rows.
  template <class T>
  Execution execution(const Context& context, std::int64_t rows, bool divides = false) const {
    Execution how = execution<T>();
    if (context.element() > 0 || spec.context_size > 0) how.context = check_context(context, rows, divides);
    return how;
  }

  /// Where a call's context row begins.
  const void* context_row(const Context& context, std::int64_t row) const {
    return static_cast<const unsigned char*>(context.data()) + row * spec.context_size * size_of(spec.dtype);
  }

  void require_context(const Execution& how) const {
    if (spec.context_size == 0 || how.context.rows != nullptr || how.context.folded != nullptr) return;
    fail_missing_context();
  }
  [[noreturn]] void fail_missing_context() const {
    const std::string size = std::to_string(spec.context_size);
    fail("context is missing, expected [B, " + size + "] or [" + size + "]: the flow is a density given a context");
  }
  ContextRows check_context(const Context& context, std::int64_t rows, bool divides) const {
    const std::int64_t size = spec.context_size;
    if (size == 0)
      fail("context holds " + std::to_string(context.size()) + " elements, expected none: the flow has no context");
    if (context.element() == 0) fail_missing_context();
    if (context.element() != static_cast<std::size_t>(size_of(spec.dtype))) {
      throw Error(ErrorCode::type_mismatch,
                  "context is of another type, expected the flow's " + std::string(name_of(spec.dtype)));
    }
    ContextRows found;
    found.rows = context.data();
    found.folded = context.folded();
    if (context.size() == size) {
      found.repeat = ContextRows::kForAll;
    } else if (context.size() != rows * size) {
      const std::int64_t count = context.size() / size;
      if (!divides || count == 0 || context.size() % size != 0 || rows % count != 0) {
        fail("context holds " + std::to_string(context.size()) + " elements, expected " + std::to_string(rows * size) +
             " ([B, C]) or " + std::to_string(size) + " ([C])" +
             (divides ? ", or rows of a number that divides " + std::to_string(rows) : ""));
      }
      found.repeat = rows / count;
    }
    if (found.rows == nullptr) found.rows = this;  // of no rows: nothing is read
    return found;
  }

  /// Calls f(execution) and gives the cotangent of the context its own shape: one row for all has the sum of those of
  /// the rows, which is what backends give.
  template <class F>
  void with_context_gradient(const Execution& asked, std::int64_t rows, F&& f) const {
    Execution how = settled(asked);
    void* sum = how.context.gradient;
    if (sum == nullptr || how.context.repeat == 1 || rows == 1) return f(how);
    if (how.device_arrays || how.context.repeat != ContextRows::kForAll) {
      throw Error(ErrorCode::unavailable,
                  "the gradient of one context row for several rows is summed for arrays of the host only; pass a "
                  "context of [B, C]");
    }
    std::vector<unsigned char> of_rows(static_cast<std::size_t>(rows * spec.context_size * size_of(spec.dtype)));
    how.context.gradient = of_rows.data();
    f(how);
    const void* from = of_rows.data();
    if (spec.dtype == DType::float32) {
      add_rows(static_cast<const float*>(from), rows, static_cast<float*>(sum));
    } else {
      add_rows(static_cast<const double*>(from), rows, static_cast<double*>(sum));
    }
  }
  /// sum [C] of rows [rows, C]
  template <class T>
  void add_rows(const T* from, std::int64_t rows, T* sum) const {
    for (std::int64_t i = 0; i < spec.context_size; ++i) {
      double total = 0;
      for (std::int64_t r = 0; r < rows; ++r) total += static_cast<double>(from[r * spec.context_size + i]);
      sum[i] = static_cast<T>(total);
    }
  }

  /// Of the standardize layer that the flow begins with, else zeros and ones, [D] each; behind bounds what the rows
  /// would have that it comes from, to first order.
  struct Columns {
    std::vector<double> means, deviations;
  };
  template <class T>
  Columns columns() {
    const auto width = static_cast<std::size_t>(spec.input_size);
    Columns found{std::vector<double>(width, 0.0), std::vector<double>(width, 1.0)};
    if (spec.begins_with_standardize()) {
      const std::lock_guard<ForkSafeMutex> lock(write_mutex);
      const void* flat = parameters.data();
      const T* mean = static_cast<const T*>(flat) + layout.tensors()[0].offset;
      const T* log_std = static_cast<const T*>(flat) + layout.tensors()[1].offset;
      for (std::size_t j = 0; j < width; ++j) {
        found.means[j] = static_cast<double>(mean[j]) + (mean_low.empty() ? 0.0 : static_cast<double>(mean_low[j]));
        found.deviations[j] = std::exp(static_cast<double>(log_std[j]));
      }
    }
    for (std::size_t j = 0; spec.bounds() != nullptr && j < width; ++j) {
      const BoundsMap column(spec.bounds()->low[j], spec.bounds()->high[j]);
      found.deviations[j] *= column.inverse_slopes(found.means[j]).of_value;
      found.means[j] = column.inverse(found.means[j]).value;
    }
    return found;
  }

  void publish(const void* values, OfParameters of_them = {}, std::span<const float> low = {}) {
    const std::lock_guard<ForkSafeMutex> lock(write_mutex);
    publish_locked(values, low);
    known = std::move(of_them);
  }

  void check_sign(const TensorInfo& tensor, const void* values) const {
    const std::string wrong = layers::describe_wrong_sign(tensor, spec.dtype, values);
    if (!wrong.empty()) fail(wrong);
  }

  /// The caller holds write_mutex.
  void publish_locked(const void* values, std::span<const float> low) {
    for (const TensorInfo& tensor : layout.tensors()) {
      check_sign(tensor, static_cast<const unsigned char*>(values) + tensor.offset * size_of(spec.dtype));
    }
    const bool none = std::all_of(low.begin(), low.end(), [](float v) { return v == 0; });
    std::vector<float> kept(none ? low.end() : low.begin(), low.end());
    // The backend first: a device may refuse, and then nothing has changed.
    backend->set_parameters(values, none ? nullptr : kept.data());
    if (values != parameters.data()) std::memmove(parameters.data(), values, parameters.size());
    mean_low = std::move(kept);
  }
};

Flow::Flow(FlowSpec spec, std::uint64_t seed, Device device, Precision precision, Weights weights, Init init)
    : state_(std::make_unique<State>(std::move(spec), device, precision, weights)) {
  const FloatMode mode;
  void* parameters = state_->parameters.data();
  if (state_->spec.dtype == DType::float32) {
    initialize_parameters(state_->layout, seed, static_cast<float*>(parameters), init);
  } else {
    initialize_parameters(state_->layout, seed, static_cast<double*>(parameters), init);
  }
  state_->backend->set_parameters(parameters);
}

Flow::Flow(std::unique_ptr<State> state) : state_(std::move(state)) {}
Flow::~Flow() = default;
Flow::Flow(Flow&&) noexcept = default;
Flow& Flow::operator=(Flow&&) noexcept = default;

Flow::Flow(const Flow& other) : Flow(other.to(other.device(), other.precision(), other.weights())) {}

Flow& Flow::operator=(const Flow& other) {
  if (this != &other) *this = Flow(other);
  return *this;
}

Flow Flow::to(Device device, Precision precision, Weights weights) const {
  Flow copy(std::make_unique<State>(spec(), device, precision, weights));
  copy.state_->num_threads.store(num_threads());
  const std::lock_guard<ForkSafeMutex> lock(state_->write_mutex);
  copy.state_->column_names = state_->column_names;
  copy.state_->context_names = state_->context_names;
  copy.state_->publish(state_->parameters.data(), state_->known, state_->mean_low);
  return copy;
}

Flow Flow::load(const std::string& path, Device device, Precision precision, Weights weights) {
  return from_model(load_model(path, nullptr), device, precision, weights);
}

Flow Flow::load(const std::string& path, const FlowSpec& expected, Device device, Precision precision,
                Weights weights) {
  expected.validate();
  return from_model(load_model(path, &expected), device, precision, weights);
}

Flow Flow::from_model(LoadedModel&& model, Device device, Precision precision, Weights weights) {
  Flow flow(std::make_unique<State>(std::move(model.spec), device, precision, weights));
  flow.state_->publish(model.parameters.data(), {model.threshold, std::move(model.import_report)}, model.mean_low);
  flow.state_->column_names = std::move(model.column_names);
  flow.state_->context_names = std::move(model.context_names);
  return flow;
}

void Flow::save(const std::string& path) const {
  // A snapshot: the file must not mix two sets of parameters, and writers must not wait for the disk.
  std::vector<unsigned char> snapshot;
  ModelNotes notes;
  {
    const std::lock_guard<ForkSafeMutex> lock(state_->write_mutex);
    snapshot = state_->parameters;
    notes = {state_->column_names, state_->context_names, state_->known.threshold, state_->mean_low,
             state_->known.import_report};
  }
  save_model(path, state_->spec, state_->layout, snapshot.data(), notes);
}

const FlowSpec& Flow::spec() const { return state_->spec; }
Device Flow::device() const { return state_->device; }
Precision Flow::precision() const { return state_->precision; }
Weights Flow::weights() const { return state_->weights; }
const ParamLayout& Flow::layout() const { return state_->layout; }
std::int64_t Flow::num_parameters() const { return state_->layout.size(); }
int Flow::num_threads() const { return state_->num_threads.load(); }

std::vector<std::string> Flow::column_names() const {
  const std::lock_guard<ForkSafeMutex> lock(state_->write_mutex);
  return state_->column_names;
}

void Flow::set_column_names(std::vector<std::string> names) {
  check_names("column_names", names, spec().input_size);
  const std::lock_guard<ForkSafeMutex> lock(state_->write_mutex);
  check_names_differ(names, state_->context_names);
  state_->column_names = std::move(names);
}

std::vector<std::string> Flow::context_names() const {
  const std::lock_guard<ForkSafeMutex> lock(state_->write_mutex);
  return state_->context_names;
}

void Flow::set_context_names(std::vector<std::string> names) {
  check_names("context_names", names, spec().context_size);
  const std::lock_guard<ForkSafeMutex> lock(state_->write_mutex);
  check_names_differ(state_->column_names, names);
  state_->context_names = std::move(names);
}

std::optional<Threshold> Flow::threshold() const {
  const std::lock_guard<ForkSafeMutex> lock(state_->write_mutex);
  return state_->known.threshold;
}

void Flow::set_threshold(std::optional<Threshold> threshold) {
  if (threshold) check_threshold(*threshold);
  const std::lock_guard<ForkSafeMutex> lock(state_->write_mutex);
  state_->known.threshold = threshold;
}

std::string Flow::import_report() const {
  const std::lock_guard<ForkSafeMutex> lock(state_->write_mutex);
  return state_->known.import_report;
}

void Flow::set_import_report(std::string text) {
  check_import_report(text);
  const std::lock_guard<ForkSafeMutex> lock(state_->write_mutex);
  state_->known.import_report = std::move(text);
}

void Flow::set_num_threads(int threads) {
  if (threads < 0 || threads > 4096)
    fail("num_threads is " + std::to_string(threads) + ", expected 0 (automatic) to 4096");
  state_->num_threads.store(threads);
}

void Flow::prepare(std::int64_t max_rows) const {
  if (device().kind != DeviceKind::cpu) {
    fail("the flow of prepare is on " + name_of(device()) + ", expected the CPU; Flow::to makes a copy there");
  }
  if (max_rows < 0) fail("max_rows is " + std::to_string(max_rows) + ", expected 0 or more");
  state_->backend->prepare();
  if (max_rows == 0) return state_->prepared_rows.store(0);
  std::int64_t before = state_->prepared_rows.load();
  while (before < max_rows && !state_->prepared_rows.compare_exchange_weak(before, max_rows)) {
  }
}

void Flow::reload(const std::string& path) {
  const LoadedModel model = load_model(path, &spec());
  std::string differs = difference("column", model.column_names, column_names());
  if (differs.empty()) differs = difference("context column", model.context_names, context_names());
  if (!differs.empty()) throw Error(ErrorCode::file_format, path + ": " + differs);
  state_->publish(model.parameters.data(), {model.threshold, model.import_report}, model.mean_low);
}

void Flow::swap(Flow& other) {
  const std::string differs = difference(other.spec(), spec(), "other");
  if (!differs.empty()) fail(differs);
  if (state_ == other.state_) return;
  State *a = state_.get(), *b = other.state_.get();
  if (std::less<>()(b, a)) std::swap(a, b);  // one order for all: two swaps at once must not wait for each other
  const std::lock_guard<ForkSafeMutex> first(a->write_mutex);
  const std::lock_guard<ForkSafeMutex> second(b->write_mutex);
  const std::vector<unsigned char> kept = a->parameters;
  const std::vector<float> kept_low = a->mean_low;
  a->publish_locked(b->parameters.data(), b->mean_low);
  try {
    b->publish_locked(kept.data(), kept_low);
  } catch (...) {
    a->publish_locked(kept.data(), kept_low);
    throw;
  }
  std::swap(a->known, b->known);
}

template <class T>
std::span<const T> Flow::parameters() const {
  state_->check_dtype<T>();
  const void* data = state_->parameters.data();
  return {static_cast<const T*>(data), static_cast<std::size_t>(state_->layout.size())};
}

template <class T>
void Flow::copy_parameters(std::span<T> out, std::vector<float>* mean_low) const {
  state_->check_dtype<T>();
  check_length(Named{"out", out}, state_->layout.size(), "the flat buffer of ParamLayout");
  const std::lock_guard<ForkSafeMutex> lock(state_->write_mutex);
  std::memcpy(out.data(), state_->parameters.data(), state_->parameters.size());
  if (mean_low != nullptr) *mean_low = state_->mean_low;
}

template <class T>
void Flow::set_parameters(std::span<const T> parameters, std::span<const float> mean_low) {
  state_->check_dtype<T>();
  check_length(Named{"parameters", parameters}, state_->layout.size(), "the flat buffer of ParamLayout");
  if (!mean_low.empty()) {
    if (!takes_float64_rows(spec())) {
      fail("mean_low is for float32 flows that begin with a standardize layer, expected none");
    }
    check_length(Named{"mean_low", mean_low}, spec().input_size, "one for each column");
  }
  state_->publish(parameters.data(), {}, mean_low);
}

std::vector<float> Flow::mean_low() const {
  const std::lock_guard<ForkSafeMutex> lock(state_->write_mutex);
  return state_->mean_low;
}

namespace {

template <class In, class Out, class T>
void check_transform(std::int64_t rows, const Named<std::span<const In>>& in, const Named<std::span<Out>>& out,
                     const Named<std::span<T>>& log_det, const Context& context) {
  check_length(out, static_cast<std::int64_t>(in.span.size()), "[B, D] as the input");
  if (!log_det.span.empty()) check_length(log_det, rows, "[B]");
  refuse_overlap(out, in);
  refuse_overlap(log_det, in);
  refuse_overlap(out, log_det);
  refuse_overlap(context, out, log_det);
}

}  // namespace

template <class T>
void Flow::forward(std::span<const T> x, std::span<T> z, std::span<T> log_det, const Context& context) const {
  const std::int64_t rows = state_->check_rows(Named{"x", x});
  check_transform(rows, Named{"x", x}, Named{"z", z}, Named{"log_det", log_det}, context);
  transform_unchecked(Direction::forward, x.data(), rows, z.data(), data_or_null(log_det),
                      state_->execution<T>(context, rows));
}

template <class T>
void Flow::inverse(std::span<const T> z, std::span<T> x, std::span<T> log_det, const Context& context) const {
  const std::int64_t rows = state_->check_rows(Named{"z", z});
  check_transform(rows, Named{"z", z}, Named{"x", x}, Named{"log_det", log_det}, context);
  transform_unchecked(Direction::inverse, z.data(), rows, x.data(), data_or_null(log_det),
                      state_->execution<T>(context, rows));
}

void Flow::forward(std::span<const double> x, std::span<float> z, std::span<float> log_det,
                   const Context& context) const {
  const std::int64_t rows = state_->check_wide(Named{"x", x});
  check_transform(rows, Named{"x", x}, Named{"z", z}, Named{"log_det", log_det}, context);
  transform_unchecked(Direction::forward, x.data(), rows, z.data(), data_or_null(log_det),
                      state_->execution<double>(context, rows));
}

void Flow::inverse(std::span<const float> z, std::span<double> x, std::span<float> log_det,
                   const Context& context) const {
  const std::int64_t rows = state_->check_wide(Named{"x", std::span<const double>(x)});
  check_transform(rows, Named{"z", z}, Named{"x", x}, Named{"log_det", log_det}, context);
  transform_unchecked(Direction::inverse, z.data(), rows, x.data(), data_or_null(log_det),
                      state_->execution<double>(context, rows));
}

namespace {

/// Elements of the arrays that a round trip needs beside its input.
constexpr std::int64_t kRoundTripElements = 1 << 18;

/// Whether no number of a row lies outside of the bounds or on an edge.
template <class T>
bool is_inside(const Bounds& bounds, const T* row) {
  for (std::size_t j = 0; j < bounds.low.size(); ++j) {
    const auto x = static_cast<double>(row[j]);
    if (!(x > bounds.low[j] && x < bounds.high[j])) return false;
  }
  return true;
}

/// Largest error of one row that came back as `back`; infinite where it did not come back finite.
template <class T>
double row_error(const T* x, const T* back, const std::vector<double>& centres, const std::vector<double>& scales) {
  double largest = 0;
  for (std::size_t j = 0; j < scales.size(); ++j) {
    const auto from = static_cast<double>(x[j]);
    const double size = std::abs(from - (centres.empty() ? 0.0 : centres[j]));
    const double error = std::abs(static_cast<double>(back[j]) - from) / (scales[j] + size);
    if (!std::isfinite(error)) return std::numeric_limits<double>::infinity();
    largest = std::max(largest, error);
  }
  return largest;
}

}  // namespace

template <class T>
double Flow::round_trip_error(std::span<const T> x, const Context& context) const {
  const FloatMode mode;
  const std::int64_t rows = state_->check_data(Named{"x", x}), features = spec().input_size;
  const bool wide = state_->is_wide<T>();
  const typename State::Columns columns = wide ? state_->columns<float>() : state_->columns<T>();
  const std::vector<double> centres = wide || spec().bounds() != nullptr ? columns.means : std::vector<double>();
  const std::int64_t chunk =
      std::clamp<std::int64_t>(kRoundTripElements / features, 1, std::max<std::int64_t>(1, rows));
  std::vector<T> back(static_cast<std::size_t>(chunk * features));
  std::vector<unsigned char> latents(back.size() * static_cast<std::size_t>(size_of(spec().dtype)));
  Execution how = state_->settled(state_->execution<T>(context, rows));
  double largest = 0;
  for (std::int64_t first = 0; first < rows; first += chunk) {
    const T* from = x.data() + first * features;
    const std::int64_t count = std::min(chunk, rows - first);
    if (how.context.repeat == 1) how.context.rows = state_->context_row(context, first);
    transform_unchecked(Direction::forward, from, count, latents.data(), nullptr, how);
    transform_unchecked(Direction::inverse, latents.data(), count, back.data(), nullptr, how);
    for (std::int64_t r = 0; r < count; ++r) {
      const T* row = from + r * features;
      if (!std::all_of(row, row + features, [](T v) { return std::isfinite(v); })) continue;
      if (spec().bounds() != nullptr && !is_inside(*spec().bounds(), row)) continue;
      largest = std::max(largest, row_error(row, back.data() + r * features, centres, columns.deviations));
    }
  }
  return largest;
}

template <class T>
void Flow::log_prob(std::span<const T> x, std::span<T> out, const Context& context, double temperature) const {
  const std::int64_t rows = state_->check_rows(Named{"x", x});
  check_length(Named{"out", out}, rows, "[B]");
  refuse_overlap(Named{"out", out}, Named{"x", x});
  refuse_overlap(context, Named{"out", out});
  if (temperature != 1) {
    return tempered_log_prob_unchecked(temperature, x.data(), rows, out.data(), state_->execution<T>(context, rows));
  }
  log_prob_unchecked(x.data(), rows, out.data(), state_->execution<T>(context, rows));
}

void Flow::log_prob(std::span<const double> x, std::span<float> out, const Context& context, double temperature) const {
  const std::int64_t rows = state_->check_wide(Named{"x", x});
  check_length(Named{"out", out}, rows, "[B]");
  refuse_overlap(Named{"out", out}, Named{"x", x});
  refuse_overlap(context, Named{"out", out});
  if (temperature != 1) {
    return tempered_log_prob_unchecked(temperature, x.data(), rows, out.data(),
                                       state_->execution<double>(context, rows));
  }
  log_prob_unchecked(x.data(), rows, out.data(), state_->execution<double>(context, rows));
}

template <class T>
void Flow::sample(std::uint64_t seed, std::span<T> x, std::uint64_t first_row, const Context& context,
                  double temperature) const {
  const std::int64_t rows = state_->check_data(Named{"x", std::span<const T>(x)});
  refuse_overlap(context, Named{"x", x});
  const Execution how = state_->execution<T>(context, rows, /*divides=*/true);
  if (temperature != 1) return tempered_sample_unchecked(temperature, seed, first_row, rows, x.data(), nullptr, how);
  sample_unchecked(seed, first_row, rows, x.data(), nullptr, how);
}

namespace {

template <class X, class T>
void check_sample(std::int64_t rows, const Named<std::span<X>>& x, const Named<std::span<T>>& log_prob,
                  const Context& context) {
  check_length(log_prob, rows, "[B]");
  refuse_overlap(x, log_prob);
  refuse_overlap(context, x, log_prob);
}

}  // namespace

template <class T>
void Flow::sample_and_log_prob(std::uint64_t seed, std::span<T> x, std::span<T> log_prob, std::uint64_t first_row,
                               const Context& context, double temperature) const {
  const std::int64_t rows = state_->check_rows(Named{"x", std::span<const T>(x)});
  check_sample(rows, Named{"x", x}, Named{"log_prob", log_prob}, context);
  const Execution how = state_->execution<T>(context, rows, /*divides=*/true);
  if (temperature != 1) {
    return tempered_sample_unchecked(temperature, seed, first_row, rows, x.data(), log_prob.data(), how);
  }
  sample_unchecked(seed, first_row, rows, x.data(), log_prob.data(), how);
}

void Flow::sample_and_log_prob(std::uint64_t seed, std::span<double> x, std::span<float> log_prob,
                               std::uint64_t first_row, const Context& context, double temperature) const {
  const std::int64_t rows = state_->check_wide(Named{"x", std::span<const double>(x)});
  check_sample(rows, Named{"x", x}, Named{"log_prob", log_prob}, context);
  const Execution how = state_->execution<double>(context, rows, /*divides=*/true);
  if (temperature != 1) {
    return tempered_sample_unchecked(temperature, seed, first_row, rows, x.data(), log_prob.data(), how);
  }
  sample_unchecked(seed, first_row, rows, x.data(), log_prob.data(), how);
}

namespace {

template <class X, class T>
void check_score(const Named<std::span<const X>>& x, const Named<std::span<T>>& out, const Context& context) {
  check_length(out, static_cast<std::int64_t>(x.span.size()), "[B, D]");
  refuse_overlap(out, x);
  refuse_overlap(context, out);
}

}  // namespace

template <class T>
void Flow::score(std::span<const T> x, std::span<T> out, const Context& context) const {
  const std::int64_t rows = state_->check_rows(Named{"x", x});
  check_score(Named{"x", x}, Named{"out", out}, context);
  log_prob_vjp_unchecked(x.data(), rows, nullptr, nullptr, out.data(), nullptr, false,
                         state_->execution<T>(context, rows));
}

void Flow::score(std::span<const double> x, std::span<float> out, const Context& context) const {
  const std::int64_t rows = state_->check_wide(Named{"x", x});
  check_score(Named{"x", x}, Named{"out", out}, context);
  log_prob_vjp_unchecked(x.data(), rows, nullptr, nullptr, out.data(), nullptr, false,
                         state_->execution<double>(context, rows));
}

template <class T>
double Flow::nll(std::span<const T> x, const Context& context) const {
  const std::int64_t rows = state_->check_data(Named{"x", x});
  return nll_unchecked(x.data(), rows, state_->execution<T>(context, rows));
}

template <class T>
double Flow::nll(std::span<const T> x, const SampleWeights& weights, const Context& context) const {
  const std::int64_t rows = state_->check_data(Named{"x", x});
  weights.check("sample_weight", rows);
  return nll_unchecked(x.data(), weights, state_->execution<T>(context, rows));
}

namespace {

template <class X, class T>
void check_gradient(std::int64_t parameters, const Named<std::span<const X>>& x, const Named<std::span<T>>& gradient,
                    const Context& context) {
  check_length(gradient, parameters, "the flat buffer of ParamLayout");
  refuse_overlap(gradient, x);
  refuse_overlap(context, gradient);
}

void check_weights_beside(const SampleWeights& weights, std::int64_t rows, auto&& gradient) {
  weights.check("sample_weight", rows);
  refuse_overlap(gradient, Named{"sample_weight", weights.values()});
}

}  // namespace

template <class T>
double Flow::nll_gradient(std::span<const T> x, std::span<T> gradient, const Context& context) const {
  const std::int64_t rows = state_->check_rows(Named{"x", x});
  check_gradient(num_parameters(), Named{"x", x}, Named{"gradient", gradient}, context);
  return nll_gradient_unchecked(x.data(), rows, gradient.data(), state_->execution<T>(context, rows));
}

double Flow::nll_gradient(std::span<const double> x, std::span<float> gradient, const Context& context) const {
  const std::int64_t rows = state_->check_wide(Named{"x", x});
  check_gradient(num_parameters(), Named{"x", x}, Named{"gradient", gradient}, context);
  return nll_gradient_unchecked(x.data(), rows, gradient.data(), state_->execution<double>(context, rows));
}

template <class T>
double Flow::nll_gradient(std::span<const T> x, std::span<T> gradient, const SampleWeights& weights,
                          const Context& context) const {
  const std::int64_t rows = state_->check_rows(Named{"x", x});
  check_gradient(num_parameters(), Named{"x", x}, Named{"gradient", gradient}, context);
  check_weights_beside(weights, rows, Named{"gradient", gradient});
  return nll_gradient_unchecked(x.data(), weights, gradient.data(), state_->execution<T>(context, rows));
}

double Flow::nll_gradient(std::span<const double> x, std::span<float> gradient, const SampleWeights& weights,
                          const Context& context) const {
  const std::int64_t rows = state_->check_wide(Named{"x", x});
  check_gradient(num_parameters(), Named{"x", x}, Named{"gradient", gradient}, context);
  check_weights_beside(weights, rows, Named{"gradient", gradient});
  return nll_gradient_unchecked(x.data(), weights, gradient.data(), state_->execution<double>(context, rows));
}

namespace {

template <class In, class T>
void check_vjp(std::int64_t rows, std::int64_t parameters, const Named<std::span<const In>>& in,
               const Named<std::span<const T>>& grad_out, const Named<std::span<const T>>& grad_log_det,
               const Named<std::span<T>>& grad_in, const Named<std::span<T>>& grad_parameters, const Context& context,
               const Named<std::span<T>>& grad_context) {
  const auto size = static_cast<std::int64_t>(in.span.size());
  if (!grad_out.span.empty()) check_length(grad_out, size, "[B, D]");
  if (!grad_log_det.span.empty()) check_length(grad_log_det, rows, "[B]");
  if (!grad_in.span.empty()) check_length(grad_in, size, "[B, D]");
  if (!grad_parameters.span.empty()) check_length(grad_parameters, parameters, "the flat buffer of ParamLayout");
  for (const auto& out : {grad_in, grad_parameters, grad_context}) {
    refuse_overlap(out, in);
    refuse_overlap(out, grad_out);
    refuse_overlap(out, grad_log_det);
    refuse_overlap(context, out);
  }
  refuse_overlap(grad_in, grad_parameters);
  refuse_overlap(grad_context, grad_in);
  refuse_overlap(grad_context, grad_parameters);
}

template <class T>
T* checked_context_gradient(const Named<std::span<T>>& wanted, const Context& context) {
  if (!wanted.span.empty()) check_length(wanted, context.size(), "as context");
  return data_or_null(wanted.span);
}

}  // namespace

template <class T>
void Flow::vjp(Direction direction, std::span<const T> in, std::span<const T> grad_out, std::span<const T> grad_log_det,
               std::span<T> grad_in, std::span<T> grad_parameters, bool accumulate, const Context& context,
               std::span<T> grad_context) const {
  const std::int64_t rows = state_->check_rows(Named{"in", in});
  check_vjp(rows, num_parameters(), Named{"in", in}, Named{"grad_out", grad_out}, Named{"grad_log_det", grad_log_det},
            Named{"grad_in", grad_in}, Named{"grad_parameters", grad_parameters}, context,
            Named{"grad_context", grad_context});
  Execution how = state_->execution<T>(context, rows);
  how.context.gradient = checked_context_gradient(Named{"grad_context", grad_context}, context);
  vjp_unchecked(direction, in.data(), rows, data_or_null(grad_out), data_or_null(grad_log_det), data_or_null(grad_in),
                data_or_null(grad_parameters), accumulate, how);
}

void Flow::vjp(std::span<const double> x, std::span<const float> grad_out, std::span<const float> grad_log_det,
               std::span<float> grad_x, std::span<float> grad_parameters, bool accumulate, const Context& context,
               std::span<float> grad_context) const {
  const std::int64_t rows = state_->check_wide(Named{"x", x});
  check_vjp(rows, num_parameters(), Named{"x", x}, Named{"grad_out", grad_out}, Named{"grad_log_det", grad_log_det},
            Named{"grad_x", grad_x}, Named{"grad_parameters", grad_parameters}, context,
            Named{"grad_context", grad_context});
  Execution how = state_->execution<double>(context, rows);
  how.context.gradient = checked_context_gradient(Named{"grad_context", grad_context}, context);
  vjp_unchecked(Direction::forward, x.data(), rows, data_or_null(grad_out), data_or_null(grad_log_det),
                data_or_null(grad_x), data_or_null(grad_parameters), accumulate, how);
}

template <class T>
ConditionedFlow Flow::condition(std::span<const T> context) const {
  state_->check_dtype<T>();
  if (spec().context_size == 0) fail("the flow of condition has context_size 0, expected one with a context");
  check_length(Named{"context", context}, spec().context_size, "[C]");
  const auto row = std::make_shared<const std::vector<T>>(context.begin(), context.end());
  Context bound(*row);
  std::shared_ptr<const void> folded = state_->backend->fold(row->data());
  bound.folded_ = folded.get();
  return {*this, row, std::move(folded), bound};
}

template <class T>
void Flow::conditioner(std::int64_t layer, std::span<const T> in, std::span<T> s, std::span<T> t,
                       const Context& context) const {
  const Named input{"in", in};
  const std::int64_t rows = state_->check_rows(input);
  const auto layers = static_cast<std::int64_t>(spec().layers.size());
  if (layer < 0 || layer >= layers) {
    fail("layer is " + std::to_string(layer) + ", expected 0 to " + std::to_string(layers - 1));
  }
  const auto* which = std::get_if<Coupling>(&spec().layers[static_cast<std::size_t>(layer)]);
  if (which == nullptr || !layers::has_scale_and_shift(which->transform)) {
    fail("layer is " + std::to_string(layer) + ", expected that of an affine or additive coupling");
  }
  const Named out_s{"s", s}, out_t{"t", t};
  const std::int64_t size = rows * which->transformed.count(spec().input_size);
  check_length(out_s, size, "[B, |b|]");
  check_length(out_t, size, "[B, |b|]");
  refuse_overlap(out_s, input);
  refuse_overlap(out_t, input);
  refuse_overlap(out_s, out_t);
  refuse_overlap(context, out_s, out_t);
  const auto first = spec().layers.begin();
  const auto has_kernel = [](const LayerSpec& before) { return layers::facts_of(before).has_kernel; };
  const auto kernel = std::count_if(first, first + layer, has_kernel);  // the backend counts those
  conditioner_unchecked(kernel, in.data(), rows, s.data(), t.data(), state_->execution<T>(context, rows));
}

// ---- the core: what the calls above, the bindings and XLA's handlers share ------------------------------------------

void Flow::transform_unchecked(Direction direction, const void* in, std::int64_t rows, void* out, void* log_det,
                               const Execution& how) const {
  state_->backend->transform(direction, in, rows, out, log_det, state_->settled(how, rows));
}

void Flow::log_prob_unchecked(const void* x, std::int64_t rows, void* out, const Execution& how) const {
  state_->backend->log_prob(x, rows, out, state_->settled(how, rows));
}

void Flow::sample_unchecked(std::uint64_t seed, std::uint64_t first_row, std::int64_t rows, void* x, void* log_prob,
                            const Execution& how) const {
  state_->backend->sample(seed, first_row, rows, x, log_prob, state_->settled(how, rows));
}

void Flow::noise_unchecked(std::uint64_t seed, std::uint64_t first_row, std::int64_t rows, void* z,
                           const Execution& how) const {
  Execution settled = how;  // without a context
  if (settled.threads == 0) settled.threads = state_->threads();
  state_->backend->noise(seed, first_row, rows, z, settled);
}

namespace {

/// What all rows count for.
BatchPart part_of(const SampleWeights& weights) {
  BatchPart part;
  part.rows = static_cast<std::int64_t>(weights.values().size());
  part.weights = weights.values();
  return part;
}

BatchPart part_of(std::int64_t rows) {
  BatchPart part;
  part.rows = rows;
  return part;
}

/// A mean loss, or the share of a part of a batch in it, whose sum over the rows that it is of a backend gives.
class Mean {
 public:
  explicit Mean(const BatchPart& part) {
    const bool as_they_are = part.index != nullptr || part.total > 0;
    if (!as_they_are) rescaled_ = rescaled(part.weights);
    const std::span<const double> weights = rescaled_.empty() ? part.weights : std::span<const double>(rescaled_);
    rows_ = {.count = part.rows, .index = part.index, .weights = weights.empty() ? nullptr : weights.data()};
    if (part.rows == 0 && part.total == 0) {
      fail("x has no rows, expected at least one: the mean over an empty batch is not defined");
    }
    total_ = part.total > 0 ? part.total : total_weight();
    leave_out_zeros();
  }

  Mean(const Mean&) = delete;
  Mean& operator=(const Mean&) = delete;

  const WeighedRows& rows() const { return rows_; }
  double total() const { return total_; }
  double loss(double sum_log_prob) const { return rows_.count == 0 ? 0 : -sum_log_prob / total_; }

 private:
  /// In order.
  double total_weight() const {
    if (rows_.weights == nullptr) return static_cast<double>(rows_.count);
    double total = 0;
    for (std::int64_t i = 0; i < rows_.count; ++i) total += rows_.weight(i);
    return total;
  }

  /// Rows of weight 0 are not looked at.
  void leave_out_zeros() {
    std::int64_t zeros = 0;
    for (std::int64_t i = 0; rows_.weights != nullptr && i < rows_.count; ++i) zeros += rows_.weight(i) == 0 ? 1 : 0;
    if (zeros == 0) return;
    counting_.reserve(static_cast<std::size_t>(rows_.count - zeros));
    for (std::int64_t i = 0; i < rows_.count; ++i) {
      if (rows_.weight(i) > 0) counting_.push_back(rows_.index == nullptr ? i : rows_.index[i]);
    }
    rows_.count -= zeros;
    rows_.index = counting_.data();
  }

  std::vector<double> rescaled_;
  std::vector<std::int64_t> counting_;
  WeighedRows rows_;
  double total_ = 0;
};

}  // namespace

double Flow::nll_unchecked(const void* x, std::int64_t rows, const Execution& how) const {
  const FloatMode mode;
  const Mean mean(part_of(rows));
  return mean.loss(state_->backend->sum_log_prob(x, mean.rows(), state_->settled(how, rows)));
}

double Flow::nll_unchecked(const void* x, const SampleWeights& weights, const Execution& how) const {
  const FloatMode mode;
  const Mean mean(part_of(weights));
  return mean.loss(state_->backend->sum_log_prob(x, mean.rows(), state_->settled(how, mean.rows().count)));
}

double Flow::nll_gradient_unchecked(const void* x, std::int64_t rows, void* gradient, const Execution& how) const {
  return nll_gradient_unchecked(x, part_of(rows), gradient, how);
}

double Flow::nll_gradient_unchecked(const void* x, const SampleWeights& weights, void* gradient,
                                    const Execution& how) const {
  return nll_gradient_unchecked(x, part_of(weights), gradient, how);
}

double Flow::nll_gradient_unchecked(const void* x, const BatchPart& part, void* gradient, const Execution& how) const {
  const FloatMode mode;
  const Mean mean(part);
  return mean.loss(
      state_->backend->nll_gradient(x, mean.rows(), mean.total(), gradient, part.accumulate, state_->settled(how)));
}

void Flow::vjp_unchecked(Direction direction, const void* in, std::int64_t rows, const void* grad_out,
                         const void* grad_log_det, void* grad_in, void* grad_parameters, bool accumulate,
                         const Execution& how) const {
  state_->with_context_gradient(how, rows, [&](const Execution& settled) {
    state_->backend->vjp(direction, in, rows, grad_out, grad_log_det, grad_in, grad_parameters, accumulate, settled);
  });
}

void Flow::log_prob_vjp_unchecked(const void* x, std::int64_t rows, const void* grad_log_prob, void* log_prob,
                                  void* grad_x, void* grad_parameters, bool accumulate, const Execution& how) const {
  state_->with_context_gradient(how, rows, [&](const Execution& settled) {
    state_->backend->log_prob_vjp(x, rows, grad_log_prob, log_prob, grad_x, grad_parameters, accumulate, settled);
  });
}

void Flow::conditioner_unchecked(std::int64_t layer, const void* in, std::int64_t rows, void* s, void* t,
                                 const Execution& how) const {
  state_->backend->conditioner(layer, in, rows, s, t, state_->settled(how));
}

Flow Flow::of_tensors(FlowSpec spec, std::span<const void* const> tensors) {
  Flow flow(std::make_unique<State>(std::move(spec), Device{}, Precision::float32, Weights::full));
  flow.set_tensors_unchecked(tensors);
  return flow;
}

void Flow::set_tensors_unchecked(std::span<const void* const> tensors) {
  const std::lock_guard<ForkSafeMutex> lock(state_->write_mutex);
  unsigned char* flat = state_->parameters.data();
  const std::int64_t size = size_of(spec().dtype);
  const std::vector<TensorInfo>& layout = state_->layout.tensors();
  for (std::size_t i = 0; i < layout.size(); ++i) state_->check_sign(layout[i], tensors[i]);
  for (std::size_t i = 0; i < layout.size(); ++i) {
    std::memcpy(flat + layout[i].offset * size, tensors[i], static_cast<std::size_t>(layout[i].size * size));
  }
  state_->publish_locked(flat, {});
  state_->known = {};
}

const Backend& FlowAccess::backend(const Flow& flow) { return *flow.state_->backend; }
int FlowAccess::threads(const Flow& flow) { return flow.state_->threads(); }

#define NVPFLOW_INSTANTIATE(T)                                                                                      \
  template std::span<const T> Flow::parameters() const;                                                             \
  template void Flow::copy_parameters(std::span<T>, std::vector<float>*) const;                                     \
  template void Flow::set_parameters(std::span<const T>, std::span<const float>);                                   \
  template void Flow::forward(std::span<const T>, std::span<T>, std::span<T>, const Context&) const;                \
  template void Flow::inverse(std::span<const T>, std::span<T>, std::span<T>, const Context&) const;                \
  template double Flow::round_trip_error(std::span<const T>, const Context&) const;                                 \
  template void Flow::log_prob(std::span<const T>, std::span<T>, const Context&, double) const;                     \
  template void Flow::sample(std::uint64_t, std::span<T>, std::uint64_t, const Context&, double) const;             \
  template void Flow::sample_and_log_prob(std::uint64_t, std::span<T>, std::span<T>, std::uint64_t, const Context&, \
                                          double) const;                                                            \
  template void Flow::score(std::span<const T>, std::span<T>, const Context&) const;                                \
  template double Flow::nll(std::span<const T>, const Context&) const;                                              \
  template double Flow::nll(std::span<const T>, const SampleWeights&, const Context&) const;                        \
  template double Flow::nll_gradient(std::span<const T>, std::span<T>, const Context&) const;                       \
  template double Flow::nll_gradient(std::span<const T>, std::span<T>, const SampleWeights&, const Context&) const; \
  template void Flow::vjp(Direction, std::span<const T>, std::span<const T>, std::span<const T>, std::span<T>,      \
                          std::span<T>, bool, const Context&, std::span<T>) const;                                  \
  template ConditionedFlow Flow::condition(std::span<const T>) const;                                               \
  template void Flow::conditioner(std::int64_t, std::span<const T>, std::span<T>, std::span<T>, const Context&) const;
NVPFLOW_INSTANTIATE(float)
NVPFLOW_INSTANTIATE(double)
#undef NVPFLOW_INSTANTIATE

}  // namespace nvpflow
