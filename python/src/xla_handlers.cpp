// XLA calls these on threads of its own, without the GIL, and nothing here takes it or touches Python, so that neither
// can wait for the other.
//
// Arguments are the rows of a call, their context where the flow has one, the cotangents, then every parameter in the
// order of ParamLayout. A context is [M, C] where M divides the number of rows: each of its rows goes with as many
// consecutive ones. What the call is stands in attributes: a handler is a function of what XLA hands it, so that
// programs can be cached on disk, exported and run in another process.
//
// The kernels read parameters in a packed form. XLA's buffers change hands without notice, so an address proves
// nothing, and every call compares all bytes of its parameters with those that were packed.

#include "xla_handlers.hpp"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nvpflow/device.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/execution.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/spec.hpp>
#include <nvpflow/spec_json.hpp>

#include "../../cpp/src/parallel.hpp"
#include "xla_ffi.h"

namespace nvpflow::python {
namespace {

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

// ---- packed parameters ----------------------------------------------------------------------------------------------

/// One model of the process, with the parameters that it was last called with.
class Model {
 public:
  explicit Model(FlowSpec s) : spec((s.validate(), std::move(s))), layout(spec) {}

  const FlowSpec spec;
  const ParamLayout layout;

  /// Tensors in the order of the layout, of its sizes. The result, whose parameters do not change while anybody holds
  /// it, may be used until it is let go.
  std::shared_ptr<const Flow> flow_with(const std::vector<const void*>& tensors) {
    for (const std::shared_ptr<Flow>& flow : flows()) {
      if (holds(*flow, tensors)) {
        put_first(flow);
        return flow;
      }
    }
    std::shared_ptr<Flow> flow = take_idle();
    if (flow == nullptr) {
      flow = std::make_shared<Flow>(Flow::of_tensors(spec, tensors));
    } else {
      flow->set_tensors_unchecked(tensors);
    }
    put_first(flow);
    return flow;
  }

 private:
  /// Two, so that a program that goes back and forth between two sets (an average beside the weights that are trained)
  /// does not pack them every time.
  static constexpr std::size_t kFlows = 2;

  bool holds(const Flow& flow, const std::vector<const void*>& tensors) const {
    const std::int64_t size = size_of(spec.dtype);
    const auto* flat = static_cast<const unsigned char*>(
        spec.dtype == DType::float32 ? static_cast<const void*>(flow.parameters<float>().data())
                                     : static_cast<const void*>(flow.parameters<double>().data()));
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const TensorInfo& tensor = layout.tensors()[i];
      const auto bytes = static_cast<std::size_t>(tensor.size * size);
      if (std::memcmp(flat + tensor.offset * size, tensors[i], bytes) != 0) return false;
    }
    return true;
  }

  std::vector<std::shared_ptr<Flow>> flows() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return flows_;
  }

  void put_first(const std::shared_ptr<Flow>& flow) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = std::find(flows_.begin(), flows_.end(), flow);
    if (found != flows_.end()) flows_.erase(found);
    flows_.insert(flows_.begin(), flow);
    if (flows_.size() > kFlows) flows_.pop_back();
  }

  /// Takes an unused flow out of the list, where that is full: the one used longest ago. References are only
  /// handed out under the mutex, so a count of one stays one.
  std::shared_ptr<Flow> take_idle() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (flows_.size() < kFlows) return nullptr;
    for (auto flow = flows_.end(); flow-- != flows_.begin();) {
      if (flow->use_count() > 1) continue;
      std::atomic_thread_fence(std::memory_order_acquire);  // whoever let it go has read it
      std::shared_ptr<Flow> idle = std::move(*flow);
      flows_.erase(flow);
      return idle;
    }
    return nullptr;
  }

  std::mutex mutex_;
  std::vector<std::shared_ptr<Flow>> flows_;  // the last used first
};

/// The models that were called last, the latest first: a process that goes through many keeps the memory of only
/// these.
struct Models {
  static constexpr std::size_t kKept = 8;

