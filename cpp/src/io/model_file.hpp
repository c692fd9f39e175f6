// Model files: a spec, its parameters, and what goes with them. python/docs/file_format.md defines the format: change
// both together.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <nvpflow/spec.hpp>
#include <nvpflow/threshold.hpp>

namespace nvpflow {

/// Throws Error(invalid_argument) unless there is one name for each column, or none, in UTF-8 and short enough for a
/// file.
void check_column_names(const std::vector<std::string>& names, std::int64_t input_size);
/// Throws Error(invalid_argument) unless log_prob is finite and the quantile a share or NaN.
void check_threshold(const Threshold& threshold);
/// "" where the names agree or either side has none, else the first that differs.
std::string difference(const std::vector<std::string>& names, const std::vector<std::string>& expected);

/// parameters: ParamLayout::size() elements of spec.dtype, all finite (else Error(invalid_argument)).
/// column_names: one for each column, or none. mean_low: Flow::mean_low, or empty.
void save_model(const std::string& path, const FlowSpec& spec, const ParamLayout& layout, const void* parameters,
                const std::vector<std::string>& column_names = {}, const std::optional<Threshold>& threshold = {},
                const std::vector<float>& mean_low = {});

struct LoadedModel {
  FlowSpec spec;
  std::vector<unsigned char> parameters;  // flat, ParamLayout order, spec.dtype
  std::vector<std::string> column_names;  // empty: the file has none
  std::optional<Threshold> threshold;
  std::vector<float> mean_low;  // empty: the file has none
};
/// expected: null, or the spec the file must have (metadata), or is to be read with (tensors only).
LoadedModel load_model(const std::string& path, const FlowSpec* expected);

}  // namespace nvpflow
