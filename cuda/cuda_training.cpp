#include "cuda_training.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include <nvpflow/error.hpp>
#include <nvpflow/spec.hpp>

#include "../cpp/src/backend.hpp"
#include "../cpp/src/row_order.hpp"
#include "../cpp/src/training.hpp"
#include "device_flow.hpp"
#include "kernels.hpp"
#include "runtime.hpp"
#include "training_steps.hpp"

namespace nvpflow::cuda {
namespace {

/// Arithmetic between two reports: milliseconds on a large device, a few tenths of a second on a small one.
constexpr double kReportFlops = 4e10;
constexpr std::int64_t kMaxQueuedSteps = 256;

template <class T>
class CudaTraining final : public Training {
 public:
  CudaTraining(std::shared_ptr<const DeviceFlow<T>> flow, const TrainingData& data, const void* parameters,
               std::int64_t slice_rows)
      : flow_(std::move(flow)), slice_rows_(slice_rows), packed_(flow_->layers()) {
    const std::int64_t size = flow_->parameter_bytes();
    upload(x_, data.x, data.rows * flow_->row_bytes(), "the training rows", stream_);
    upload(validation_, data.validation, data.validation_rows * flow_->row_bytes(), "the validation rows", stream_);
    upload(context_, data.context, context_bytes(data.context, data.rows), "the contexts", stream_);
    upload(validation_context_, data.validation_context, context_bytes(data.validation_context, data.validation_rows),
           "the validation rows' contexts", stream_);
    upload(weights_, data.weights, weight_bytes(data.weights, data.rows), "the rows' weights", stream_);
    upload(validation_weights_, data.validation_weights, weight_bytes(data.validation_weights, data.validation_rows),
           "the validation rows' weights", stream_);
    upload(parameters_, parameters, size, "parameters", stream_);
    for (Memory* zeroed : {&first_moment_, &second_moment_}) {
      fill_zero(zeroed->reserve(size, "the optimiser's moments"), size, stream_);
    }
    gradient_.reserve(size, "the gradient");
    fill_zero(state_.reserve(sizeof(StepState), "a step's state"), sizeof(StepState), stream_);
    host_state_.reserve(sizeof(StepState), "a step's state");
    upload_updates();
    reserve_for(slice_rows_);
    packed_.pack(values(parameters_), Matrices::of_forward, stream_);
    synchronize(static_cast<Stream>(stream_));
  }

  ~CudaTraining() override {
    try {
      const OnDevice on(flow_->index());
      synchronize(static_cast<Stream>(stream_));
    } catch (const Error&) {  // a failed device or a forked child: nothing to wait for
    }
  }

  void gradient(const RowOrder& order, std::int64_t first, std::int64_t count, std::int64_t total_rows,
                bool accumulate) override {
    const OnDevice on(flow_->index());
    if (!accumulate) slices_ = 0;
    batch_rows_ = total_rows;
    reserve_for(count);
    reserve_sums(slices_ + 1, total_rows);
    order_rows(order, first, count);
    GradientCall<T> call;
    call.in = values(x_);
    call.index = index();
    call.rows = count;
    call.context.rows = values(context_);
    call.nll = true;
    call.nll_factor = 1.0 / static_cast<double>(total_rows);
    call.weights = by_index(weights_);
    call.gradient = values(gradient_);
    call.accumulate = accumulate;
    call.sum_log_prob = sums() + slices_++;
    flow_->gradient(gradient_plan_, packed_.program(), call, workspace_.data(), stream_);
  }

  HostGradient read_gradient() override {
    const OnDevice on(flow_->index());
    download(host_gradient_, gradient_);
    const std::int64_t bytes = slices_ * static_cast<std::int64_t>(sizeof(double));
    host_sums_.reserve(std::max<std::int64_t>(bytes, 1), "the loss");
    if (bytes > 0) copy_to_host(host_sums_.data(), sums_.data(), bytes, stream_);
    synchronize(static_cast<Stream>(stream_));
    const auto* values = static_cast<const double*>(host_sums_.data());
    return {host_gradient_.data(), std::accumulate(values, values + slices_, 0.0)};
  }

  void write_gradient(double sum_log_prob, std::int64_t total_rows) override {
    const OnDevice on(flow_->index());
    slices_ = 1, batch_rows_ = total_rows;
    reserve_sums(slices_, total_rows);
    copy_to_device(gradient_.data(), host_gradient_.data(), flow_->parameter_bytes(), stream_);
    upload(sums_, &sum_log_prob, sizeof sum_log_prob, "the loss", stream_);
    synchronize(static_cast<Stream>(stream_));
  }

