// A flow on one device, without its parameters: what inference and training share.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include <nvpflow/device.hpp>
#include <nvpflow/spec.hpp>

#include "packed.hpp"

namespace nvpflow::cuda {

template <class T>
class DeviceFlow {
 public:
  /// On a device that exists and that this build has code for.
  DeviceFlow(const FlowSpec& spec, const ParamLayout& layout, int index, Precision precision);

  const FlowSpec& spec() const { return spec_; }
  const ParamLayout& layout() const { return layout_; }
  int index() const { return index_; }
  std::int64_t features() const { return spec_.input_size; }
  std::int64_t context_size() const { return spec_.context_size; }
  std::int64_t context_bytes() const { return spec_.context_size * static_cast<std::int64_t>(sizeof(T)); }
  std::int64_t row_bytes() const { return spec_.input_size * static_cast<std::int64_t>(sizeof(T)); }
  std::int64_t parameter_bytes() const { return layout_.size() * static_cast<std::int64_t>(sizeof(T)); }
  const std::shared_ptr<const Layers<T>>& layers() const { return layers_; }

  TransformPlan plan(std::int64_t rows) const;
  GradientPlan gradient_plan(std::int64_t rows) const;
  void transform(const TransformPlan& plan, const Program<T>& program, const TransformCall<T>& call, void* workspace,
                 Stream stream) const;
  void gradient(const GradientPlan& plan, const Program<T>& program, const GradientCall<T>& call, void* workspace,
                Stream stream) const;

 private:
  const FlowSpec spec_;
  const ParamLayout layout_;
  int index_;
  Device properties_;
  TransformOptions<T> transform_options_;
  GradientOptions<T> gradient_options_;
  std::shared_ptr<const Layers<T>> layers_;
  std::map<std::int32_t, Memory> tasks_;  // by the rows of a tile
};

}  // namespace nvpflow::cuda
