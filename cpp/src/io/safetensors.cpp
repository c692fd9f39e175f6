#include "safetensors.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <set>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/spec.hpp>

#include "atomic_file.hpp"
#include "descriptor.hpp"
#include "messages.hpp"

namespace nvpflow {
namespace io {
namespace {

static_assert(std::endian::native == std::endian::little, "tensors are stored little-endian and copied as they are");

using nlohmann::json;

constexpr std::uint64_t kLengthBytes = 8;
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the reference implementation
constexpr std::uint64_t kZip = 0x04034b50;              // how a zip archive begins: "PK\3\4", the first number read
constexpr std::uint64_t kDataAlignment = 64;
constexpr std::size_t kMaxRank = 8;
constexpr const char* kMetadataKey = "__metadata__";

/// Takes the header apart while it is parsed: no document tree whose size a hostile file could choose, and nothing
/// nests deeper than a tensor's shape. The text begins with '{', so there is no value but in its object.
class HeaderParser final : public json::json_sax_t {
 public:
  explicit HeaderParser(std::string path) : path_(std::move(path)) {}

  std::map<std::string, std::string> metadata;
  std::vector<StoredTensor> tensors;

  bool null() override { refuse("null"); }
  bool boolean(bool) override { refuse("a boolean"); }
  bool number_float(double, const std::string&) override { refuse("a fraction or a number above 2^64"); }
  bool number_integer(std::int64_t value) override { refuse(std::to_string(value)); }
  bool binary(binary_t&) override { refuse("binary data"); }

  bool number_unsigned(std::uint64_t value) override {
    if (place_ != Place::integers) refuse("a number");
    if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) refuse(std::to_string(value));
    if (integers_.size() == kMaxRank) refuse("a list of more than " + std::to_string(kMaxRank) + " numbers");
    integers_.push_back(static_cast<std::int64_t>(value));
    return true;
  }

  bool string(std::string& value) override {
    if (place_ == Place::metadata) {
      if (!metadata.emplace(field_, value).second) {
        fail_format(path_, "metadata key " + quote(field_) + " appears twice");
      }
    } else if (place_ == Place::tensor && field_ == "dtype") {
      if (value != "F32" && value != "F64") refuse(quote(value));
      tensors.back().dtype = value == "F32" ? DType::float32 : DType::float64;
    } else {
      refuse("a string");
    }
    return true;
  }

  bool start_object(std::size_t) override {
    if (place_ == Place::outside) {
      place_ = Place::top;
    } else if (place_ == Place::top && entry_ == kMetadataKey) {
      if (std::exchange(metadata_seen_, true)) fail_format(path_, "the header holds __metadata__ twice");
      place_ = Place::metadata;
    } else if (place_ == Place::top) {
      tensors.emplace_back().name = entry_;
      fields_seen_.clear();
      place_ = Place::tensor;
    } else {
      refuse("an object");
    }
    return true;
  }

  bool key(std::string& key) override {
    if (place_ == Place::top) {
      entry_ = key;
      return true;
    }
    field_ = key;
    if (place_ == Place::metadata) return true;
    if (key != "dtype" && key != "shape" && key != "data_offsets") {
      fail_format(path_, "tensor " + quote(entry_) + " has the unknown field " + quote(key) +
                             ", expected dtype, shape and data_offsets");
    }
    if (!fields_seen_.insert(key).second) {
      fail_format(path_, "tensor " + quote(entry_) + " has the field " + key + " twice");
    }
    return true;
  }

  bool end_object() override {
    if (place_ == Place::tensor) {
      for (const char* field : {"dtype", "shape", "data_offsets"}) {
        if (!fields_seen_.contains(field)) fail_format(path_, "tensor " + quote(entry_) + " has no field " + field);
      }
    }
    place_ = place_ == Place::top ? Place::outside : Place::top;
    return true;
  }

  bool start_array(std::size_t) override {
    if (place_ != Place::tensor || field_ == "dtype") refuse("an array");
    place_ = Place::integers;
    integers_.clear();
    return true;
  }

  bool end_array() override {
    place_ = Place::tensor;
    StoredTensor& tensor = tensors.back();
    if (field_ == "shape") {
      tensor.shape = integers_;
    } else {
      if (integers_.size() != 2) refuse("a list of " + std::to_string(integers_.size()) + " numbers");
      tensor.begin = static_cast<std::uint64_t>(integers_[0]);
      tensor.end = static_cast<std::uint64_t>(integers_[1]);
    }
    return true;
  }

  // The library's own text quotes the token it met, which a hostile file can make endless.
  bool parse_error(std::size_t position, const std::string&, const json::exception&) override {
    fail_format(path_, "the header is not valid JSON at its byte " + std::to_string(position));
  }

 private:
  enum class Place { outside, top, metadata, tensor, integers };

