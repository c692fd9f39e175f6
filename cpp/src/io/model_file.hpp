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

/// Throws Error(invalid_argument) unless there are as many names as columns, or none, distinct where they are not
/// empty, in UTF-8 and short enough for a file. what: "column_names" or "context_names".
void check_names(const std::string& what, const std::vector<std::string>& names, std::int64_t columns);
/// Throws Error(invalid_argument) where a column and a number of the context have one name, which tables would have
/// twice.
void check_names_differ(const std::vector<std::string>& columns, const std::vector<std::string>& context);
/// Throws Error(invalid_argument) unless log_prob is finite and the quantile a share or NaN.
void check_threshold(const Threshold& threshold);
/// Throws Error(invalid_argument) unless the text is empty or a JSON object that a file can hold.
void check_import_report(const std::string& text);
/// "" where the names agree or either side has none, else the first that differs. column: what one is called.
std::string difference(const std::string& column, const std::vector<std::string>& names,
                       const std::vector<std::string>& expected);

/// What goes with the parameters of a model; all of it may be empty.
struct ModelNotes {
  std::vector<std::string> column_names = {};
  std::vector<std::string> context_names = {};
  std::optional<Threshold> threshold = {};
  std::vector<float> mean_low = {};  // Flow::mean_low
  std::string import_report = {};    // Flow::import_report
};

/// parameters: ParamLayout::size() elements of spec.dtype, all finite (else Error(invalid_argument)).
void save_model(const std::string& path, const FlowSpec& spec, const ParamLayout& layout, const void* parameters,
                const ModelNotes& notes = {});

struct LoadedModel : ModelNotes {
  FlowSpec spec;
  std::vector<unsigned char> parameters;  // flat, ParamLayout order, spec.dtype
};
/// expected: null, or the spec the file must have (metadata), or is to be read with (tensors only).
LoadedModel load_model(const std::string& path, const FlowSpec* expected);

}  // namespace nvpflow
