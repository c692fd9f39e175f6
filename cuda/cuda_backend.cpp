// The CUDA backend: keeps the packed parameters on the device, brings rows to the kernels and results back, and queues
// launches. Host code only: the host's compiler builds it, with the host's warnings.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <nvpflow/device.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/spec.hpp>

#include "../cpp/src/backend.hpp"
#include "../cpp/src/float_mode.hpp"
#include "../cpp/src/left_right.hpp"
#include "../cpp/src/parallel.hpp"
#include "../cpp/src/training.hpp"
#include "cuda_training.hpp"
#include "device_flow.hpp"
#include "kernels.hpp"
#include "packed.hpp"
#include "runtime.hpp"
#include "staging.hpp"

namespace nvpflow {
namespace cuda {
namespace {

/// Rows of a device array whose log-densities are added up at a time.
constexpr std::int64_t kSumRows = 1 << 20;
/// Rows that are worth a thread where they are standardized on the host.
constexpr std::int64_t kWideRows = 1 << 12;
/// Streams whose workspaces are kept.
constexpr std::size_t kMaxStreams = 64;

/// Memory that kernels on a caller's stream work in. Work on one stream runs in order, so that calls can share it.
class StreamWorkspaces {
 public:
  void* get(Stream stream, std::int64_t bytes) {
    if (bytes == 0) return nullptr;
    const bool capturing = is_capturing(stream);
    const Key key = key_of(stream);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (workspaces_.size() >= kMaxStreams && !workspaces_.contains(key)) {
      if (capturing) refuse(bytes);
      std::erase_if(workspaces_, [](const auto& entry) { return !entry.second.captured; });
    }
    Workspace& own = workspaces_[key];
    if (own.memory.capacity() < bytes) {
      if (capturing) refuse(bytes);
      // A graph that was captured with it reads it for as long as the flow lives.
      if (own.captured) retired_.push_back(std::move(own.memory));
      own.captured = false;
    }
    own.captured = own.captured || capturing;
    return own.memory.reserve(bytes, "the kernels' workspace");
  }

 private:
  struct Workspace {
    Memory memory{Memory::Kind::device};
    bool captured = false;  // by a CUDA graph
  };
  using Key = std::pair<Stream, std::thread::id>;

  /// One handle is another stream in every thread; all others belong to no thread.
  static Key key_of(Stream stream) {
    return {stream, is_per_thread(stream) ? std::this_thread::get_id() : std::thread::id()};
  }

  [[noreturn]] static void refuse(std::int64_t bytes) {
    throw Error(ErrorCode::device,
                "the kernels need " + std::to_string(bytes) +
                    " bytes of workspace, and nothing can be allocated while a stream is captured; make the same call "
                    "once on this stream before you capture it");
  }

  std::mutex mutex_;
  std::map<Key, Workspace> workspaces_;
  std::vector<Memory> retired_;
};

template <class T>
class CudaBackend final : public Backend {
 public:
  CudaBackend(const FlowSpec& spec, const ParamLayout& layout, int index, Precision precision)
      : flow_(std::make_shared<const DeviceFlow<T>>(spec, layout, index, precision)),
        packed_([this] { return make(); }) {}

  ~CudaBackend() override {
    try {
      const OnDevice on(flow_->index());
      synchronize_device();   // kernels on callers' streams may still read the parameters
    } catch (const Error&) {  // a failed device or a forked child: nothing to wait for
    }
  }

  void set_parameters(const void* parameters, const float* mean_low) override {
    const FloatMode mode;
    const OnDevice on(flow_->index());
    packed_.rewrite([this] { return make(); },
                    [&](Packed<T>& packed) {
                      // No call reads this side any more, but what calls have queued may.
                      synchronize_device();
                      const Lanes::Loan lane(lanes_);
                      Memory flat(Memory::Kind::device);
                      T* values = static_cast<T*>(flat.reserve(flow_->parameter_bytes(), "parameters"));
                      lane->send(values, parameters, flow_->parameter_bytes());
                      packed.pack(values, Matrices::both, lane->stream());
                      if constexpr (sizeof(T) == 4) {
                        if (takes_float64_rows(flow_->spec())) {
                          packed.pack_rest(values, static_cast<const T*>(parameters), mean_low, lane->stream());
                        }
                      }
                      synchronize(lane->stream());
                    });
  }

