// Files of tensors: the safetensors container (https://github.com/huggingface/safetensors), checked when it is read.
// python/docs/file_format.md says what is in the bytes.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <nvpflow/spec.hpp>

#include "descriptor.hpp"

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

/// Replaces the file (replace_file). Tensors lie in the order given; the header is padded with spaces so that the data
/// start at a multiple of 64 bytes.
void write_tensor_file(const std::string& path, const std::map<std::string, std::string>& metadata,
                       const std::vector<FileTensor>& tensors);
/// Throws Error(io), Error(file_format) or Error(out_of_memory).
TensorFile read_tensor_file(const std::string& path);

namespace io {

struct StoredTensor {
  std::string name;
  DType dtype = DType::float32;
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0;  // bytes from the start of the data
  std::uint64_t end = 0;
};

/// An open container whose header has been read and checked against the length of the file.
class ContainerReader {
 public:
  explicit ContainerReader(const std::string& path);

  const std::string& path() const { return path_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::vector<StoredTensor>& tensors() const { return tensors_; }  // in the order of their bytes
  std::uint64_t data_size() const { return file_size() - data_start_; }

  /// Bytes [begin, end) of the data.
  void read_data(std::uint64_t begin, std::uint64_t end, void* destination) const {
    read_at(data_start_ + begin, end - begin, destination);
  }
  /// Refuses what was read where the file has been written to in the meantime.
  void check_unchanged() const;

 private:
  std::uint64_t file_size() const { return static_cast<std::uint64_t>(status_.st_size); }
  void read_header();
  void read_at(std::uint64_t offset, std::uint64_t size, void* destination) const;

  std::string path_;
  Descriptor file_;
  struct stat status_{};
  std::uint64_t data_start_ = 0;
  std::map<std::string, std::string> metadata_;
  std::vector<StoredTensor> tensors_;
};

}  // namespace io
}  // namespace nvpflow
