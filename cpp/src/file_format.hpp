// TODO header comment (byte-level description)
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <nvpflow/error.hpp>
#include <nvpflow/spec.hpp>

namespace nvpflow {

/// A tensor of a file. Writing: `data` points at the caller's array. Reading: into TensorFile::bytes.
struct FileTensor {
  std::string name;
  DType dtype = DType::float32;
  std::vector<std::int64_t> shape;
  const void* data = nullptr;  // row-major, little-endian
};

/// A safetensors container as read: tensors in the order of their bytes.
struct TensorFile {
  std::map<std::string, std::string> metadata;
  std::vector<FileTensor> tensors;
  std::unique_ptr<unsigned char[]> bytes;
};

void write_tensor_file(const std::string& path, const std::map<std::string, std::string>& metadata,
                       const std::vector<FileTensor>& tensors);
TensorFile read_tensor_file(const std::string& path);

/// The spec as the JSON text that goes into the metadata, and back (Error(file_format) naming the field).
std::string spec_to_json(const FlowSpec& spec);
FlowSpec spec_from_json(const std::string& text);

/// parameters: ParamLayout::size() elements of spec.dtype.
void save_model(const std::string& path, const FlowSpec& spec, const ParamLayout& layout, const void* parameters);

struct LoadedModel {
  FlowSpec spec;
  std::vector<unsigned char> parameters;  // flat, ParamLayout order, spec.dtype
};
/// expected: null, or the spec the file must have (metadata), or is to be read with (tensors alone).
LoadedModel load_model(const std::string& path, const FlowSpec* expected);

}  // namespace nvpflow