  void transform(Direction direction, const void* in, std::int64_t rows, void* out, void* log_det,
                 const Execution& how) const override {
    TransformCall<T> call;
    call.inverse = direction == Direction::inverse;
    call.in = static_cast<const T*>(in);
    call.out = static_cast<T*>(out);
    call.log_det = static_cast<T*>(log_det);
    run(call, rows, how);
  }

  void log_prob(const void* x, std::int64_t rows, void* out, const Execution& how) const override {
    TransformCall<T> call;
    call.in = static_cast<const T*>(x);
    call.log_prob = static_cast<T*>(out);
    run(call, rows, how);
  }

  void sample(std::uint64_t seed, std::uint64_t first_row, std::int64_t rows, void* x, void* log_prob,
              const Execution& how) const override {
    TransformCall<T> call;
    call.inverse = true;
    call.out = static_cast<T*>(x);
    call.log_prob = static_cast<T*>(log_prob);
    call.seed = seed;
    call.first_row = first_row;
    run(call, rows, how);
  }

  void conditioner(std::int64_t layer, const void* in, std::int64_t rows, void* s, void* t,
                   const Execution& how) const override {
    TransformCall<T> call;
    call.in = static_cast<const T*>(in);
    call.conditioner = static_cast<std::int32_t>(layer);
    call.transformed = flow_->layers()->on_host().layers[layer].num_outputs;
    call.log_scale = static_cast<T*>(s);
    call.shift = static_cast<T*>(t);
    run(call, rows, how);
  }

  void noise(std::uint64_t seed, std::uint64_t first_row, std::int64_t rows, void* z,
             const Execution& how) const override {
    const OnDevice on(flow_->index());
    const auto launch = [&](T* to, std::uint64_t first, std::int64_t count, Stream stream) {
      const Program<T>& host = flow_->layers()->on_host();
      launch_on(stream, "drawing noise",
                [base = host.base, features = host.input_size, seed, first, count, to, stream] {
                  return launch_noise<T>(base, features, seed, first, count, to, stream);
                });
    };
    if (how.device_arrays) return launch(static_cast<T*>(z), first_row, rows, stream_of(how));
    const Lanes::Loan lane(lanes_);
    lane->run({}, {HostOutput{z, flow_->row_bytes()}}, nullptr, rows, how.threads, [&](const Lane::Chunk& chunk) {
      launch(static_cast<T*>(chunk.outputs[0]), first_row + static_cast<std::uint64_t>(chunk.first_row), chunk.rows,
             lane->stream());
    });
  }

  void vjp(Direction direction, const void* in, std::int64_t rows, const void* grad_out, const void* grad_log_det,
           void* grad_in, void* grad_parameters, bool accumulate, const Execution& how) const override {
    GradientCall<T> call;
    call.inverse = direction == Direction::inverse;
    call.in = static_cast<const T*>(in);
    call.grad_out = static_cast<const T*>(grad_out);
    call.grad_log_det = static_cast<const T*>(grad_log_det);
    call.grad_in = static_cast<T*>(grad_in);
    call.gradient = static_cast<T*>(grad_parameters);
    call.accumulate = accumulate;
    run_gradient(call, nullptr, rows, how);
  }

  void log_prob_vjp(const void* x, std::int64_t rows, const void* grad_log_prob, void* log_prob, void* grad_x,
                    void* grad_parameters, bool accumulate, const Execution& how) const override {
    GradientCall<T> call;
    call.in = static_cast<const T*>(x);
    call.density = true;
    call.grad_log_det = static_cast<const T*>(grad_log_prob);
    call.log_prob = static_cast<T*>(log_prob);
    call.grad_in = static_cast<T*>(grad_x);
    call.gradient = static_cast<T*>(grad_parameters);
    call.accumulate = accumulate;
    run_gradient(call, nullptr, rows, how);
  }

  double nll_gradient(const void* x, const WeighedRows& rows, double total, void* grad_parameters, bool accumulate,
                      const Execution& how) const override {
    const FloatMode mode;
    GradientCall<T> call;
    call.in = static_cast<const T*>(x);
    call.nll = true;
    call.nll_factor = 1.0 / total;
    call.weights.weights = rows.weights;
    call.gradient = static_cast<T*>(grad_parameters);
    call.accumulate = accumulate;
    return run_gradient(call, rows.index, rows.count, how);
  }

