// A training run on arrays of the host, with packed parameters of its own.
#pragma once

#include <memory>

#include <nvpflow/spec.hpp>

#include "../training.hpp"

namespace nvpflow::cpu {

template <class T>
std::unique_ptr<Training> make_training(const FlowSpec& spec, const ParamLayout& layout, const TrainingData& data,
                                        const void* parameters, int threads);

}  // namespace nvpflow::cpu