  std::mutex mutex;
  std::vector<std::pair<std::string, std::shared_ptr<Model>>> kept;
};

/// Never destroyed: XLA's threads may outlive static objects.
Models& models() {
  static auto* all = new PerProcess<Models>;
  return all->get();
}

std::shared_ptr<Model> model_of(std::string_view spec) {
  Models& all = models();
  const std::lock_guard<std::mutex> lock(all.mutex);
  auto found = std::find_if(all.kept.begin(), all.kept.end(), [&](const auto& entry) { return entry.first == spec; });
  if (found == all.kept.end()) {
    auto made = std::make_shared<Model>(parse_spec(std::string(spec)));
    if (all.kept.size() == Models::kKept) all.kept.pop_back();
    found = all.kept.emplace(all.kept.end(), std::string(spec), std::move(made));
  }
  std::rotate(all.kept.begin(), found, found + 1);
  return all.kept.front().second;
}

// ---- one call -------------------------------------------------------------------------------------------------------

/// XLA's threads flush subnormal numbers to zero; a flow has the same bits whoever calls it.
class DefaultFloatingPoint {
 public:
  DefaultFloatingPoint() {
    std::fegetenv(&callers_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatingPoint() { std::fesetenv(&callers_); }
  DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
  DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;

 private:
  std::fenv_t callers_;
};

/// What XLA hands over, checked: the sizes come from a program, which nvpflow.jax need not have written.
class Call {
 public:
  /// inputs: beside the context and the parameters. outputs_of_context: further ones where the flow has a context.
  Call(const xla::CallFrame& frame, std::size_t inputs, std::size_t outputs, std::size_t outputs_of_context = 0)
      : frame_(frame),
        model_(model_of(text("spec"))),
        how_(static_cast<int>(std::clamp<std::int64_t>(number("num_threads"), 0, 4096))) {
    const std::size_t tensors = model_->layout.tensors().size();
    if (has_context()) ++inputs, outputs += outputs_of_context;
    if (frame.args.size != static_cast<std::int64_t>(inputs + tensors) ||
        frame.rets.size != static_cast<std::int64_t>(outputs)) {
      fail("the call has " + std::to_string(frame.args.size) + " arguments and " + std::to_string(frame.rets.size) +
           " results, expected " + std::to_string(inputs + tensors) + " and " + std::to_string(outputs));
    }
    const xla::Buffer& x = argument(0);
    if (x.rank != 2) fail("argument 0 has " + std::to_string(x.rank) + " axes, expected 2");
    rows_ = x.dims[0];
    if (has_context()) read_context();
    std::vector<const void*> parameters(tensors);
    for (std::size_t i = 0; i < tensors; ++i) {
      const xla::Buffer& tensor = argument(inputs + i);
      check(tensor, model_->layout.tensors()[i].shape, model_->layout.tensors()[i].name);
      parameters[i] = tensor.data;
    }
    flow_ = model_->flow_with(parameters);
  }

  const Flow& flow() const { return *flow_; }
  const Execution& how() const { return how_; }
  /// The same of a product that also gives the cotangent of the context as result i, where the flow has one.
  Execution how_with_gradient(std::size_t i) const {
    Execution how = how_;
    if (!has_context()) return how;
    how.context.gradient = optional_output(i, contexts());
    if (how.context.gradient != nullptr && contexts_ != 1 && contexts_ != rows_) {
      fail("the context has " + std::to_string(contexts_) + " rows for " + std::to_string(rows_) +
           ", expected 1 or one for each where its cotangent is asked for");
    }
    return how;
  }
  DType dtype() const { return model_->spec.dtype; }
  std::int64_t rows() const { return rows_; }
  std::int64_t features() const { return model_->spec.input_size; }

  Direction direction() const { return number("inverse") == 0 ? Direction::forward : Direction::inverse; }

  using Shape = std::vector<std::int64_t>;
  Shape matrix() const { return {rows_, features()}; }
  Shape vector() const { return {rows_}; }
  Shape flat() const { return {model_->layout.size()}; }
  Shape contexts() const { return {contexts_, model_->spec.context_size}; }

  /// The rows.
  const void* input() const { return check(argument(0), matrix(), "argument 0"); }
  /// The cotangent of result i of the call that this is the product of.
  const void* cotangent(std::size_t i, const Shape& shape) const {
    const std::size_t at = place_of_cotangent(i);
    return check(argument(at), shape, "argument " + std::to_string(at));
  }
  /// Null for one of shape [0], which says zero.
  const void* optional_cotangent(std::size_t i, const Shape& shape) const {
    return is_absent(argument(place_of_cotangent(i))) ? nullptr : cotangent(i, shape);
  }
  void* output(std::size_t i, const Shape& shape) const {
    return check(result(i), shape, "result " + std::to_string(i));
  }
  /// Null for a result of shape [0], which says not wanted.
  void* optional_output(std::size_t i, const Shape& shape) const {
    return is_absent(result(i)) ? nullptr : output(i, shape);
  }

 private:
  const void* attribute(std::string_view name, xla::AttributeType type) const {
    const xla::Attributes& all = frame_.attrs;
    for (std::int64_t i = 0; i < all.size; ++i) {
      if (std::string_view(all.names[i]->ptr, all.names[i]->len) == name && all.types[i] == type) return all.attrs[i];
    }
    fail("the call has no attribute " + std::string(name) + " of the expected type");
  }

  std::string_view text(std::string_view name) const {
    const auto& span = *static_cast<const xla::ByteSpan*>(attribute(name, xla::AttributeType::string));
    return {span.ptr, span.len};
  }

  std::int64_t number(std::string_view name) const {
    const auto& scalar = *static_cast<const xla::Scalar*>(attribute(name, xla::AttributeType::scalar));
    if (scalar.dtype != xla::DataType::s64) fail("the attribute " + std::string(name) + " is not a 64-bit integer");
    return *static_cast<const std::int64_t*>(scalar.value);
  }

  const xla::Buffer& argument(std::size_t i) const {
    if (frame_.args.types[i] != xla::ArgumentType::buffer) fail("argument " + std::to_string(i) + " is not a buffer");
    return *static_cast<const xla::Buffer*>(frame_.args.args[i]);
  }
  const xla::Buffer& result(std::size_t i) const {
    if (frame_.rets.types[i] != xla::ResultType::buffer) fail("result " + std::to_string(i) + " is not a buffer");
    return *static_cast<const xla::Buffer*>(frame_.rets.rets[i]);
  }

  static bool is_absent(const xla::Buffer& buffer) { return buffer.rank == 1 && buffer.dims[0] == 0; }

  void* check(const xla::Buffer& buffer, const Shape& shape, const std::string& name) const {
    if (buffer.dtype != (dtype() == DType::float32 ? xla::DataType::f32 : xla::DataType::f64)) {
      fail(name + " has another dtype than the flow, " + std::string(name_of(dtype())));
    }
    if (!std::equal(shape.begin(), shape.end(), buffer.dims, buffer.dims + buffer.rank)) {
      const auto shown = [](const std::int64_t* begin, const std::int64_t* end) {
        std::string text;
        for (; begin != end; ++begin) text += (text.empty() ? "" : ", ") + std::to_string(*begin);
        return "[" + text + "]";
      };
      fail(name + " has shape " + shown(buffer.dims, buffer.dims + buffer.rank) + ", expected " +
           shown(shape.data(), shape.data() + shape.size()));
    }
    return buffer.data;
  }

  bool has_context() const { return model_->spec.context_size > 0; }

  std::size_t place_of_cotangent(std::size_t i) const { return i + (has_context() ? 2 : 1); }

  void read_context() {
    static constexpr unsigned char kNothing = 0;
    const xla::Buffer& context = argument(1);
    if (context.rank != 2) fail("argument 1, the context, has " + std::to_string(context.rank) + " axes, expected 2");
    contexts_ = context.dims[0];
    const void* data = check(context, contexts(), "argument 1, the context,");
    if (contexts_ == 0 ? rows_ > 0 : rows_ % contexts_ != 0) {
      fail("argument 1, the context, has " + std::to_string(contexts_) + " rows, expected a number that divides " +
           std::to_string(rows_));
    }
    how_.context.rows = data == nullptr ? &kNothing : data;  // of no rows nothing is read
    const std::int64_t each = rows_ / std::max<std::int64_t>(1, contexts_);
    how_.context.repeat = contexts_ == 1 ? ContextRows::kForAll : std::max<std::int64_t>(1, each);
  }

  const xla::CallFrame& frame_;
  std::shared_ptr<Model> model_;
  Execution how_;
  std::int64_t rows_ = 0, contexts_ = 0;
  std::shared_ptr<const Flow> flow_;
};

template <class F>
void by_dtype(DType dtype, F&& f) {
  dtype == DType::float32 ? f(float{}) : f(double{});
}

// ---- the calls ------------------------------------------------------------------------------------------------------

/// x -> log_prob
void log_prob(const xla::CallFrame& frame) {
  const Call call(frame, 1, 1);
  call.flow().log_prob_unchecked(call.input(), call.rows(), call.output(0, call.vector()), call.how());
}

/// in -> out, log_det
void transform(const xla::CallFrame& frame) {
  const Call call(frame, 1, 2);
  call.flow().transform_unchecked(call.direction(), call.input(), call.rows(), call.output(0, call.matrix()),
                                  call.output(1, call.vector()), call.how());
}

/// in, grad_out, grad_log_det -> grad_in, grad_parameters and, with a context, its cotangent
void transform_vjp(const xla::CallFrame& frame) {
  const Call call(frame, 3, 2, 1);
  call.flow().vjp_unchecked(call.direction(), call.input(), call.rows(), call.optional_cotangent(0, call.matrix()),
                            call.optional_cotangent(1, call.vector()), call.optional_output(0, call.matrix()),
                            call.optional_output(1, call.flat()), false, call.how_with_gradient(2));
}

/// x, grad_log_prob -> grad_x, grad_parameters and, with a context, its cotangent
void log_prob_vjp(const xla::CallFrame& frame) {
  const Call call(frame, 2, 2, 1);
  call.flow().log_prob_vjp_unchecked(call.input(), call.rows(), call.cotangent(0, call.vector()), nullptr,
                                     call.optional_output(0, call.matrix()), call.optional_output(1, call.flat()),
                                     false, call.how_with_gradient(2));
}

/// x -> nll, its gradient by the parameters
void nll(const xla::CallFrame& frame) {
  const Call call(frame, 1, 2);
  void* value = call.output(0, {});
  void* gradient = call.optional_output(1, call.flat());
  const double mean = gradient == nullptr
                          ? call.flow().nll_unchecked(call.input(), call.rows(), call.how())
                          : call.flow().nll_gradient_unchecked(call.input(), call.rows(), gradient, call.how());
  by_dtype(call.dtype(), [&](auto t) { *static_cast<decltype(t)*>(value) = static_cast<decltype(t)>(mean); });
}

/// x, grad_log_prob -> nll, log_prob, and what log_prob_vjp gives
void nll_vjp(const xla::CallFrame& frame) {
  const Call call(frame, 2, 4, 1);
  void* value = call.output(0, {});
  void* log_prob = call.output(1, call.vector());
  if (call.rows() == 0) fail("x has no rows, expected at least one: the mean over an empty batch is not defined");
  call.flow().log_prob_vjp_unchecked(call.input(), call.rows(), call.cotangent(0, call.vector()), log_prob,
                                     call.optional_output(2, call.matrix()), call.optional_output(3, call.flat()),
                                     false, call.how_with_gradient(4));
  by_dtype(call.dtype(), [&](auto t) {
    using T = decltype(t);
    const T* each = static_cast<const T*>(log_prob);
    const double sum = std::accumulate(each, each + call.rows(), 0.0);
    *static_cast<T*>(value) = static_cast<T>(-sum / static_cast<double>(call.rows()));
  });
}

// ---- handlers -------------------------------------------------------------------------------------------------------

xla::Error* error_of(const xla::CallFrame& frame, xla::ErrorCode code, const char* message) {
  xla::ErrorCreateArgs args{sizeof(xla::ErrorCreateArgs), nullptr, message, code};
  return frame.api->error_create(&args);
}

/// The version that a handler says it was written for: XLA's own, where the two fit. XLA refuses what it does not
/// support. Of the jaxlibs that send no functions along with the question (api is null), 0.5 takes only 0.1.
int spoken_minor(const xla::Api* api) {
  if (api == nullptr) return xla::kOldestMinor;
  if (api->api_version.major_version != xla::kMajor) return xla::kNewestMinor;
  return std::clamp(api->api_version.minor_version, xla::kOldestMinor, xla::kNewestMinor);
}

/// Before it registers a handler, XLA asks for the version of the interface that it was written for.
bool answers_for_metadata(const xla::CallFrame& frame) {
  for (xla::Extension* extension = frame.extension_start; extension != nullptr; extension = extension->next) {
    if (extension->type != xla::ExtensionType::metadata) continue;
    xla::Metadata& metadata = *reinterpret_cast<xla::MetadataExtension*>(extension)->metadata;
    metadata.api_version = {sizeof(xla::ApiVersion), nullptr, xla::kMajor, spoken_minor(frame.api)};
    metadata.traits = 0;
    return true;
  }
  return false;
}

/// Whether everything that is read of a call is there. What has been registered is called by the XLA that registered
/// it, so this holds unless the description in xla_ffi.h is wrong.
void check_layout(const xla::CallFrame& frame) {
  const xla::ApiVersion& theirs = frame.api->api_version;
  if (theirs.major_version == xla::kMajor && theirs.minor_version >= xla::kOldestMinor &&
      frame.struct_size >= offsetof(xla::CallFrame, future) && frame.args.struct_size >= sizeof(xla::Arguments) &&
      frame.rets.struct_size >= sizeof(xla::Results) && frame.attrs.struct_size >= sizeof(xla::Attributes)) {
    return;
  }
  fail(
      "nvpflow was written for versions 0.1 to 0.3 of XLA's foreign-function interface and what follows them; this "
      "is " +
      std::to_string(theirs.major_version) + "." + std::to_string(theirs.minor_version));
}

template <void (*run)(const xla::CallFrame&)>
xla::Error* handler(xla::CallFrame* frame) {
  if (answers_for_metadata(*frame)) return nullptr;
  try {
    check_layout(*frame);
    const DefaultFloatingPoint mode;
    run(*frame);
    return nullptr;
  } catch (const Error& error) {
    return error_of(*frame, xla::ErrorCode::invalid_argument, error.what());
  } catch (const std::bad_alloc&) {
    return error_of(*frame, xla::ErrorCode::resource_exhausted, "nvpflow: out of memory");
  } catch (const std::exception& error) {
    return error_of(*frame, xla::ErrorCode::internal, error.what());
  }
}

}  // namespace

pybind11::dict xla_handlers() {
  const std::initializer_list<std::pair<const char*, xla::Handler*>> handlers = {
      {"nvpflow_log_prob", &handler<&log_prob>},
      {"nvpflow_transform", &handler<&transform>},
      {"nvpflow_transform_vjp", &handler<&transform_vjp>},
      {"nvpflow_log_prob_vjp", &handler<&log_prob_vjp>},
      {"nvpflow_nll", &handler<&nll>},
      {"nvpflow_nll_vjp", &handler<&nll_vjp>},
  };
  pybind11::dict capsules;
  for (const auto& [name, address] : handlers) capsules[name] = pybind11::capsule(reinterpret_cast<void*>(address));
  return capsules;
}

}  // namespace nvpflow::python