  void update(const AdamStep& step, double clip_norm) override {
    const OnDevice on(flow_->index());
    StepState* state = step_state();
    for (std::size_t i = 0; i < trained_.size(); ++i) {
      launch_on(stream_, "measuring a gradient", [this, state, range = trained_[i], first = i == 0] {
        return launch_sum_of_squares(values(gradient_) + range.first, range.second, !first, &state->norm_squared,
                                     workspace_.data(), stream_);
      });
    }
    launch_on(stream_, "judging a step", [this, state, slices = slices_, rows = batch_rows_, number = step.step] {
      return launch_judge(state, sums(), slices, rows, number, stream_);
    });
    AdamCall<T> call;
    call.coefficients = coefficients(step);
    call.norm_squared = &state->norm_squared;
    call.clip_norm = clip_norm;
    call.updates = static_cast<const Update*>(updates_.data());
    call.count = flow_->layout().size();
    call.gradient = values(gradient_);
    call.first_moment = values(first_moment_);
    call.second_moment = values(second_moment_);
    call.parameters = values(parameters_);
    launch_on(stream_, "updating parameters", [this, call] { return launch_adam(call, stream_); });
    packed_.pack(values(parameters_), Matrices::of_forward, stream_);
  }

  void add_log_prob(bool validation, const RowOrder& order, std::int64_t first, std::int64_t count) override {
    const OnDevice on(flow_->index());
    reserve_for(count);
    order_rows(order, first, count);
    TransformCall<T> call;
    call.in = values(validation ? validation_ : x_);
    call.index = index();
    call.rows = count;
    call.context.rows = values(validation ? validation_context_ : context_);
    call.log_prob = values(log_prob_);
    flow_->transform(transform_plan_, packed_.program(), call, workspace_.data(), stream_);
    launch_on(stream_, "adding up log-densities",
              [this, weights = by_index(validation ? validation_weights_ : weights_), count] {
                return launch_sum<T>(values(log_prob_), weights, count, true, &step_state()->sum_log_prob,
                                     workspace_.data(), stream_);
              });
  }

  TrainingReport report() override {
    const OnDevice on(flow_->index());
    copy_to_host(host_state_.data(), state_.data(), sizeof(StepState), stream_);
    fill_zero(&step_state()->sum_log_prob, sizeof(double), stream_);
    synchronize(static_cast<Stream>(stream_));
    StepState state;
    std::memcpy(&state, host_state_.data(), sizeof state);
    return {state.sum_log_prob, state.gradient_norm, state.bad_step, state.bad_loss != 0, state.bad_value};
  }

  std::int64_t steps_per_report() const override {
    // Forward and back.
    const double flops = 3 * flow_->layout().flops_per_row();
    const double steps = kReportFlops / std::max(1.0, flops * static_cast<double>(slice_rows_));
    return std::clamp<std::int64_t>(static_cast<std::int64_t>(steps), 1, kMaxQueuedSteps);
  }

  Arrays read(bool moments) override {
    const OnDevice on(flow_->index());
    download(host_parameters_, parameters_);
    if (moments) {
      download(host_first_moment_, first_moment_);
      download(host_second_moment_, second_moment_);
    }
    return {host_parameters_.data(), host_first_moment_.data(), host_second_moment_.data()};
  }

  void write() override {
    const OnDevice on(flow_->index());
    const std::int64_t size = flow_->parameter_bytes();
    upload(parameters_, host_parameters_.data(), size, "parameters", stream_);
    upload(first_moment_, host_first_moment_.data(), size, "the optimiser's moments", stream_);
    upload(second_moment_, host_second_moment_.data(), size, "the optimiser's moments", stream_);
    packed_.pack(values(parameters_), Matrices::of_forward, stream_);
  }

 private:
  static T* values(const Memory& memory) { return static_cast<T*>(memory.data()); }
  std::int64_t* index() const { return static_cast<std::int64_t*>(index_.data()); }
  double* sums() const { return static_cast<double*>(sums_.data()); }
  StepState* step_state() const { return static_cast<StepState*>(state_.data()); }

  std::int64_t context_bytes(const void* context, std::int64_t rows) const {
    return context == nullptr ? 0 : rows * flow_->context_bytes();
  }

  static std::int64_t weight_bytes(const double* weights, std::int64_t rows) {
    return weights == nullptr ? 0 : rows * static_cast<std::int64_t>(sizeof(double));
  }
  /// Of the rows that index() holds; none where the memory holds nothing.
  RowWeights by_index(const Memory& weights) const {
    const auto* values = static_cast<const double*>(weights.data());
    return values == nullptr ? RowWeights{} : RowWeights{values, index()};
  }

