#include "device_flow.hpp"

#include <cstddef>
#include <cstdint>
#include <vector>

#include <nvpflow/device.hpp>
#include <nvpflow/spec.hpp>

#include "kernels.hpp"
#include "packed.hpp"
#include "runtime.hpp"

namespace nvpflow::cuda {
namespace {

/// From here on the tiles of a gradient grow no more on any device.
constexpr std::int64_t kMostRows = 1 << 24;

template <class Call>
void require_rows_on_device(Call call, std::int64_t features, std::int64_t context) {
  for (const auto& array : call.rows_in(features)) require_on_device({*array.at});
  for (const auto& array : call.rows_out(features, context)) require_on_device({*array.at});
  require_on_device({call.context.rows});
}

}  // namespace

template <class T>
DeviceFlow<T>::DeviceFlow(const FlowSpec& spec, const ParamLayout& layout, int index, Precision precision)
    : spec_(spec), layout_(layout), index_(index) {
  const OnDevice on(index);
  properties_ = device_properties(index);
  check(prepare_kernels(properties_), "preparing the kernels");
  transform_options_.precision = gradient_options_.precision = precision;
  const OwnedStream stream;
  layers_ = std::make_shared<const Layers<T>>(spec, layout, stream);
  // Where the tasks find things on the tape depends on the rows of a tile, which depend on those of the call.
  for (std::int64_t rows = 1; rows <= kMostRows; rows *= 2) {
    const GradientPlan plan = gradient_plan(rows);
    if (tasks_.contains(plan.tile_rows)) continue;
    std::vector<GradientTask> tasks(static_cast<std::size_t>(gradient_tasks<T>(layers_->on_host(), plan, nullptr)));
    gradient_tasks<T>(layers_->on_host(), plan, tasks.data());
    upload(tasks_.try_emplace(plan.tile_rows, Memory::Kind::device).first->second, tasks.data(),
           static_cast<std::int64_t>(tasks.size() * sizeof(GradientTask)), "the flow's layers", stream);
  }
}

template <class T>
TransformPlan DeviceFlow<T>::plan(std::int64_t rows) const {
  return plan_transform<T>(layers_->on_host(), properties_, rows, transform_options_);
}

template <class T>
GradientPlan DeviceFlow<T>::gradient_plan(std::int64_t rows) const {
  return plan_gradient<T>(layers_->on_host(), properties_, rows, gradient_options_);
}

template <class T>
void DeviceFlow<T>::transform(const TransformPlan& plan, const Program<T>& program, const TransformCall<T>& call,
                              void* workspace, Stream stream) const {
  require_on_device({program.packed, program.layers, program.dense, program.places, call.index, workspace});
  require_rows_on_device(call, features(), context_size());
  launch_on(stream, "running a flow", [plan, program, call, workspace, stream] {
    return launch_transform(plan, program, call, workspace, stream);
  });
}

template <class T>
void DeviceFlow<T>::gradient(const GradientPlan& plan, const Program<T>& program, const GradientCall<T>& call,
                             void* workspace, Stream stream) const {
  const auto* tasks = static_cast<const GradientTask*>(tasks_.at(plan.tile_rows).data());
  require_on_device({program.packed, program.transposed, program.layers, program.dense, program.places, program.source,
                     tasks, call.index, call.gradient, call.sum_log_prob, workspace});
  require_rows_on_device(call, features(), context_size());
  launch_on(stream, "forming a gradient", [plan, program, tasks, call, workspace, stream] {
    return launch_gradient(plan, program, tasks, call, workspace, stream);
  });
}

template class DeviceFlow<float>;
template class DeviceFlow<double>;

}  // namespace nvpflow::cuda
