#include "checkpoint_file.hpp"

#include <sys/stat.h>

#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/spec.hpp>

#include "io/metadata_json.hpp"
#include "io/safetensors.hpp"

namespace nvpflow {
namespace {

using nlohmann::json;

constexpr const char* kTrainingKey = "nvpflow.training";

const FileTensor& find(const std::string& path, const TensorFile& file, const char* name, DType dtype,
                       std::int64_t size) {
  for (const FileTensor& t : file.tensors) {
    if (t.name != name) continue;
    std::int64_t count = 1;
    for (const std::int64_t n : t.shape) count *= n;
    if (t.dtype != dtype || (size >= 0 && count != size)) {
      checkpoint_damaged(path, "tensor " + t.name + " holds " + std::to_string(count) + " " +
                                   std::string(name_of(t.dtype)) + ", expected " + std::to_string(size) + " " +
                                   std::string(name_of(dtype)));
    }
    return t;
  }
  checkpoint_damaged(path, std::string("tensor ") + name + " is missing");
}

json training_of(const std::string& path, const TensorFile& file) {
  const auto text = file.metadata.find(kTrainingKey);
  if (text == file.metadata.end()) checkpoint_damaged(path, "not a checkpoint: it has no " + std::string(kTrainingKey));
  json training;
  try {
    training = io::parse_metadata_json(text->second);
  } catch (const Error& error) {
    checkpoint_damaged(path, std::string(kTrainingKey) + ": " + error.what());
  }
  const bool good = training.is_object() && training.contains("key") && training["key"].is_object() &&
                    training.contains("adam_steps") && training["adam_steps"].is_number_integer() &&
                    training.contains("best_epoch") && training["best_epoch"].is_number_integer();
  if (!good) checkpoint_damaged(path, std::string(kTrainingKey) + " is not the JSON object that this version writes");
  return training;
}

/// A value for a message: ASCII, one line, not endless.
std::string shown(const json& value) {
  constexpr std::size_t kLongest = 400;
  const std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true);
  return text.size() > kLongest ? text.substr(0, kLongest) + ".." : text;
}

void check_key(const std::string& path, const json& came, const json& expected, std::span<const char* const> first) {
  const auto check = [&](const std::string& name, const json& value) {
    const json other = came.contains(name) ? came[name] : json();
    if (other == value) return;
    throw Error(ErrorCode::invalid_argument, "checkpoint " + path + " belongs to another run: its " + name + " is " +
                                                 shown(other) + ", this run's is " + shown(value) +
                                                 "; give another file, or delete this one to start over");
  };
  for (const char* name : first) check(name, expected.at(name));
  for (const auto& [name, value] : expected.items()) check(name, value);
}

std::vector<double> records_of(const std::string& path, const TensorFile& file, std::int64_t fields) {
  const FileTensor& tensor = find(path, file, "history", DType::float64, -1);
  if (tensor.shape.size() != 2 || tensor.shape[1] != fields) {
    checkpoint_damaged(path, "tensor history has another shape");
  }
  std::vector<double> records(static_cast<std::size_t>(tensor.shape[0] * fields));
  if (!records.empty()) std::memcpy(records.data(), tensor.data, records.size() * sizeof(double));
  return records;
}

/// Whether all elements are finite, and none is below `least`.
template <class T>
bool all_within(const FileTensor& tensor, std::int64_t count, double least) {
  for (std::int64_t i = 0; i < count; ++i) {
    T value;
    std::memcpy(&value, static_cast<const unsigned char*>(tensor.data) + static_cast<std::size_t>(i) * sizeof(T),
                sizeof(T));
    if (!std::isfinite(value) || static_cast<double>(value) < least) return false;
  }
  return true;
}

/// The arrays by the names of their tensors.
std::vector<std::pair<const char*, void*>> named(const CheckpointArrays& arrays) {
  std::vector<std::pair<const char*, void*>> all = {{"parameters", arrays.parameters},
                                                    {"best_parameters", arrays.best},
                                                    {"first_moment", arrays.first_moment},
                                                    {"second_moment", arrays.second_moment}};
  if (arrays.average != nullptr) all.emplace_back("average", arrays.average);
  return all;
}

/// The named array; second moments, which are means of squares, are 0 or more.
const FileTensor& checked_array(const std::string& path, const TensorFile& file, const char* name, DType dtype,
                                std::int64_t count) {
  const FileTensor& tensor = find(path, file, name, dtype, count);
  const bool squares = tensor.name == "second_moment";
  const double least = squares ? 0 : std::numeric_limits<double>::lowest();
  const bool good =
      dtype == DType::float32 ? all_within<float>(tensor, count, least) : all_within<double>(tensor, count, least);
  if (good) return tensor;
  checkpoint_damaged(path,
                     "tensor " + tensor.name + " holds NaN" + (squares ? ", negative" : "") + " or infinite values");
}

}  // namespace