  double sum_log_prob(const void* x, const WeighedRows& given, const Execution& how) const override {
    const std::int64_t rows = given.count;
    const std::int64_t* index = given.index;
    if (rows == 0) return 0;
    const OnDevice on(flow_->index());
    const Lanes::Loan lane(lanes_);
    const Reading packed(packed_);
    const std::int64_t chunk =
        how.device_arrays ? std::min(rows, kSumRows) : Lane::chunk_rows(rows, flow_->row_bytes());
    const TransformPlan plan = flow_->plan(chunk);
    const std::int64_t plan_bytes = round_up(plan.workspace_bytes, 256);
    auto* workspace = static_cast<unsigned char*>(lane->workspace(plan_bytes + sum_workspace_bytes(chunk)));
    T* log_prob = static_cast<T*>(lane->result(chunk * static_cast<std::int64_t>(sizeof(T))));
    double* sum = lane->sum();
    const bool wide = is_wide(*packed, how);
    const Program<T>& program = wide ? packed->rest() : packed->program();
    const auto add = [&](TransformCall<T> call, const RowWeights& weights, std::int64_t first, std::int64_t count,
                         Stream stream) {
      call.rows = count;
      call.log_prob = log_prob;
      flow_->transform(plan, program, call, workspace, stream);
      launch_on(stream, "adding up log-densities",
                [log_prob, weights, count, first, sum, workspace, plan_bytes, stream] {
                  return launch_sum<T>(log_prob, weights, count, first > 0, sum, workspace + plan_bytes, stream);
                });
    };
    TransformCall<T> call;
    if (how.device_arrays) {
      require_narrow(*packed, how);
      for (std::int64_t first = 0; first < rows; first += chunk) {
        call.in = static_cast<const T*>(x) + (index == nullptr ? first * flow_->features() : 0);
        call.index = index == nullptr ? nullptr : index + first;
        call.context = context_on_device(how, rows);
        call.context.first = first;
        add(call, {}, first, std::min(chunk, rows - first), stream_of(how));
      }
      synchronize(stream_of(how));
    } else {
      Lane::Inputs inputs;
      inputs[0] = HostInput{x, flow_->row_bytes()};
      inputs[Lane::kWeights] = weights_of(given.weights);
      if (wide) inputs[0].make = standardizing(*packed, x, index, how);
      call.context = stage_context(*lane, how, rows, inputs);
      lane->run(inputs, {}, index, rows, how.threads, [&](const Lane::Chunk& c) {
        call.in = static_cast<const T*>(c.inputs[0]);
        if (c.inputs[Lane::kContext] != nullptr) call.context.rows = static_cast<const T*>(c.inputs[Lane::kContext]);
        add(call, weights_of(c), c.first_row, c.rows, lane->stream());
      });
    }
    return lane->read_sum();
  }

  std::unique_ptr<Training> begin_training(const TrainingData& data, const void* parameters, std::int64_t slice_rows,
                                           const Execution&) const override {
    return make_training<T>(flow_, data, parameters, slice_rows);
  }

 private:
  using Reading = typename LeftRight<Packed<T>>::Reading;

  std::unique_ptr<Packed<T>> make() const {
    const OnDevice on(flow_->index());
    return std::make_unique<Packed<T>>(flow_->layers());
  }

  // ---- the first layer in float64, on the host ---------------------------------------------------------------------

  static bool is_wide(const Packed<T>& packed, const Execution& how) {
    return how.float64_rows || packed.first().is_split();
  }

  /// Rows of the device go through the layer in float32 there.
  static void require_narrow(const Packed<T>& packed, const Execution& how) {
    if (!is_wide(packed, how)) return;
    throw Error(
        ErrorCode::invalid_argument,
        "rows in a device's memory are of a flow whose first layer is to be applied in float64 (float64 rows, or "
        "a mean that float32 does not hold), which only rows of the host are; pass arrays of the host, or use a "
        "float64 flow");
  }

  static auto standardizing(const Packed<T>& packed, const void* x, const std::int64_t* index, const Execution& how) {
    return [&first = packed.first(), x, index, features = packed.program().input_size, how](
               std::int64_t begin, std::int64_t rows, void* to) {
      parallel_for(rows, kWideRows, how.threads, [&](std::int64_t b, std::int64_t e) {
        first.standardize(x, how.float64_rows, index, begin + b, e - b, static_cast<float*>(to) + b * features);
      });
    };
  }

