// The C interface: pointers to spans, exceptions to statuses.

#include <nvpflow.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include <nvpflow/device.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/execution.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/spec.hpp>
#include <nvpflow/spec_json.hpp>

/// What a handle points at: a flow, or a view that nvpflow_condition_...() or nvpflow_temper() made of it, which keeps
/// it alive.
struct nvpflow_flow {
  std::shared_ptr<nvpflow::Flow> flow;
  std::optional<nvpflow::ConditionedFlow> conditioned = std::nullopt;
  double temperature = 1;
};

namespace nvpflow {
namespace {

/// Of the calling thread's last failure. Fixed memory: reporting an error must not fail.
struct LastError {
  char message[1024];
  int system_error;
};
thread_local constinit LastError last_error = {};

nvpflow_status failed(nvpflow_status status, const char* message, int system_error = 0) noexcept {
  const std::size_t length = std::min(std::strlen(message), sizeof last_error.message - 1);
  std::memcpy(last_error.message, message, length);
  last_error.message[length] = '\0';
  last_error.system_error = system_error;
  return status;
}

nvpflow_status status_of(ErrorCode code) {
  switch (code) {
    case ErrorCode::invalid_argument:
      return NVPFLOW_INVALID_ARGUMENT;
    case ErrorCode::type_mismatch:
      return NVPFLOW_TYPE_MISMATCH;
    case ErrorCode::out_of_memory:
      return NVPFLOW_OUT_OF_MEMORY;
    case ErrorCode::io:
      return NVPFLOW_IO;
    case ErrorCode::file_format:
      return NVPFLOW_FILE_FORMAT;
    case ErrorCode::unavailable:
      return NVPFLOW_UNAVAILABLE;
    case ErrorCode::device:
      return NVPFLOW_DEVICE;
    case ErrorCode::not_finite:  // of training, which is not here
    case ErrorCode::none_kept:
      break;
  }
  return NVPFLOW_INTERNAL;
}

/// Runs f; what it throws becomes a status.
template <class F>
nvpflow_status guarded(F&& f) noexcept {
  try {
    f();
    return NVPFLOW_OK;
  } catch (const Error& error) {
    return failed(status_of(error.code()), error.what(), error.system_error());
  } catch (const std::bad_alloc&) {
    return failed(NVPFLOW_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return failed(NVPFLOW_INTERNAL, error.what());
  } catch (...) {
    return failed(NVPFLOW_INTERNAL, "an exception that is not a std::exception");
  }
}

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

template <class P>
P* required(P* pointer, const char* name) {
  if (pointer == nullptr) refuse(std::string(name) + " is NULL");
  return pointer;
}

const Flow& flow_of(const nvpflow_flow* handle) { return *required(handle, "flow")->flow; }

void refuse_temperature(const nvpflow_flow& handle, const char* name) {
  if (handle.temperature == 1) return;
  std::ostringstream text;
  text << name << " has temperature " << handle.temperature << ", expected the flow that it was made of";
  refuse(text.str());
}

/// The flow of a call that takes no temperature.
const Flow& untempered(const nvpflow_flow* handle) {
  refuse_temperature(*required(handle, "flow"), "flow");
  return *handle->flow;
}

/// The flow of a call that changes it.
Flow& changed(nvpflow_flow* handle, const char* name) {
  if (required(handle, name)->conditioned) {
    refuse(std::string(name) + " is conditioned, expected the flow that it was made of");
  }
  refuse_temperature(*handle, name);
  return *handle->flow;
}

std::int64_t context_size(const nvpflow_flow& handle) {
  return handle.conditioned ? 0 : handle.flow->spec().context_size;
}

/// [rows, columns] at `data`, which may be NULL where it has no elements. count: what the caller calls `rows`.
template <class T>
std::span<T> array(T* data, const char* name, std::int64_t rows, std::int64_t columns, const char* count = "rows") {
  if (rows < 0 || rows > std::numeric_limits<std::int64_t>::max() / columns / static_cast<std::int64_t>(sizeof(T))) {
    refuse(std::string(count) + " is " + std::to_string(rows) +
           ", expected 0 or more, and fewer than can be addressed");
  }
  return {rows == 0 ? data : required(data, name), static_cast<std::size_t>(rows * columns)};
}

template <class T>
std::span<T> wanted(T* data, std::int64_t rows) {
  return data == nullptr ? std::span<T>() : array(data, "log_det", rows, 1);
}

template <class T>
constexpr DType kDType = sizeof(T) == 4 ? DType::float32 : DType::float64;

/// The context that a call was given: that of a function with _context in its name, or none.
template <class T>
struct Given {
  bool is_given = false;
  const T* data = nullptr;
  std::int64_t rows = 0;

  Given() = default;
  Given(const T* context, std::int64_t context_rows) : is_given(true), data(context), rows(context_rows) {}
};

/// X: of rows of data; T: of all other arrays.
template <class X, class T>
constexpr const char* suffix_of() {
  if (sizeof(X) > sizeof(T)) return "_rows64";
  return sizeof(T) == 4 ? "_f32" : "_f64";
}

[[noreturn]] void refuse_context(const nvpflow_flow& handle, const std::string& advice) {
  refuse((handle.conditioned ? "the flow is conditioned" : "the flow has context_size 0") +
         std::string(", expected one that takes a context") + advice);
}

/// The context of a call of so many rows of the function `name`, checked but for its dtype. divides: context_rows may
/// be a number that divides rows.
template <class X, class T>
Context context_of(const nvpflow_flow& handle, const char* name, std::int64_t rows, const Given<T>& given,
                   bool divides = false) {
  const std::int64_t size = context_size(handle);
  if (!given.is_given) {
    if (handle.conditioned) return handle.conditioned->context();
    if (size > 0 && handle.flow->spec().dtype == kDType<T>) {
      refuse("context is missing, expected [context_rows, " + std::to_string(size) + "]; call " + name + "_context" +
             suffix_of<X, T>() + ", or give a flow that nvpflow_condition" + suffix_of<T, T>() + " has made");
    }
    return {};
  }
  if (size == 0) refuse_context(handle, std::string("; call ") + name + suffix_of<X, T>());
  if (given.rows != 1 && given.rows != rows && !(divides && given.rows > 0 && rows % given.rows == 0)) {
    refuse("context_rows is " + std::to_string(given.rows) + ", expected 1 or rows, " + std::to_string(rows) +
           (divides ? ", or a number that divides it" : ""));
  }
  return std::span<const T>(array(given.data, "context", given.rows, size, "context_rows"));
}

template <class T>
nvpflow_status condition(const nvpflow_flow* handle, const T* context, nvpflow_flow** conditioned) {
  return guarded([&] {
    *required(conditioned, "conditioned") = nullptr;
    const std::int64_t size = context_size(*required(handle, "flow"));
    if (size == 0) refuse_context(*handle, "");
    const std::span<const T> row = array(context, "context", 1, size);
    *conditioned = new nvpflow_flow{handle->flow, handle->flow->condition<T>(row), handle->temperature};
  });
}

nvpflow_status temper(const nvpflow_flow* handle, double temperature, nvpflow_flow** tempered) {
  return guarded([&] {
    *required(tempered, "tempered") = nullptr;
    untempered(handle).tempered_log_prob_unchecked(temperature, nullptr, 0, nullptr);  // of no rows: the check
    *tempered = new nvpflow_flow{handle->flow, handle->conditioned, temperature};
  });
}

template <class T>
nvpflow_status initialize_from(nvpflow_flow* handle, const T* x, std::int64_t rows, const Given<T>& given = {}) {
  return guarded([&] {
    Flow& flow = changed(handle, "flow");
    const Context context = context_of<T, T>(*handle, "nvpflow_initialize_from", rows, given);
    flow.initialize_from<T>(array(x, "x", rows, flow.spec().input_size), Statistics::automatic, context);
  });
}

/// X: T, or double where T is float.
template <class X, class T>
nvpflow_status log_prob(const nvpflow_flow* handle, const X* x, std::int64_t rows, T* out, const Given<T>& given = {}) {
  return guarded([&] {
    const Flow& flow = flow_of(handle);
    flow.log_prob(array(x, "x", rows, flow.spec().input_size), array(out, "log_prob", rows, 1),
                  context_of<X, T>(*handle, "nvpflow_log_prob", rows, given), handle->temperature);
  });
}

template <class X, class T>
nvpflow_status score(const nvpflow_flow* handle, const X* x, std::int64_t rows, T* out, const Given<T>& given = {}) {
  return guarded([&] {
    const Flow& flow = untempered(handle);
    const std::int64_t columns = flow.spec().input_size;
    flow.score(array(x, "x", rows, columns), array(out, "score", rows, columns),
               context_of<X, T>(*handle, "nvpflow_score", rows, given));
  });
}

template <class X, class T>
nvpflow_status forward(const nvpflow_flow* handle, const X* x, std::int64_t rows, T* z, T* log_det,
                       const Given<T>& given = {}) {
  return guarded([&] {
    const Flow& flow = flow_of(handle);
    const std::int64_t columns = flow.spec().input_size;
    flow.forward(array(x, "x", rows, columns), array(z, "z", rows, columns), wanted(log_det, rows),
                 context_of<X, T>(*handle, "nvpflow_forward", rows, given));
  });
}

template <class X, class T>
nvpflow_status inverse(const nvpflow_flow* handle, const T* z, std::int64_t rows, X* x, T* log_det,
                       const Given<T>& given = {}) {
  return guarded([&] {
    const Flow& flow = flow_of(handle);
    const std::int64_t columns = flow.spec().input_size;
    flow.inverse(array(z, "z", rows, columns), array(x, "x", rows, columns), wanted(log_det, rows),
                 context_of<X, T>(*handle, "nvpflow_inverse", rows, given));
  });
}

template <class T, class X>
nvpflow_status sample(const nvpflow_flow* handle, std::uint64_t seed, std::uint64_t first_row, std::int64_t rows, X* x,
                      const Given<T>& given = {}) {
  return guarded([&] {
    const Flow& flow = flow_of(handle);
    if (sizeof(X) > sizeof(T) && !takes_float64_rows(flow.spec())) {
      throw Error(ErrorCode::type_mismatch,
                  "the flow gives no float64 rows beside float32, expected a float32 flow that begins with a "
                  "standardize layer");
    }
    flow.sample<X>(seed, array(x, "x", rows, flow.spec().input_size), first_row,
                   context_of<X, T>(*handle, "nvpflow_sample", rows, given, true), handle->temperature);
  });
}

template <class T, class X>
nvpflow_status sample_and_log_prob(const nvpflow_flow* handle, std::uint64_t seed, std::uint64_t first_row,
                                   std::int64_t rows, X* x, T* log_prob, const Given<T>& given = {}) {
  return guarded([&] {
    const Flow& flow = flow_of(handle);
    flow.sample_and_log_prob(seed, array(x, "x", rows, flow.spec().input_size), array(log_prob, "log_prob", rows, 1),
                             first_row, context_of<X, T>(*handle, "nvpflow_sample_and_log_prob", rows, given, true),
                             handle->temperature);
  });
}

/// weights: of the rows; none for the functions without them.
template <class T>
nvpflow_status nll_gradient(const nvpflow_flow* handle, const T* x, std::int64_t rows,
                            std::optional<const double*> weights, double* nll, T* gradient,
                            const Given<T>& given = {}) {
  return guarded([&] {
    const Flow& flow = untempered(handle);
    const std::span<const T> in = array(x, "x", rows, flow.spec().input_size);
    const std::span<T> out = array(gradient, "gradient", 1, flow.num_parameters());
    const char* name = weights ? "nvpflow_nll_gradient_weighted" : "nvpflow_nll_gradient";
    const Context context = context_of<T, T>(*handle, name, rows, given);
    *required(nll, "nll") =
        weights ? flow.nll_gradient<T>(in, out, SampleWeights(array(*weights, "sample_weight", rows, 1)), context)
                : flow.nll_gradient<T>(in, out, context);
  });
}

/// Writes a text with its zero, as nvpflow_spec_json() says.
void write_text(const std::string& from, char* text, size_t capacity, size_t* needed) {
  const std::size_t bytes = from.size() + 1;
  if (needed != nullptr) *needed = bytes;
  if (capacity == 0) return;
  if (capacity < bytes) {
    refuse("capacity is " + std::to_string(capacity) + ", expected " + std::to_string(bytes) + " or more");
  }
  std::memcpy(required(text, "text"), from.c_str(), bytes);
}

/// One of so many names, or "" where there are none.
std::string name_of_column(int64_t column, int64_t columns, const std::vector<std::string>& names) {
  if (column < 0 || column >= columns) {
    refuse("column is " + std::to_string(column) + ", expected 0 to " + std::to_string(columns - 1));
  }
  return names.empty() ? "" : names[static_cast<std::size_t>(column)];
}

}  // namespace
}  // namespace nvpflow

extern "C" {

const char* nvpflow_version(void) { return nvpflow::version(); }
const char* nvpflow_last_error(void) { return nvpflow::last_error.message; }
int nvpflow_system_error(void) { return nvpflow::last_error.system_error; }

nvpflow_status nvpflow_load(const char* path, nvpflow_flow** flow) {
  return nvpflow_load_on(path, nullptr, nullptr, nullptr, flow);
}

nvpflow_status nvpflow_load_on(const char* path, const char* device, const char* precision, const char* weights,
                               nvpflow_flow** flow) {
  using namespace nvpflow;
  return guarded([&] {
    *required(flow, "flow") = nullptr;
    const Device on = device == nullptr ? Device{} : parse_device(device);
    const Precision rounding = precision == nullptr ? Precision::float32 : parse_precision(precision);
    const Weights storage = weights == nullptr ? Weights::full : parse_weights(weights);
    *flow = new nvpflow_flow{std::make_shared<Flow>(Flow::load(required(path, "path"), on, rounding, storage))};
  });
}

void nvpflow_free(nvpflow_flow* flow) { delete flow; }

int64_t nvpflow_input_size(const nvpflow_flow* flow) { return flow == nullptr ? -1 : flow->flow->spec().input_size; }
nvpflow_dtype nvpflow_dtype_of(const nvpflow_flow* flow) {
  if (flow == nullptr) return -1;
  return flow->flow->spec().dtype == nvpflow::DType::float32 ? NVPFLOW_FLOAT32 : NVPFLOW_FLOAT64;
}
int64_t nvpflow_num_layers(const nvpflow_flow* flow) {
  return flow == nullptr ? -1 : static_cast<int64_t>(flow->flow->spec().layers.size());
}
int64_t nvpflow_num_couplings(const nvpflow_flow* flow) {
  return flow == nullptr ? -1 : flow->flow->spec().num_couplings();
}
int nvpflow_takes_float64_rows(const nvpflow_flow* flow) {
  if (flow == nullptr) return -1;
  return nvpflow::takes_float64_rows(flow->flow->spec()) ? 1 : 0;
}
int64_t nvpflow_context_size(const nvpflow_flow* flow) { return flow == nullptr ? -1 : nvpflow::context_size(*flow); }
int64_t nvpflow_num_parameters(const nvpflow_flow* flow) { return flow == nullptr ? -1 : flow->flow->num_parameters(); }

nvpflow_status nvpflow_spec_json(const nvpflow_flow* flow, char* text, size_t capacity, size_t* needed) {
  using namespace nvpflow;
  return guarded([&] { write_text(to_json(flow_of(flow).spec()), text, capacity, needed); });
}

nvpflow_status nvpflow_column_name(const nvpflow_flow* flow, int64_t column, char* text, size_t capacity,
                                   size_t* needed) {
  using namespace nvpflow;
  return guarded([&] {
    const Flow& named = flow_of(flow);
    write_text(name_of_column(column, named.spec().input_size, named.column_names()), text, capacity, needed);
  });
}

nvpflow_status nvpflow_context_name(const nvpflow_flow* flow, int64_t column, char* text, size_t capacity,
                                    size_t* needed) {
  using namespace nvpflow;
  return guarded([&] {
    const Flow& named = flow_of(flow);
    if (named.spec().context_size == 0) refuse("the flow has no context, whose numbers could have names");
    write_text(name_of_column(column, named.spec().context_size, named.context_names()), text, capacity, needed);
  });
}

nvpflow_status nvpflow_threshold(const nvpflow_flow* flow, double* log_prob, double* quantile) {
  using namespace nvpflow;
  return guarded([&] {
    constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
    const Threshold threshold = flow_of(flow).threshold().value_or(Threshold{kNone, kNone});
    *required(log_prob, "log_prob") = threshold.log_prob;
    if (quantile != nullptr) *quantile = threshold.quantile;
  });
}

nvpflow_status nvpflow_set_num_threads(nvpflow_flow* flow, int threads) {
  using namespace nvpflow;
  return guarded([&] { changed(flow, "flow").set_num_threads(threads); });
}

nvpflow_status nvpflow_prepare(const nvpflow_flow* flow, int64_t max_rows) {
  using namespace nvpflow;
  return guarded([&] { flow_of(flow).prepare(max_rows); });
}

nvpflow_status nvpflow_reload(nvpflow_flow* flow, const char* path) {
  using namespace nvpflow;
  return guarded([&] { changed(flow, "flow").reload(required(path, "path")); });
}

nvpflow_status nvpflow_swap(nvpflow_flow* a, nvpflow_flow* b) {
  using namespace nvpflow;
  return guarded([&] { changed(a, "a").swap(changed(b, "b")); });
}

nvpflow_status nvpflow_condition_f32(const nvpflow_flow* flow, const float* context, nvpflow_flow** conditioned) {
  return nvpflow::condition(flow, context, conditioned);
}
nvpflow_status nvpflow_condition_f64(const nvpflow_flow* flow, const double* context, nvpflow_flow** conditioned) {
  return nvpflow::condition(flow, context, conditioned);
}
nvpflow_status nvpflow_temper(const nvpflow_flow* flow, double temperature, nvpflow_flow** tempered) {
  return nvpflow::temper(flow, temperature, tempered);
}
nvpflow_status nvpflow_initialize_from_f32(nvpflow_flow* flow, const float* x, int64_t rows) {
  return nvpflow::initialize_from(flow, x, rows);
}
nvpflow_status nvpflow_initialize_from_f64(nvpflow_flow* flow, const double* x, int64_t rows) {
  return nvpflow::initialize_from(flow, x, rows);
}
nvpflow_status nvpflow_initialize_from_context_f32(nvpflow_flow* flow, const float* x, int64_t rows,
                                                   const float* context) {
  return nvpflow::initialize_from<float>(flow, x, rows, {context, rows});
}
nvpflow_status nvpflow_initialize_from_context_f64(nvpflow_flow* flow, const double* x, int64_t rows,
                                                   const double* context) {
  return nvpflow::initialize_from<double>(flow, x, rows, {context, rows});
}
nvpflow_status nvpflow_log_prob_f32(const nvpflow_flow* flow, const float* x, int64_t rows, float* log_prob) {
  return nvpflow::log_prob(flow, x, rows, log_prob);
}
nvpflow_status nvpflow_log_prob_context_f32(const nvpflow_flow* flow, const float* x, int64_t rows,
                                            const float* context, int64_t context_rows, float* log_prob) {
  return nvpflow::log_prob(flow, x, rows, log_prob, {context, context_rows});
}
nvpflow_status nvpflow_log_prob_f64(const nvpflow_flow* flow, const double* x, int64_t rows, double* log_prob) {
  return nvpflow::log_prob(flow, x, rows, log_prob);
}
nvpflow_status nvpflow_log_prob_context_f64(const nvpflow_flow* flow, const double* x, int64_t rows,
                                            const double* context, int64_t context_rows, double* log_prob) {
  return nvpflow::log_prob(flow, x, rows, log_prob, {context, context_rows});
}
nvpflow_status nvpflow_log_prob_rows64(const nvpflow_flow* flow, const double* x, int64_t rows, float* log_prob) {
  return nvpflow::log_prob(flow, x, rows, log_prob);
}
nvpflow_status nvpflow_log_prob_context_rows64(const nvpflow_flow* flow, const double* x, int64_t rows,
                                               const float* context, int64_t context_rows, float* log_prob) {
  return nvpflow::log_prob(flow, x, rows, log_prob, {context, context_rows});
}
nvpflow_status nvpflow_forward_f32(const nvpflow_flow* flow, const float* x, int64_t rows, float* z, float* log_det) {
  return nvpflow::forward(flow, x, rows, z, log_det);
}
nvpflow_status nvpflow_forward_context_f32(const nvpflow_flow* flow, const float* x, int64_t rows, const float* context,
                                           int64_t context_rows, float* z, float* log_det) {
  return nvpflow::forward(flow, x, rows, z, log_det, {context, context_rows});
}
nvpflow_status nvpflow_forward_f64(const nvpflow_flow* flow, const double* x, int64_t rows, double* z,
                                   double* log_det) {
  return nvpflow::forward(flow, x, rows, z, log_det);
}
nvpflow_status nvpflow_forward_context_f64(const nvpflow_flow* flow, const double* x, int64_t rows,
                                           const double* context, int64_t context_rows, double* z, double* log_det) {
  return nvpflow::forward(flow, x, rows, z, log_det, {context, context_rows});
}
nvpflow_status nvpflow_forward_rows64(const nvpflow_flow* flow, const double* x, int64_t rows, float* z,
                                      float* log_det) {
  return nvpflow::forward(flow, x, rows, z, log_det);
}
nvpflow_status nvpflow_forward_context_rows64(const nvpflow_flow* flow, const double* x, int64_t rows,
                                              const float* context, int64_t context_rows, float* z, float* log_det) {
  return nvpflow::forward(flow, x, rows, z, log_det, {context, context_rows});
}
nvpflow_status nvpflow_inverse_f32(const nvpflow_flow* flow, const float* z, int64_t rows, float* x, float* log_det) {
  return nvpflow::inverse(flow, z, rows, x, log_det);
}
nvpflow_status nvpflow_inverse_context_f32(const nvpflow_flow* flow, const float* z, int64_t rows, const float* context,
                                           int64_t context_rows, float* x, float* log_det) {
  return nvpflow::inverse(flow, z, rows, x, log_det, {context, context_rows});
}
nvpflow_status nvpflow_inverse_f64(const nvpflow_flow* flow, const double* z, int64_t rows, double* x,
                                   double* log_det) {
  return nvpflow::inverse(flow, z, rows, x, log_det);
}
nvpflow_status nvpflow_inverse_context_f64(const nvpflow_flow* flow, const double* z, int64_t rows,
                                           const double* context, int64_t context_rows, double* x, double* log_det) {
  return nvpflow::inverse(flow, z, rows, x, log_det, {context, context_rows});
}
nvpflow_status nvpflow_inverse_rows64(const nvpflow_flow* flow, const float* z, int64_t rows, double* x,
                                      float* log_det) {
  return nvpflow::inverse(flow, z, rows, x, log_det);
}
nvpflow_status nvpflow_inverse_context_rows64(const nvpflow_flow* flow, const float* z, int64_t rows,
                                              const float* context, int64_t context_rows, double* x, float* log_det) {
  return nvpflow::inverse(flow, z, rows, x, log_det, {context, context_rows});
}
nvpflow_status nvpflow_sample_f32(const nvpflow_flow* flow, uint64_t seed, uint64_t first_row, int64_t rows, float* x) {
  return nvpflow::sample<float>(flow, seed, first_row, rows, x);
}
nvpflow_status nvpflow_sample_context_f32(const nvpflow_flow* flow, uint64_t seed, uint64_t first_row, int64_t rows,
                                          const float* context, int64_t context_rows, float* x) {
  return nvpflow::sample<float>(flow, seed, first_row, rows, x, {context, context_rows});
}
nvpflow_status nvpflow_sample_f64(const nvpflow_flow* flow, uint64_t seed, uint64_t first_row, int64_t rows,
                                  double* x) {
  return nvpflow::sample<double>(flow, seed, first_row, rows, x);
}
nvpflow_status nvpflow_sample_context_f64(const nvpflow_flow* flow, uint64_t seed, uint64_t first_row, int64_t rows,
                                          const double* context, int64_t context_rows, double* x) {
  return nvpflow::sample<double>(flow, seed, first_row, rows, x, {context, context_rows});
}
nvpflow_status nvpflow_sample_rows64(const nvpflow_flow* flow, uint64_t seed, uint64_t first_row, int64_t rows,
                                     double* x) {
  return nvpflow::sample<float>(flow, seed, first_row, rows, x);
}
nvpflow_status nvpflow_sample_context_rows64(const nvpflow_flow* flow, uint64_t seed, uint64_t first_row, int64_t rows,
                                             const float* context, int64_t context_rows, double* x) {
  return nvpflow::sample<float>(flow, seed, first_row, rows, x, {context, context_rows});
}
nvpflow_status nvpflow_sample_and_log_prob_f32(const nvpflow_flow* flow, uint64_t seed, uint64_t first_row,
                                               int64_t rows, float* x, float* log_prob) {
  return nvpflow::sample_and_log_prob(flow, seed, first_row, rows, x, log_prob);
}
nvpflow_status nvpflow_sample_and_log_prob_context_f32(const nvpflow_flow* flow, uint64_t seed, uint64_t first_row,
                                                       int64_t rows, const float* context, int64_t context_rows,
                                                       float* x, float* log_prob) {
  return nvpflow::sample_and_log_prob(flow, seed, first_row, rows, x, log_prob, {context, context_rows});
}
nvpflow_status nvpflow_sample_and_log_prob_f64(const nvpflow_flow* flow, uint64_t seed, uint64_t first_row,
                                               int64_t rows, double* x, double* log_prob) {
  return nvpflow::sample_and_log_prob(flow, seed, first_row, rows, x, log_prob);
}
nvpflow_status nvpflow_sample_and_log_prob_context_f64(const nvpflow_flow* flow, uint64_t seed, uint64_t first_row,
                                                       int64_t rows, const double* context, int64_t context_rows,
                                                       double* x, double* log_prob) {
  return nvpflow::sample_and_log_prob(flow, seed, first_row, rows, x, log_prob, {context, context_rows});
}
nvpflow_status nvpflow_sample_and_log_prob_rows64(const nvpflow_flow* flow, uint64_t seed, uint64_t first_row,
                                                  int64_t rows, double* x, float* log_prob) {
  return nvpflow::sample_and_log_prob(flow, seed, first_row, rows, x, log_prob);
}
nvpflow_status nvpflow_sample_and_log_prob_context_rows64(const nvpflow_flow* flow, uint64_t seed, uint64_t first_row,
                                                          int64_t rows, const float* context, int64_t context_rows,
                                                          double* x, float* log_prob) {
  return nvpflow::sample_and_log_prob(flow, seed, first_row, rows, x, log_prob, {context, context_rows});
}
nvpflow_status nvpflow_score_f32(const nvpflow_flow* flow, const float* x, int64_t rows, float* score) {
  return nvpflow::score(flow, x, rows, score);
}
nvpflow_status nvpflow_score_context_f32(const nvpflow_flow* flow, const float* x, int64_t rows, const float* context,
                                         int64_t context_rows, float* score) {
  return nvpflow::score(flow, x, rows, score, {context, context_rows});
}
nvpflow_status nvpflow_score_f64(const nvpflow_flow* flow, const double* x, int64_t rows, double* score) {
  return nvpflow::score(flow, x, rows, score);
}
nvpflow_status nvpflow_score_context_f64(const nvpflow_flow* flow, const double* x, int64_t rows, const double* context,
                                         int64_t context_rows, double* score) {
  return nvpflow::score(flow, x, rows, score, {context, context_rows});
}
nvpflow_status nvpflow_score_rows64(const nvpflow_flow* flow, const double* x, int64_t rows, float* score) {
  return nvpflow::score(flow, x, rows, score);
}
nvpflow_status nvpflow_score_context_rows64(const nvpflow_flow* flow, const double* x, int64_t rows,
                                            const float* context, int64_t context_rows, float* score) {
  return nvpflow::score(flow, x, rows, score, {context, context_rows});
}
nvpflow_status nvpflow_nll_gradient_f32(const nvpflow_flow* flow, const float* x, int64_t rows, double* nll,
                                        float* gradient) {
  return nvpflow::nll_gradient(flow, x, rows, std::nullopt, nll, gradient);
}
nvpflow_status nvpflow_nll_gradient_context_f32(const nvpflow_flow* flow, const float* x, int64_t rows,
                                                const float* context, int64_t context_rows, double* nll,
                                                float* gradient) {
  return nvpflow::nll_gradient(flow, x, rows, std::nullopt, nll, gradient, {context, context_rows});
}
nvpflow_status nvpflow_nll_gradient_f64(const nvpflow_flow* flow, const double* x, int64_t rows, double* nll,
                                        double* gradient) {
  return nvpflow::nll_gradient(flow, x, rows, std::nullopt, nll, gradient);
}
nvpflow_status nvpflow_nll_gradient_context_f64(const nvpflow_flow* flow, const double* x, int64_t rows,
                                                const double* context, int64_t context_rows, double* nll,
                                                double* gradient) {
  return nvpflow::nll_gradient(flow, x, rows, std::nullopt, nll, gradient, {context, context_rows});
}
nvpflow_status nvpflow_nll_gradient_weighted_f32(const nvpflow_flow* flow, const float* x, int64_t rows,
                                                 const double* sample_weight, double* nll, float* gradient) {
  return nvpflow::nll_gradient(flow, x, rows, sample_weight, nll, gradient);
}
nvpflow_status nvpflow_nll_gradient_weighted_context_f32(const nvpflow_flow* flow, const float* x, int64_t rows,
                                                         const double* sample_weight, const float* context,
                                                         int64_t context_rows, double* nll, float* gradient) {
  return nvpflow::nll_gradient(flow, x, rows, sample_weight, nll, gradient, {context, context_rows});
}
nvpflow_status nvpflow_nll_gradient_weighted_f64(const nvpflow_flow* flow, const double* x, int64_t rows,
                                                 const double* sample_weight, double* nll, double* gradient) {
  return nvpflow::nll_gradient(flow, x, rows, sample_weight, nll, gradient);
}
nvpflow_status nvpflow_nll_gradient_weighted_context_f64(const nvpflow_flow* flow, const double* x, int64_t rows,
                                                         const double* sample_weight, const double* context,
                                                         int64_t context_rows, double* nll, double* gradient) {
  return nvpflow::nll_gradient(flow, x, rows, sample_weight, nll, gradient, {context, context_rows});
}

}  // extern "C"