  [[noreturn]] void refuse(const std::string& what) const {
    if (entry_ == kMetadataKey) {
      const std::string where = place_ == Place::top ? "__metadata__" : "metadata key " + quote(field_);
      fail_format(path_, where + " is " + what + ", expected " + (place_ == Place::top ? "an object" : "a string"));
    }
    if (place_ == Place::top) fail_format(path_, "tensor " + quote(entry_) + " is " + what + ", expected an object");
    const char* expected = field_ == "dtype"   ? "'F32' or 'F64'"
                           : field_ == "shape" ? "a list of up to 8 sizes, whole numbers >= 0"
                                               : "a list of two byte offsets, whole numbers >= 0";
    const char* verb = place_ == Place::integers ? " holds " : " is ";
    fail_format(path_, field_ + " of tensor " + quote(entry_) + verb + what + ", expected " + expected);
  }

  std::string path_;
  Place place_ = Place::outside;
  std::string entry_;  // key of the top object that is being read
  std::string field_;  // key below it
  std::vector<std::int64_t> integers_;
  std::set<std::string> fields_seen_;
  bool metadata_seen_ = false;
};

/// Bytes that shape and dtype ask for; false where they do not fit 64 bits.
bool byte_count(const StoredTensor& tensor, std::uint64_t& bytes) {
  bytes = static_cast<std::uint64_t>(size_of(tensor.dtype));
  for (const std::int64_t extent : tensor.shape) {
    if (__builtin_mul_overflow(bytes, static_cast<std::uint64_t>(extent), &bytes)) return false;
  }
  return true;
}

void check_unique_names(const std::string& path, const std::vector<StoredTensor>& tensors) {
  std::vector<std::string_view> names;
  names.reserve(tensors.size());
  for (const StoredTensor& tensor : tensors) names.push_back(tensor.name);
  std::sort(names.begin(), names.end());
  const auto twin = std::adjacent_find(names.begin(), names.end());
  if (twin != names.end()) fail_format(path, "tensor " + quote(*twin) + " appears twice");
}

/// Every byte of the data belongs to exactly one tensor. `tensors` are sorted by offset.
void check_places(const std::string& path, const std::vector<StoredTensor>& tensors, std::uint64_t data_size) {
  std::uint64_t reached = 0;
  for (const StoredTensor& tensor : tensors) {
    const std::string subject = "tensor " + quote(tensor.name);
    const std::string place = "data_offsets [" + std::to_string(tensor.begin) + ", " + std::to_string(tensor.end) + "]";
    std::uint64_t bytes = 0;
    if (!byte_count(tensor, bytes)) {
      fail_format(path, subject + " has shape " + text_of(tensor.shape) + ", which is more than any file can hold");
    }
    if (tensor.begin > tensor.end || tensor.end - tensor.begin != bytes) {
      fail_format(path, subject + " has " + place + ", expected " + std::to_string(bytes) +
                            " bytes: " + std::string(name_of(tensor.dtype)) + " of shape " + text_of(tensor.shape));
    }
    if (tensor.begin != reached) {
      fail_format(path, subject + " has " + place + ", expected it to start at " + std::to_string(reached) + ": " +
                            (tensor.begin > reached ? "a hole in the data" : "it overlaps the tensor before it"));
    }
    reached = tensor.end;
  }
  if (reached == data_size) return;
  fail_format(path, std::string(reached > data_size ? "the file is truncated" : "the file is too long") +
                        ": it holds " + std::to_string(data_size) + " bytes of tensor data, expected " +
                        std::to_string(reached));
}

}  // namespace

namespace {

// O_NONBLOCK: opening a pipe without a writer must come back, to be refused.
int open_for_reading(const std::string& path) {
  check_path(path);
  const int number = uninterrupted([&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); });
  if (number < 0) fail_io(path, "cannot be opened", errno);
  return number;
}

}  // namespace

ContainerReader::ContainerReader(const std::string& path) : path_(path), file_(open_for_reading(path)) {
  if (::fstat(file_.number(), &status_) != 0) fail_io(path, "cannot be examined", errno);
  check_regular(path, status_);
  read_header();
}

void ContainerReader::check_unchanged() const {
  struct stat now{};
  if (::fstat(file_.number(), &now) != 0) fail_io(path_, "cannot be examined", errno);
  if (now.st_size != status_.st_size || now.st_mtim.tv_sec != status_.st_mtim.tv_sec ||
      now.st_mtim.tv_nsec != status_.st_mtim.tv_nsec) {
    fail_format(path_, "the file changed while it was being read");
  }
}