  static void scale_gradient(const Packed<T>& packed, T* g, std::int64_t rows) {
    if constexpr (sizeof(T) == 4) packed.first().scale_gradient(g, rows);
  }

  static auto restoring(const Packed<T>& packed, void* x, const Execution& how) {
    return [&first = packed.first(), x, features = packed.program().input_size, how](
               std::int64_t begin, std::int64_t rows, const void* from) {
      parallel_for(rows, kWideRows, how.threads, [&](std::int64_t b, std::int64_t e) {
        first.restore(static_cast<const float*>(from) + b * features, e - b, x, how.float64_rows, begin + b);
      });
    };
  }

  static Stream stream_of(const Execution& how) { return static_cast<Stream>(how.stream); }

  /// A call's arrays in the host's memory.
  template <class Call>
  Lane::Inputs inputs_of(Call call) const {
    Lane::Inputs inputs;
    std::size_t i = 0;
    for (const auto& array : call.rows_in(flow_->features())) {
      inputs[i++] = HostInput{*array.at, array.width * static_cast<std::int64_t>(sizeof(T))};
    }
    return inputs;
  }
  template <class Call>
  Lane::Outputs outputs_of(Call call) const {
    Lane::Outputs outputs;
    std::size_t i = 0;
    for (const auto& array : call.rows_out(flow_->features(), flow_->context_size())) {
      outputs[i++] = HostOutput{*array.at, array.width * static_cast<std::int64_t>(sizeof(T))};
    }
    return outputs;
  }
  /// The call on a chunk's rows, where they are on the device.
  template <class Call>
  Call on_chunk(Call call, const Lane::Chunk& chunk) const {
    call.rows = chunk.rows;
    std::size_t i = 0;
    for (const auto& array : call.rows_in(flow_->features())) *array.at = static_cast<const T*>(chunk.inputs[i++]);
    i = 0;
    for (const auto& array : call.rows_out(flow_->features(), flow_->context_size())) {
      *array.at = static_cast<T*>(chunk.outputs[i++]);
    }
    if (chunk.inputs[Lane::kContext] != nullptr)
      call.context.rows = static_cast<const T*>(chunk.inputs[Lane::kContext]);
    return call;
  }

  /// Of a call's rows, in the host's memory.
  static HostInput weights_of(const double* weights) { return {weights, sizeof(double)}; }
  /// Of a chunk's rows, on the device.
  static RowWeights weights_of(const Lane::Chunk& chunk) {
    return {static_cast<const double*>(chunk.inputs[Lane::kWeights]), nullptr};
  }

  // ---- contexts ----------------------------------------------------------------------------------------------------

  /// Of a call on device arrays of so many rows.
  static ContextRows<T> context_on_device(const Execution& how, std::int64_t rows) {
    return {static_cast<const T*>(how.context.rows), 0, how.context.repeat >= rows ? 0 : how.context.repeat};
  }

  /// Of a call on arrays of the host: one for all rows goes to the device here; else each chunk brings a row for each
  /// of its rows, as an input.
  ContextRows<T> stage_context(Lane& lane, const Execution& how, std::int64_t rows, Lane::Inputs& inputs) const {
    const nvpflow::ContextRows& given = how.context;
    const std::int64_t bytes = flow_->context_bytes();
    if (given.rows == nullptr) return {};
    if (given.repeat >= rows && given.repeat > 1) {
      void* const one = lane.context(bytes);
      lane.send(one, given.rows, bytes);
      return {static_cast<const T*>(one), 0, 0};
    }
    inputs[Lane::kContext] = {given.rows, bytes};
    if (given.repeat == 1) return {};
    inputs[Lane::kContext].make = [given, bytes](std::int64_t first, std::int64_t count, void* to) {
      for (std::int64_t r = 0; r < count; ++r) {
        std::memcpy(static_cast<unsigned char*>(to) + r * bytes,
                    static_cast<const unsigned char*>(given.rows) + (first + r) / given.repeat * bytes,
                    static_cast<std::size_t>(bytes));
      }
    };
    return {};
  }

