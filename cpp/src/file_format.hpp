// Model files and training checkpoints: what is in the bytes, and the functions that read and write them.
//
// A file is a safetensors container (https://github.com/huggingface/safetensors), so every reader of that format opens
// it. All numbers are little-endian.
//
//     offset 0       8 bytes  N, length of the header in bytes, unsigned; at most 100,000,000
//     offset 8       N bytes  header: one JSON object in UTF-8, first byte '{', spaces allowed after the last '}'
//     offset 8 + N   data     the tensors' elements, row-major, up to the last byte of the file
//
// The header maps each tensor's name to {"dtype": "F32" | "F64", "shape": [..], "data_offsets": [begin, end]}, offsets
// in bytes from the start of the data. Read in the order of their offsets, the tensors fill the data without holes or
// overlaps. The key "__metadata__", where present, maps strings to strings. We write tensors in the order of the flat
// parameter buffer and pad the header with spaces so that the data starts at a multiple of 64 bytes; a reader must
// rely on neither.
//
// A model (save_model, load_model) holds exactly the tensors of its ParamLayout and these metadata keys; a reader
// ignores keys it does not know. A float32 model that begins with a standardize layer may hold one tensor more, behind
// the others: "standardize_0.mean_low", F32 [D], what the layer's mean is beyond the float32 numbers of
// "standardize_0.mean" (add them in float64). It is written only where one of its numbers is not zero, and the version
// is 1.1 then; a reader that does not know it refuses the file.
//
//     nvpflow.format_version   "1.0", MAJOR.MINOR. Another major version is refused. A newer minor version is read as
//                              long as its spec holds nothing unknown.
//     nvpflow.library_version  version of the library that wrote the file; for people, never interpreted
//     nvpflow.dtype            "float32" | "float64", equal to the spec's
//     nvpflow.spec             the FlowSpec as JSON text of at most 16 MiB; unknown, missing and repeated keys are
//     refused:
//         {"input_size": 5, "dtype": "float32", "layers": [{"kind": "standardize"},
//          {"kind": "coupling", "swapped": false, "hidden_sizes": [4, 3], "activation": "relu", "scale_bound": 1.0}]}
//     nvpflow.column_names     only where the columns have names: a JSON array of input_size strings, in the order of
//     the data, as text of at most 16 MiB
//     nvpflow.threshold        only where the model has one: {"log_prob": -12.5, "quantile": 0.01}, nats and a share of
//     rows in [0, 1] or null; unknown, missing and repeated keys are refused
//
// Tensors alone. A file with neither nvpflow.format_version nor nvpflow.spec (as Edifice writes it) is read under the
// caller's spec, or else one is read off the tensors: couplings flow_0, flow_1, .. that alternate halves; hidden sizes
// from the shapes of flow_{k}_coupling_dense_{j}.kernel; input_size = inputs of flow_0's first kernel + outputs of its
// heads; dtype of flow_0_scale.kernel; activation relu and scale_bound 1, which leave no trace in the tensors.
//
// A checkpoint of training is the same container under its own metadata keys and tensor names (see checkpoint.cpp).
//
// Limits and memory. Reading executes nothing and checks every length, shape and offset before memory is taken for
// tensors; that memory is at most the size of the file. The header is parsed without a document tree, at up to about 10
// times its own size; the spec's text with one, at up to about 30 times that text. All in all, and with the flow
// that is made of it, at most 64 times the file's size and 64 KiB: SECURITY.md says so, tests/fuzz/file.cpp checks it.
// Models that hold NaN or infinity are refused, when saved as well. Only regular files are read or replaced.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <nvpflow/error.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/spec.hpp>

namespace nvpflow {

/// A tensor of a file. Writing: `data` points at the caller's array. Reading: into TensorFile::bytes, at any
/// alignment (copy with memcpy).
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

/// Atomic: a temporary file in the folder of `path` is written, synced and renamed. On failure (Error(io)) the old file
/// is as it was and no temporary is left. A symbolic link stays and its target is replaced; the mode of an existing
/// file is kept, and one that this process may not write is refused.
void write_tensor_file(const std::string& path, const std::map<std::string, std::string>& metadata,
                       const std::vector<FileTensor>& tensors);
/// Throws Error(io), Error(file_format) or Error(out_of_memory).
TensorFile read_tensor_file(const std::string& path);

/// The spec as the JSON text that goes into the metadata, and back (Error(file_format) naming the field).
std::string spec_to_json(const FlowSpec& spec);
FlowSpec spec_from_json(const std::string& text);

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
/// expected: null, or the spec the file must have (metadata), or is to be read with (tensors alone).
LoadedModel load_model(const std::string& path, const FlowSpec* expected);

}  // namespace nvpflow