  /// What each parameter's update is, and the runs of parameters that are trained at all.
  void upload_updates() {
    std::vector<Update> updates(static_cast<std::size_t>(flow_->layout().size()), Update::none);
    for (const TensorInfo& t : flow_->layout().tensors()) {
      if (!t.trained) continue;
      const Update update = t.decayed ? Update::decayed : Update::plain;
      std::fill_n(updates.begin() + t.offset, t.size, update);
      if (!trained_.empty() && trained_.back().first + trained_.back().second == t.offset) {
        trained_.back().second += t.size;
      } else {
        trained_.emplace_back(t.offset, t.size);
      }
    }
    upload(updates_, updates.data(), static_cast<std::int64_t>(updates.size() * sizeof(Update)), "the optimiser's plan",
           stream_);
  }

  /// Memory and plans for slices of so many rows.
  void reserve_for(std::int64_t rows) {
    if (rows <= reserved_rows_) return;
    synchronize(static_cast<Stream>(stream_));
    transform_plan_ = flow_->plan(rows);
    gradient_plan_ = flow_->gradient_plan(rows);
    const std::int64_t sum = sum_workspace_bytes(std::max(rows, flow_->layout().size()));
    workspace_.reserve(std::max({transform_plan_.workspace_bytes, gradient_plan_.workspace_bytes, sum}),
                       "the kernels' workspace");
    index_.reserve(rows * static_cast<std::int64_t>(sizeof(std::int64_t)), "the order of the rows");
    log_prob_.reserve(rows * static_cast<std::int64_t>(sizeof(T)), "log-densities");
    reserved_rows_ = rows;
  }

  /// One sum for each slice of a batch; a batch has as many as its first slice says.
  void reserve_sums(std::int64_t slices, std::int64_t batch_rows) {
    const std::int64_t most = std::max(slices, ceil_div(batch_rows, std::max<std::int64_t>(1, slice_rows_)));
    sums_.reserve(most * static_cast<std::int64_t>(sizeof(double)), "the loss");
  }

  void order_rows(const RowOrder& order, std::int64_t first, std::int64_t count) {
    launch_on(stream_, "ordering rows",
              [this, order, first, count] { return launch_row_order(order, first, count, index(), stream_); });
  }

  void download(Memory& to, const Memory& from) {
    to.reserve(flow_->parameter_bytes(), "a copy of the parameters");
    copy_to_host(to.data(), from.data(), flow_->parameter_bytes(), stream_);
    synchronize(static_cast<Stream>(stream_));
  }

  std::shared_ptr<const DeviceFlow<T>> flow_;
  std::int64_t slice_rows_, reserved_rows_ = 0;
  OwnedStream stream_;
  Packed<T> packed_;
  TransformPlan transform_plan_;
  GradientPlan gradient_plan_;
  Memory x_{Memory::Kind::device}, validation_{Memory::Kind::device};
  Memory context_{Memory::Kind::device}, validation_context_{Memory::Kind::device};
  Memory weights_{Memory::Kind::device}, validation_weights_{Memory::Kind::device};
  Memory parameters_{Memory::Kind::device}, gradient_{Memory::Kind::device};
  Memory first_moment_{Memory::Kind::device}, second_moment_{Memory::Kind::device}, updates_{Memory::Kind::device};
  Memory index_{Memory::Kind::device}, log_prob_{Memory::Kind::device}, workspace_{Memory::Kind::device};
  Memory sums_{Memory::Kind::device}, state_{Memory::Kind::device}, host_state_{Memory::Kind::pinned};
  Memory host_parameters_{Memory::Kind::pinned}, host_first_moment_{Memory::Kind::pinned},
      host_second_moment_{Memory::Kind::pinned}, host_gradient_{Memory::Kind::pinned}, host_sums_{Memory::Kind::pinned};
  std::vector<std::pair<std::int64_t, std::int64_t>> trained_;  // (offset, count)
  std::int64_t slices_ = 0, batch_rows_ = 1;
};

}  // namespace

template <class T>
std::unique_ptr<Training> make_training(std::shared_ptr<const DeviceFlow<T>> flow, const TrainingData& data,
                                        const void* parameters, std::int64_t slice_rows) {
  const OnDevice on(flow->index());
  return std::make_unique<CudaTraining<T>>(std::move(flow), data, parameters, slice_rows);
}

template std::unique_ptr<Training> make_training(std::shared_ptr<const DeviceFlow<float>>, const TrainingData&,
                                                 const void*, std::int64_t);
template std::unique_ptr<Training> make_training(std::shared_ptr<const DeviceFlow<double>>, const TrainingData&,
                                                 const void*, std::int64_t);

}  // namespace nvpflow::cuda