  void run(TransformCall<T> call, std::int64_t rows, const Execution& how) const {
    if (rows == 0) return;
    const FloatMode mode;  // of rows that are standardized on the host
    const OnDevice on(flow_->index());
    if (how.device_arrays) {
      const TransformPlan plan = flow_->plan(rows);
      void* workspace = workspaces_.get(stream_of(how), plan.workspace_bytes);
      const Reading packed(packed_);
      if (call.is_of_data()) require_narrow(*packed, how);
      TransformCall<T> whole = call;
      whole.rows = rows;
      whole.context = context_on_device(how, rows);
      return flow_->transform(plan, packed->program(), whole, workspace, stream_of(how));
    }
    const Lanes::Loan lane(lanes_);
    const Reading packed(packed_);
    const bool wide = call.is_of_data() && is_wide(*packed, how);
    const Program<T>& program = wide ? packed->rest() : packed->program();
    Lane::Inputs inputs = inputs_of(call);
    Lane::Outputs outputs = outputs_of(call);
    call.context = stage_context(*lane, how, rows, inputs);
    if (wide && call.inverse) {
      outputs[0].take = restoring(*packed, call.out, how);
    } else if (wide) {
      inputs[0].make = standardizing(*packed, call.in, nullptr, how);
    }
    TransformPlan plan;
    void* workspace = nullptr;
    lane->run(inputs, outputs, nullptr, rows, how.threads, [&](const Lane::Chunk& chunk) {
      if (chunk.first_row == 0) {
        plan = flow_->plan(chunk.rows);
        workspace = lane->workspace(plan.workspace_bytes);
      }
      TransformCall<T> part = on_chunk(call, chunk);
      part.first_row += static_cast<std::uint64_t>(chunk.first_row);
      flow_->transform(plan, program, part, workspace, lane->stream());
    });
  }

  /// Sum of log p where the call is one of the NLL.
  double run_gradient(GradientCall<T> call, const std::int64_t* index, std::int64_t rows, const Execution& how) const {
    call.grad_context = static_cast<T*>(how.context.gradient);
    const OnDevice on(flow_->index());
    const FloatMode mode;  // of rows that are standardized on the host
    if (rows == 0) {
      clear_gradient(call, how);
      return 0;
    }
    return how.device_arrays ? gradient_on_device(call, index, rows, how) : gradient_on_host(call, index, rows, how);
  }

  /// Of no rows.
  void clear_gradient(const GradientCall<T>& call, const Execution& how) const {
    if (call.gradient == nullptr || call.accumulate) return;
    if (how.device_arrays) {
      fill_zero(call.gradient, flow_->parameter_bytes(), stream_of(how));
    } else {
      std::memset(call.gradient, 0, static_cast<std::size_t>(flow_->parameter_bytes()));
    }
  }

  double gradient_on_device(const GradientCall<T>& call, const std::int64_t* index, std::int64_t rows,
                            const Execution& how) const {
    const Stream stream = stream_of(how);
    const GradientPlan plan = flow_->gradient_plan(rows);
    void* workspace = workspaces_.get(stream, plan.workspace_bytes);
    GradientCall<T> whole = call;
    whole.index = index;
    whole.rows = rows;
    whole.context = context_on_device(how, rows);
    if (!call.nll) {
      const Reading packed(packed_);
      if (!call.inverse) require_narrow(*packed, how);
      flow_->gradient(plan, packed->program(), whole, workspace, stream);
      return 0;
    }
    const Lanes::Loan lane(lanes_);
    whole.sum_log_prob = lane->sum();
    {
      const Reading packed(packed_);
      require_narrow(*packed, how);
      flow_->gradient(plan, packed->program(), whole, workspace, stream);
    }
    synchronize(stream);
    return lane->read_sum();
  }