void checkpoint_damaged(const std::string& path, const std::string& what) {
  throw Error(ErrorCode::file_format, "checkpoint " + path + ": " + what);
}

bool checkpoint_exists(const std::string& path) {
  struct stat status;
  if (::stat(path.c_str(), &status) == 0) return true;
  const int error = errno;
  if (error == ENOENT) return false;  // none yet
  // Starting over would replace a checkpoint that only could not be seen.
  throw Error(ErrorCode::io, "checkpoint " + path + ": cannot be examined: " + std::generic_category().message(error),
              error);
}

void check_checkpoint_folder(const std::string& path) {
  const auto slash = path.find_last_of('/');
  if (slash == std::string::npos) return;
  struct stat status;
  if (::stat(path.substr(0, slash + 1).c_str(), &status) == 0) return;
  const int error = errno;
  throw Error(ErrorCode::io,
              "checkpoint " + path + ": its folder cannot be used: " + std::generic_category().message(error), error);
}

void write_checkpoint(const std::string& path, const json& key, DType dtype, const CheckpointState& state,
                      std::int64_t fields, const CheckpointArrays& arrays) {
  const json training = {{"key", key}, {"adam_steps", state.adam_steps}, {"best_epoch", state.best}};
  const std::vector<std::int64_t> flat = {arrays.count};
  const auto records = static_cast<std::int64_t>(state.records.size()) / fields;
  std::vector<FileTensor> tensors = {{"history", DType::float64, {records, fields}, state.records.data()},
                                     {"best_loss", DType::float64, {1}, &state.best_loss}};
  if (state.begun) tensors.push_back({"begun_epoch", DType::float64, {1}, &*state.begun});
  for (const auto& [name, values] : named(arrays)) tensors.push_back({name, dtype, flat, values});
  write_tensor_file(path, {{kTrainingKey, training.dump()}}, tensors);
}

ReadCheckpoint read_checkpoint(const std::string& path, const json& key, std::span<const char* const> first,
                               DType dtype, std::int64_t fields) {
  ReadCheckpoint read = {path, dtype, read_tensor_file(path), {}};
  const json training = training_of(path, read.file);
  check_key(path, training["key"], key, first);
  read.state.records = records_of(path, read.file, fields);
  std::memcpy(&read.state.best_loss, find(path, read.file, "best_loss", DType::float64, 1).data, sizeof(double));
  for (const FileTensor& tensor : read.file.tensors) {
    if (tensor.name != "begun_epoch") continue;
    std::memcpy(&read.state.begun.emplace(), find(path, read.file, "begun_epoch", DType::float64, 1).data,
                sizeof(double));
  }
  read.state.best = training["best_epoch"];
  read.state.adam_steps = training["adam_steps"];
  return read;
}

void ReadCheckpoint::take(const CheckpointArrays& arrays) const {
  const auto targets = named(arrays);
  for (const auto& [name, target] : targets) checked_array(path, file, name, dtype, arrays.count);
  for (const auto& [name, target] : targets) {
    const FileTensor& tensor = find(path, file, name, dtype, arrays.count);
    std::memcpy(target, tensor.data, static_cast<std::size_t>(arrays.count * size_of(dtype)));
  }
}

}  // namespace nvpflow
