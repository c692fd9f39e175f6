#include "model_file.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <new>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/spec.hpp>
#include <nvpflow/spec_json.hpp>
#include <nvpflow/threshold.hpp>
#include <nvpflow/version.hpp>

#include "../float_mode.hpp"
#include "../layers/layer.hpp"
#include "messages.hpp"
#include "metadata_json.hpp"
#include "safetensors.hpp"
#include "spec_json.hpp"

namespace nvpflow {

using namespace io;
using nlohmann::json;

namespace {

constexpr const char* kVersionKey = "nvpflow.format_version";
constexpr const char* kLibraryKey = "nvpflow.library_version";
constexpr const char* kDTypeKey = "nvpflow.dtype";
constexpr const char* kSpecKey = "nvpflow.spec";
constexpr const char* kColumnNamesKey = "nvpflow.column_names";
constexpr const char* kContextNamesKey = "nvpflow.context_names";
constexpr const char* kThresholdKey = "nvpflow.threshold";
constexpr const char* kImportReportKey = "nvpflow.import_report";
constexpr std::uint32_t kMajorVersion = 1;

/// Throws where the file's format is not one this library reads.
void check_version(const std::string& path, const std::map<std::string, std::string>& metadata) {
  const auto found = metadata.find(kVersionKey);
  if (found == metadata.end()) fail_format(path, std::string("metadata key ") + kVersionKey + " is missing");
  const std::string& text = found->second;
  std::uint32_t major = 0;
  std::uint32_t minor = 0;
  const char* const end = text.data() + text.size();
  auto parsed = std::from_chars(text.data(), end, major);
  const bool has_point = parsed.ec == std::errc{} && parsed.ptr != end && *parsed.ptr == '.';
  if (has_point) parsed = std::from_chars(parsed.ptr + 1, end, minor);
  if (!has_point || parsed.ec != std::errc{} || parsed.ptr != end) {
    fail_format(path, std::string(kVersionKey) + " is " + quote(text) + ", expected MAJOR.MINOR");
  }
  if (major == kMajorVersion) return;
  const auto library = metadata.find(kLibraryKey);
  fail_format(path, std::string(kVersionKey) + " is " + text + " (written by nvpflow " +
                        (library == metadata.end() ? "of an unknown version" : quote(library->second)) +
                        "), expected " + std::to_string(kMajorVersion) + ".x: this is nvpflow " + version());
}

/// A tree: whoever writes a file chooses the names, and could choose them so that a hash table's all collide.
using TensorsByName = std::map<std::string_view, const StoredTensor*>;

/// The named kernel, or null. Throws where it is not a matrix.
const StoredTensor* find_kernel(const std::string& path, const TensorsByName& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  if (found == tensors.end()) return nullptr;
  if (found->second->shape.size() != 2) {
    fail_format(path, "tensor " + quote(name) + " has shape " + text_of(found->second->shape) +
                          ", expected two sizes, [inputs, outputs]");
  }
  return found->second;
}

/// The spec of a file of tensors without metadata. Contradictions show when the tensors are matched with its layout.
FlowSpec infer_spec(const std::string& path, const TensorsByName& tensors) {
  FlowSpec spec;
  for (std::size_t k = 0;; ++k) {
    const std::string name = "flow_" + std::to_string(k);
    const StoredTensor* const scale = find_kernel(path, tensors, name + "_scale.kernel");
    if (scale == nullptr) break;
    Coupling layer;
    if (k % 2 == 1) layer.transformed.name = FeatureSet::Name::first_half;
    const StoredTensor* first = scale;
    for (std::size_t j = 0;; ++j) {
      const StoredTensor* const dense =
          find_kernel(path, tensors, name + "_coupling_dense_" + std::to_string(j) + ".kernel");
      if (dense == nullptr) break;
      if (j == 0) first = dense;
      layer.network.hidden_sizes.push_back(dense->shape[1]);
    }
    spec.layers.emplace_back(std::move(layer));
    if (k > 0) continue;
    spec.dtype = scale->dtype;
    if (__builtin_add_overflow(first->shape[0], scale->shape[1], &spec.input_size)) {
      fail_format(path,
                  "tensor " + quote(first->name) + " has shape " + text_of(first->shape) + ", which is too large");
    }
  }
  if (spec.layers.empty()) {
    fail_format(
        path, std::string("no metadata key ") + kSpecKey + " and no tensor 'flow_0_scale.kernel': not a RealNVP model");
  }
  try {
    spec.validate();
  } catch (const Error& error) {
    fail_format(path, std::string("the spec that the tensors' shapes give is not valid: ") + error.what());
  }
  return spec;
}

FlowSpec spec_of(const ContainerReader& file, const TensorsByName& tensors, const FlowSpec* expected) {
  const std::map<std::string, std::string>& metadata = file.metadata();
  const auto text = metadata.find(kSpecKey);
  if (text == metadata.end() && !metadata.contains(kVersionKey)) {
    return expected != nullptr ? *expected : infer_spec(file.path(), tensors);
  }
  check_version(file.path(), metadata);
  if (text == metadata.end()) fail_format(file.path(), std::string("metadata key ") + kSpecKey + " is missing");
  FlowSpec spec;
  try {
    spec = parse_spec(text->second);
  } catch (const Error& error) {
    fail_format(file.path(), std::string(kSpecKey) + ": " + error.what());
  }
  const auto dtype = metadata.find(kDTypeKey);
  if (dtype == metadata.end() || dtype->second != name_of(spec.dtype)) {
    fail_format(file.path(), std::string("metadata key ") + kDTypeKey + " is " +
                                 (dtype == metadata.end() ? "missing" : quote(dtype->second)) + ", expected '" +
                                 std::string(name_of(spec.dtype)) + "' as in " + kSpecKey);
  }
  const std::string difference_found = expected != nullptr ? difference(spec, *expected, "the file") : "";
  if (!difference_found.empty()) fail_format(file.path(), difference_found);
  return spec;
}

/// The names under a key, one for each of so many columns; none where the file has not the key.
std::vector<std::string> names_of(const ContainerReader& file, const char* key, std::int64_t columns) {
  const auto text = file.metadata().find(key);
  if (text == file.metadata().end()) return {};
  const auto fail = [&](const std::string& what) { fail_format(file.path(), std::string(key) + ": " + what); };
  json document;
  try {
    document = parse_metadata_json(text->second);
  } catch (const Error& error) {
    fail(error.what());
  }
  const std::string expected = "expected an array of " + std::to_string(columns) + " strings";
  if (!document.is_array()) fail("the text is not an array, " + expected);
  if (static_cast<std::int64_t>(document.size()) != columns) {
    fail("the array holds " + std::to_string(document.size()) + " values, " + expected);
  }
  std::vector<std::string> names;
  names.reserve(document.size());
  for (json& name : document) {
    if (!name.is_string()) fail("value " + std::to_string(names.size()) + " is not a string, " + expected);
    names.push_back(std::move(name.get_ref<std::string&>()));
  }
  try {
    check_names("the array", names, columns);
  } catch (const Error& error) {
    fail(error.what());
  }
  return names;
}

Threshold threshold_from_json(const std::string& text) {
  const json document = parse_metadata_json(text);
  if (!document.is_object()) throw Error(ErrorCode::file_format, "the text is not an object");
  check_keys(document, "", {"log_prob", "quantile"});
  Threshold threshold;
  threshold.log_prob = number_of(document["log_prob"], "log_prob");
  if (!document["quantile"].is_null()) threshold.quantile = number_of(document["quantile"], "quantile");
  check_threshold(threshold);
  return threshold;
}

std::optional<Threshold> threshold_of(const ContainerReader& file) {
  const auto text = file.metadata().find(kThresholdKey);
  if (text == file.metadata().end()) return std::nullopt;
  try {
    return threshold_from_json(text->second);
  } catch (const Error& error) {
    fail_format(file.path(), std::string(kThresholdKey) + ": " + error.what());
  }
}

/// Error(file_format) where the text is none.
void require_object(const std::string& text) {
  if (!parse_metadata_json(text).is_object()) throw Error(ErrorCode::file_format, "the text is not an object");
}

std::string import_report_of(const ContainerReader& file) {
  const auto text = file.metadata().find(kImportReportKey);
  if (text == file.metadata().end()) return "";
  try {
    require_object(text->second);
  } catch (const Error& error) {
    fail_format(file.path(), std::string(kImportReportKey) + ": " + error.what());
  }
  return text->second;
}

std::string threshold_to_json(const Threshold& threshold) {
  const bool known = !std::isnan(threshold.quantile);
  return json{{"log_prob", threshold.log_prob}, {"quantile", known ? json(threshold.quantile) : json()}}.dump();
}

/// As JSON text; Error(invalid_argument) where that cannot be.
std::string names_to_json(const std::string& what, const std::vector<std::string>& names) {
  std::string text;
  try {
    text = json(names).dump();
  } catch (const json::exception&) {
    throw Error(ErrorCode::invalid_argument, what + " holds a name that is not UTF-8");
  }
  if (text.size() > kMaxJsonBytes) {
    throw Error(ErrorCode::invalid_argument, what + " takes " + std::to_string(text.size()) +
                                                 " bytes as JSON, expected at most " + std::to_string(kMaxJsonBytes));
  }
  return text;
}

/// A few bytes of description can ask for thousands of tensors, each with a name, a shape and an offset: no layout is
/// made for a file that does not hold about as many.
void check_count(const std::string& path, const FlowSpec& spec, std::size_t held) {
  const std::int64_t wanted = layers::num_tensors(spec);
  constexpr std::size_t kAlwaysListed = 64;  // so that a message can name the one that is missing
  if (static_cast<std::size_t>(wanted) <= 2 * held + kAlwaysListed) return;
  fail_format(path, "the file holds " + std::to_string(held) + " tensors, expected the " + std::to_string(wanted) +
                        " of its description");
}

/// Flow::mean_low as a tensor beside the layout's, "standardize_0.mean_low", which has the shape of the mean. Only
/// where takes_float64_rows.
TensorInfo mean_low_of(const ParamLayout& layout) {
  TensorInfo tensor = layout.tensors().front();
  tensor.name += "_low";
  return tensor;
}

/// Whether the file has that tensor, and may have it.
bool has_mean_low(const TensorsByName& tensors, const FlowSpec& spec, const ParamLayout& layout) {
  return takes_float64_rows(spec) && tensors.contains(mean_low_of(layout).name);
}

/// The layout's tensors, and behind them that one where the file has it.
std::vector<TensorInfo> wanted_tensors(const TensorsByName& tensors, const FlowSpec& spec, const ParamLayout& layout) {
  std::vector<TensorInfo> wanted = layout.tensors();
  if (has_mean_low(tensors, spec, layout)) wanted.push_back(mean_low_of(layout));
  return wanted;
}

/// The file holds the wanted tensors, each of the right shape and dtype, and no other.
void check_tensors(const ContainerReader& file, const TensorsByName& tensors, const std::vector<TensorInfo>& all,
                   DType dtype) {
  std::set<std::string_view> known;
  for (const TensorInfo& wanted : all) {
    known.insert(wanted.name);
    const std::string subject = "tensor " + quote(wanted.name);
    const std::string expected = ", expected " + std::string(name_of(dtype)) + " of shape " + text_of(wanted.shape);
    const auto found = tensors.find(wanted.name);
    if (found == tensors.end()) fail_format(file.path(), subject + " is missing" + expected);
    const StoredTensor& stored = *found->second;
    if (stored.shape == wanted.shape && stored.dtype == dtype) continue;
    fail_format(file.path(), subject + " is " + std::string(name_of(stored.dtype)) + " of shape " +
                                 text_of(stored.shape) + expected);
  }
  for (const StoredTensor& stored : file.tensors()) {
    if (!known.contains(stored.name)) {
      fail_format(file.path(), "tensor " + quote(stored.name) + " is not part of the model");
    }
  }
}

/// The first element that is NaN or infinite, or `size`.
template <class T>
std::int64_t first_not_finite(const void* values, std::int64_t size) {
  const T* const typed = static_cast<const T*>(values);
  return std::find_if(typed, typed + size, [](T value) { return !std::isfinite(value); }) - typed;
}

/// "" where all elements are finite.
std::string describe_not_finite(const TensorInfo& tensor, DType dtype, const void* values) {
  const std::int64_t index = dtype == DType::float32 ? first_not_finite<float>(values, tensor.size)
                                                     : first_not_finite<double>(values, tensor.size);
  if (index == tensor.size) return "";
  const double value =
      dtype == DType::float32 ? static_cast<const float*>(values)[index] : static_cast<const double*>(values)[index];
  return "tensor " + quote(tensor.name) + " of shape " + text_of(tensor.shape) + " holds " +
         (std::isnan(value) ? "NaN" : "an infinity") + " at index " + std::to_string(index) +
         " (row-major), expected finite numbers";
}

std::size_t byte_offset(const TensorInfo& tensor, DType dtype) {
  return static_cast<std::size_t>(tensor.offset * size_of(dtype));
}

}  // namespace

void check_names(const std::string& what, const std::vector<std::string>& names, std::int64_t columns) {
  if (!names.empty() && static_cast<std::int64_t>(names.size()) != columns) {
    throw Error(ErrorCode::invalid_argument,
                what + " holds " + std::to_string(names.size()) + " names, expected " +
                    (columns == 0 ? "none: the flow has no context" : std::to_string(columns) + " or none"));
  }
  std::map<std::string_view, std::size_t> first;
  for (std::size_t j = 0; j < names.size(); ++j) {
    const auto [known, is_new] = first.try_emplace(names[j], j);
    if (is_new || names[j].empty()) continue;
    throw Error(ErrorCode::invalid_argument, what + " holds " + quote(names[j]) + " twice, for columns " +
                                                 std::to_string(known->second + 1) + " and " + std::to_string(j + 1) +
                                                 ", expected a name for each");
  }
  names_to_json(what, names);
}

void check_names_differ(const std::vector<std::string>& columns, const std::vector<std::string>& context) {
  if (columns.empty() || context.empty()) return;
  const std::set<std::string_view> known(columns.begin(), columns.end());
  for (std::size_t j = 0; j < context.size(); ++j) {
    if (context[j].empty() || !known.contains(context[j])) continue;
    const auto column = std::find(columns.begin(), columns.end(), context[j]) - columns.begin();
    throw Error(ErrorCode::invalid_argument,
                quote(context[j]) + " is the name of column " + std::to_string(column + 1) + " and of context column " +
                    std::to_string(j + 1) + ", expected names that differ; rename one of them");
  }
}

void check_threshold(const Threshold& threshold) {
  if (!std::isfinite(threshold.log_prob)) {
    throw Error(ErrorCode::invalid_argument,
                "log_prob is " + std::to_string(threshold.log_prob) + ", expected a finite number of nats");
  }
  if (threshold.quantile < 0 || threshold.quantile > 1) {
    throw Error(ErrorCode::invalid_argument,
                "quantile is " + std::to_string(threshold.quantile) + ", expected a share of the rows in [0, 1]");
  }
}

void check_import_report(const std::string& text) {
  if (text.empty()) return;
  try {
    require_object(text);
  } catch (const Error& error) {
    throw Error(ErrorCode::invalid_argument, "import_report: " + std::string(error.what()) + ", expected JSON");
  }
}

std::string difference(const std::string& column, const std::vector<std::string>& names,
                       const std::vector<std::string>& expected) {
  for (std::size_t i = 0; i < std::min(names.size(), expected.size()); ++i) {
    if (names[i] != expected[i]) {
      return column + " " + std::to_string(i + 1) + " is " + quote(names[i]) + ", expected " + quote(expected[i]);
    }
  }
  return "";
}

void save_model(const std::string& path, const FlowSpec& spec, const ParamLayout& layout, const void* parameters,
                const ModelNotes& notes) {
  std::vector<FileTensor> tensors;
  const auto add = [&](const TensorInfo& tensor, const void* values) {
    const std::string wrong = describe_not_finite(tensor, spec.dtype, values);
    if (!wrong.empty()) throw Error(ErrorCode::invalid_argument, path + ": not saved: " + wrong);
    tensors.push_back({tensor.name, spec.dtype, tensor.shape, values});
  };
  for (const TensorInfo& tensor : layout.tensors()) {
    add(tensor, static_cast<const unsigned char*>(parameters) + byte_offset(tensor, spec.dtype));
  }
  if (!notes.mean_low.empty()) add(mean_low_of(layout), notes.mean_low.data());
  const bool old = notes.mean_low.empty() && !needs_format_1_1(spec);
  std::map<std::string, std::string> metadata = {{kVersionKey, old ? "1.0" : "1.1"},
                                                 {kLibraryKey, version()},
                                                 {kDTypeKey, std::string(name_of(spec.dtype))},
                                                 {kSpecKey, to_json(spec)}};
  const auto add_names = [&](const char* key, const char* what, const std::vector<std::string>& names,
                             std::int64_t columns) {
    if (names.empty()) return;
    check_names(what, names, columns);
    metadata[key] = names_to_json(what, names);
  };
  add_names(kColumnNamesKey, "column_names", notes.column_names, spec.input_size);
  add_names(kContextNamesKey, "context_names", notes.context_names, spec.context_size);
  check_names_differ(notes.column_names, notes.context_names);
  if (notes.threshold) {
    check_threshold(*notes.threshold);
    metadata[kThresholdKey] = threshold_to_json(*notes.threshold);
  }
  if (!notes.import_report.empty()) metadata[kImportReportKey] = notes.import_report;
  write_tensor_file(path, metadata, tensors);
}

LoadedModel load_model(const std::string& path, const FlowSpec* expected) {
  const FloatMode mode;  // for the numbers of the metadata
  if (expected != nullptr) expected->validate();
  const ContainerReader file(path);
  TensorsByName tensors;
  for (const StoredTensor& stored : file.tensors()) tensors.emplace(stored.name, &stored);

  LoadedModel model;
  model.spec = spec_of(file, tensors, expected);
  const DType dtype = model.spec.dtype;
  check_count(path, model.spec, file.tensors().size());
  const ParamLayout layout(model.spec);
  check_tensors(file, tensors, wanted_tensors(tensors, model.spec, layout), dtype);
  model.column_names = names_of(file, kColumnNamesKey, model.spec.input_size);
  model.context_names = names_of(file, kContextNamesKey, model.spec.context_size);
  try {
    check_names_differ(model.column_names, model.context_names);
  } catch (const Error& error) {
    fail_format(path, std::string(kContextNamesKey) + ": " + error.what());
  }
  model.threshold = threshold_of(file);
  model.import_report = import_report_of(file);

  // Not before here: the tensors are all in the file, so the size asked for is the file's own.
  try {
    model.parameters.resize(static_cast<std::size_t>(layout.size() * size_of(dtype)));
  } catch (const std::bad_alloc&) {
    fail_memory(path, file.data_size());
  }
  const auto read = [&](const TensorInfo& tensor, void* values) {
    const StoredTensor& stored = *tensors.at(tensor.name);
    file.read_data(stored.begin, stored.end, static_cast<unsigned char*>(values));
    std::string wrong = describe_not_finite(tensor, dtype, values);
    if (wrong.empty()) wrong = layers::describe_wrong_sign(tensor, dtype, values);
    if (!wrong.empty()) fail_format(path, wrong);
  };
  for (const TensorInfo& tensor : layout.tensors()) {
    read(tensor, model.parameters.data() + byte_offset(tensor, dtype));
  }
  if (has_mean_low(tensors, model.spec, layout)) {
    model.mean_low.resize(static_cast<std::size_t>(model.spec.input_size));
    read(mean_low_of(layout), model.mean_low.data());
  }
  file.check_unchanged();
  return model;
}

}  // namespace nvpflow