  double gradient_on_host(GradientCall<T> call, const std::int64_t* index, std::int64_t rows,
                          const Execution& how) const {
    const Lanes::Loan lane(lanes_);
    const Reading packed(packed_);
    const bool wide = !call.inverse && is_wide(*packed, how);
    const Program<T>& program = wide ? packed->rest() : packed->program();
    T* gradient = nullptr;
    std::vector<T> before;  // the gradient of the mean, which is formed for standardized rows
    if (call.gradient != nullptr) {
      gradient = static_cast<T*>(lane->result(flow_->parameter_bytes()));
      if (wide && call.accumulate) {
        before.assign(call.gradient, call.gradient + flow_->features());
        std::fill_n(call.gradient, flow_->features(), T(0));
      }
      if (call.accumulate) lane->send(gradient, call.gradient, flow_->parameter_bytes());
    }
    double* sum = lane->sum();
    GradientPlan plan;
    std::int64_t plan_bytes = 0;
    unsigned char* workspace = nullptr;
    Lane::Inputs inputs = inputs_of(call);
    Lane::Outputs outputs = outputs_of(call);
    inputs[Lane::kWeights] = weights_of(call.weights.weights);
    call.context = stage_context(*lane, how, rows, inputs);
    if (wide) {
      inputs[0].make = standardizing(*packed, call.in, index, how);
      outputs[0].take = [&](std::int64_t first, std::int64_t count, const void* from) {
        T* to = call.grad_in + first * flow_->features();
        std::memcpy(to, from, static_cast<std::size_t>(count * flow_->row_bytes()));
        scale_gradient(*packed, to, count);
      };
    }
    lane->run(inputs, outputs, index, rows, how.threads, [&](const Lane::Chunk& chunk) {
      if (chunk.first_row == 0) {
        plan = flow_->gradient_plan(chunk.rows);
        plan_bytes = round_up(plan.workspace_bytes, 256);
        workspace = static_cast<unsigned char*>(lane->workspace(plan_bytes + sum_workspace_bytes(1)));
      }
      GradientCall<T> part = on_chunk(call, chunk);
      part.weights = weights_of(chunk);
      part.gradient = gradient;
      part.accumulate = call.accumulate || chunk.first_row > 0;
      part.sum_log_prob = call.nll ? sum + 1 : nullptr;
      flow_->gradient(plan, program, part, workspace, lane->stream());
      if (!call.nll) return;
      launch_on(lane->stream(), "adding up log-densities",
                [sum, first = chunk.first_row == 0, space = workspace + plan_bytes, s = lane->stream()] {
                  return launch_sum<double>(sum + 1, {}, 1, !first, sum, space, s);
                });
    });
    if (gradient != nullptr) lane->receive(call.gradient, gradient, flow_->parameter_bytes());
    if (gradient != nullptr && wide) {
      scale_gradient(*packed, call.gradient, 1);
      for (std::size_t j = 0; j < before.size(); ++j) call.gradient[j] += before[j];
    }
    return call.nll ? lane->read_sum() : 0;
  }

  std::shared_ptr<const DeviceFlow<T>> flow_;
  LeftRight<Packed<T>> packed_;
  mutable Lanes lanes_;
  mutable StreamWorkspaces workspaces_;
};

}  // namespace
}  // namespace cuda

std::string cuda_why_unavailable() {
  try {
    std::string problem = cuda::driver_problem();
    for (int i = 0; problem.empty() && i < cuda::device_count(); ++i) {
      const std::string why = cuda::architecture_problem(i, cuda::probe_kernels);
      if (why.empty()) return {};
      if (i + 1 == cuda::device_count()) problem = why;
    }
    return problem;
  } catch (const Error& error) {  // a forked child, or a device that fails
    return error.what();
  }
}

int cuda_device_count() { return cuda::device_count(); }

namespace {

void check_index(int index) {
  const int count = cuda::device_count();
  if (index >= 0 && index < count) return;
  throw Error(ErrorCode::invalid_argument,
              "device is 'cuda:" + std::to_string(index) + "', but this process sees " + std::to_string(count) +
                  (count == 1 ? " CUDA device" : " CUDA devices") +
                  (count == 0 ? "" : ", cuda:0" + (count == 1 ? "" : " to cuda:" + std::to_string(count - 1))));
}

}  // namespace

std::string cuda_device_name(int index) {
  const std::string problem = cuda::driver_problem();
  if (!problem.empty()) throw Error(ErrorCode::device, "CUDA cannot be used: " + problem);
  check_index(index);
  return cuda::device_name(index);
}

std::unique_ptr<Backend> make_cuda_backend(const FlowSpec& spec, const ParamLayout& layout, int device_index,
                                           Precision precision) {
  const auto refuse = [](const std::string& why) {
    if (!why.empty()) throw Error(ErrorCode::device, "CUDA cannot be used: " + why);
  };
  refuse(cuda::driver_problem());
  check_index(device_index);
  refuse(cuda::architecture_problem(device_index, cuda::probe_kernels));
  if (spec.dtype == DType::float32) {
    return std::make_unique<cuda::CudaBackend<float>>(spec, layout, device_index, precision);
  }
  return std::make_unique<cuda::CudaBackend<double>>(spec, layout, device_index, precision);
}

}  // namespace nvpflow