void ContainerReader::read_header() {
  if (file_size() < kLengthBytes) {
    fail_format(path_, "not a safetensors file, or a truncated one: it holds " + std::to_string(file_size()) +
                           " bytes, expected at least 8");
  }
  std::uint64_t length = 0;
  read_at(0, kLengthBytes, &length);
  const std::uint64_t longest = std::min(file_size() - kLengthBytes, kMaxHeaderBytes);
  if (length > longest) {
    if ((length & 0xffffffff) == kZip) {
      fail_format(
          path_,
          "not a safetensors file but a zip archive, as torch.save and np.savez write them; nvpflow import makes "
          "a model of a state dict of zuko or nflows");
    }
    fail_format(path_, "not a safetensors file, or a truncated one: the header's length is given as " +
                           std::to_string(length) + " bytes, expected at most " + std::to_string(longest));
  }
  std::string text(length, '\0');
  read_at(kLengthBytes, length, text.data());
  if (text.empty() || text[0] != '{') fail_format(path_, "the header does not start with '{'");

  // The parser would take a zero byte for the end of the text.
  if (text.find('\0') != std::string::npos) fail_format(path_, "the header holds a zero byte");
  HeaderParser parser(path_);
  json::sax_parse(text, &parser);
  metadata_ = std::move(parser.metadata);
  tensors_ = std::move(parser.tensors);
  data_start_ = kLengthBytes + length;
  // Tensors without elements share their places: their names make the order one.
  std::sort(tensors_.begin(), tensors_.end(), [](const StoredTensor& left, const StoredTensor& right) {
    return std::tie(left.begin, left.end, left.name) < std::tie(right.begin, right.end, right.name);
  });
  check_unique_names(path_, tensors_);
  check_places(path_, tensors_, data_size());
}

void ContainerReader::read_at(std::uint64_t offset, std::uint64_t size, void* destination) const {
  auto* bytes = static_cast<unsigned char*>(destination);
  while (size > 0) {
    const std::size_t wanted = std::min<std::uint64_t>(size, kMaxTransfer);
    const ssize_t got =
        uninterrupted([&] { return ::pread(file_.number(), bytes, wanted, static_cast<off_t>(offset)); });
    if (got < 0) fail_io(path_, "cannot be read", errno);
    if (got == 0) fail_format(path_, "the file became shorter while it was being read");
    bytes += got;
    offset += static_cast<std::uint64_t>(got);
    size -= static_cast<std::uint64_t>(got);
  }
}

namespace {

std::uint64_t byte_count(const FileTensor& tensor) {
  const StoredTensor stored{tensor.name, tensor.dtype, tensor.shape};
  std::uint64_t bytes = 0;
  const bool negative = std::any_of(tensor.shape.begin(), tensor.shape.end(), [](auto extent) { return extent < 0; });
  if (negative || tensor.shape.size() > kMaxRank || !byte_count(stored, bytes)) {
    throw Error(ErrorCode::invalid_argument, "tensor " + quote(tensor.name) + " has shape " + text_of(tensor.shape) +
                                                 ", expected up to 8 sizes >= 0 that fit a file");
  }
  return bytes;
}

/// The first bytes of the file: the header's length and the header, padded.
std::string make_header(const std::map<std::string, std::string>& metadata, const std::vector<FileTensor>& tensors) {
  json header = json::object();
  if (!metadata.empty()) header[kMetadataKey] = metadata;
  std::uint64_t offset = 0;
  for (const FileTensor& tensor : tensors) {
    if (tensor.name == kMetadataKey || header.contains(tensor.name)) {
      throw Error(ErrorCode::invalid_argument, "tensor name " + quote(tensor.name) + " is reserved or used twice");
    }
    const std::uint64_t end = offset + byte_count(tensor);
    header[tensor.name] = {{"dtype", tensor.dtype == DType::float32 ? "F32" : "F64"},
                           {"shape", tensor.shape},
                           {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const json::exception&) {
    throw Error(ErrorCode::invalid_argument, "a tensor name or metadata text is not UTF-8");
  }
  const std::uint64_t padding = (kDataAlignment - (kLengthBytes + text.size()) % kDataAlignment) % kDataAlignment;
  text.append(padding, ' ');
  if (text.size() > kMaxHeaderBytes) {
    throw Error(ErrorCode::invalid_argument, "names and metadata take " + std::to_string(text.size()) +
                                                 " bytes, expected at most " + std::to_string(kMaxHeaderBytes));
  }
  std::string length(kLengthBytes, '\0');
  const std::uint64_t size = text.size();
  std::memcpy(length.data(), &size, kLengthBytes);
  return length + text;
}

}  // namespace

}  // namespace io

void write_tensor_file(const std::string& path, const std::map<std::string, std::string>& metadata,
                       const std::vector<FileTensor>& tensors) {
  const std::string header = io::make_header(metadata, tensors);
  std::vector<io::Bytes> parts = {{header.data(), header.size()}};
  for (const FileTensor& tensor : tensors) parts.push_back({tensor.data, io::byte_count(tensor)});
  io::replace_file(path, parts);
}

TensorFile read_tensor_file(const std::string& path) {
  const io::ContainerReader reader(path);
  TensorFile file;
  try {
    file.bytes = std::make_unique_for_overwrite<unsigned char[]>(reader.data_size());
  } catch (const std::bad_alloc&) {
    io::fail_memory(path, reader.data_size());
  }
  reader.read_data(0, reader.data_size(), file.bytes.get());
  reader.check_unchanged();
  file.metadata = reader.metadata();
  for (const io::StoredTensor& stored : reader.tensors()) {
    file.tensors.push_back({stored.name, stored.dtype, stored.shape, file.bytes.get() + stored.begin});
  }
  return file;
}

}  // namespace nvpflow
