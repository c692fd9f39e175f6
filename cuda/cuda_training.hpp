// A training run whose data, parameters, gradient and moments stay on the device from the first step to the last.
#pragma once

#include <memory>

#include "../cpp/src/training.hpp"
#include "device_flow.hpp"

namespace nvpflow::cuda {

template <class T>
std::unique_ptr<Training> make_training(std::shared_ptr<const DeviceFlow<T>> flow, const TrainingData& data,
                                        const void* parameters, std::int64_t slice_rows);

}  // namespace nvpflow::cuda
