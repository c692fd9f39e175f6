#include "file_format.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <initializer_list>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/spec.hpp>

#include "float_mode.hpp"
#include "metadata.hpp"

namespace nvpflow {
namespace {

static_assert(std::endian::native == std::endian::little, "tensors are stored little-endian and copied as they are");

using nlohmann::json;

constexpr std::uint64_t kLengthBytes = 8;
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the reference implementation
constexpr std::size_t kMaxJsonBytes = std::size_t{1} << 24;
constexpr std::uint64_t kDataAlignment = 64;
constexpr std::size_t kMaxRank = 8;
constexpr int kMaxJsonDepth = 8;
constexpr std::size_t kMaxTransfer = std::size_t{1} << 30;  // bytes per read or write; Linux stops short of 2^31

constexpr const char* kMetadataKey = "__metadata__";
constexpr const char* kVersionKey = "nvpflow.format_version";
constexpr const char* kLibraryKey = "nvpflow.library_version";
constexpr const char* kDTypeKey = "nvpflow.dtype";
constexpr const char* kSpecKey = "nvpflow.spec";
constexpr const char* kColumnNamesKey = "nvpflow.column_names";
constexpr const char* kThresholdKey = "nvpflow.threshold";
constexpr std::uint32_t kMajorVersion = 1;
constexpr const char* kFormatVersion = "1.0";
constexpr const char* kMeanLowVersion = "1.1";  // of a file that holds kMeanLowName
constexpr const char* kMeanLowName = "standardize_0.mean_low";

// ---------------------------------------------------------------------------------------------- messages

/// Text from a file, safe to print: ASCII, one line, not endless.
std::string quote(std::string_view text) {
  constexpr std::size_t kLongest = 80;
  std::string quoted = "'";
  for (const char c : text.substr(0, kLongest)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      quoted += c;
    } else {
      constexpr const char* kDigits = "0123456789abcdef";
      quoted.append("\\x").append(1, kDigits[byte >> 4]).append(1, kDigits[byte & 15]);
    }
  }
  return quoted + (text.size() > kLongest ? "..'" : "'");
}

std::string text_of(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (const std::int64_t extent : shape) text.append(text.size() > 1 ? ", " : "").append(std::to_string(extent));
  return text + "]";
}

[[noreturn]] void fail_io(const std::string& path, const std::string& what, int error) {
  throw Error(ErrorCode::io, path + ": " + what + ": " + std::generic_category().message(error), error);
}

[[noreturn]] void fail_format(const std::string& path, const std::string& what) {
  throw Error(ErrorCode::file_format, path + ": " + what);
}

void check_path(const std::string& path) {
  if (path.empty()) throw Error(ErrorCode::invalid_argument, "path is empty, expected the name of a file");
  if (path.find('\0') != std::string::npos) {
    throw Error(ErrorCode::invalid_argument, "path is " + quote(path) + ", expected a name without a zero byte");
  }
}

void check_regular(const std::string& path, const struct stat& status) {
  if (S_ISDIR(status.st_mode)) fail_io(path, "cannot hold a model", EISDIR);
  if (!S_ISREG(status.st_mode)) fail_io(path, "is a pipe, socket or device, expected a regular file", EINVAL);
}

/// The call's result, once no signal interrupts it.
template <class Call>
auto uninterrupted(Call call) {
  for (;;) {
    const auto result = call();
    if (result >= 0 || errno != EINTR) return result;
  }
}

/// An open file; closed with it.
class Descriptor {
 public:
  explicit Descriptor(int number) : number_(number) {}
  ~Descriptor() { close(); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  int number() const { return number_; }
  /// 0, or -1 and errno. A signal does no harm: Linux has given the number back by then, and a second try might close a
  /// file that another thread has just opened.
  int close() {
    if (number_ < 0 || ::close(std::exchange(number_, -1)) == 0 || errno == EINTR) return 0;
    return -1;
  }

 private:
  int number_;
};

// ---------------------------------------------------------------------------------------------- reading a container

struct StoredTensor {
  std::string name;
  DType dtype = DType::float32;
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0;  // bytes from the start of the data
  std::uint64_t end = 0;
};

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

/// An open container whose header has been read and checked against the length of the file.
class ContainerReader {
 public:
  explicit ContainerReader(const std::string& path) : path_(path), file_(open_for_reading(path)) {
    if (::fstat(file_.number(), &status_) != 0) fail_io(path, "cannot be examined", errno);
    check_regular(path, status_);
    read_header();
  }

  const std::string& path() const { return path_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::vector<StoredTensor>& tensors() const { return tensors_; }  // in the order of their bytes
  std::uint64_t data_size() const { return file_size() - data_start_; }

  /// Bytes [begin, end) of the data.
  void read_data(std::uint64_t begin, std::uint64_t end, void* destination) const {
    read_at(data_start_ + begin, end - begin, destination);
  }

  /// Refuses what was read where the file has been written to in the meantime.
  void check_unchanged() const {
    struct stat now{};
    if (::fstat(file_.number(), &now) != 0) fail_io(path_, "cannot be examined", errno);
    if (now.st_size != status_.st_size || now.st_mtim.tv_sec != status_.st_mtim.tv_sec ||
        now.st_mtim.tv_nsec != status_.st_mtim.tv_nsec) {
      fail_format(path_, "the file changed while it was being read");
    }
  }

 private:
  // O_NONBLOCK: opening a pipe without a writer must come back, to be refused.
  static int open_for_reading(const std::string& path) {
    check_path(path);
    const int number = uninterrupted([&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); });
    if (number < 0) fail_io(path, "cannot be opened", errno);
    return number;
  }

  std::uint64_t file_size() const { return static_cast<std::uint64_t>(status_.st_size); }

  void read_header() {
    if (file_size() < kLengthBytes) {
      fail_format(path_, "not a safetensors file, or a truncated one: it holds " + std::to_string(file_size()) +
                             " bytes, expected at least 8");
    }
    std::uint64_t length = 0;
    read_at(0, kLengthBytes, &length);
    const std::uint64_t longest = std::min(file_size() - kLengthBytes, kMaxHeaderBytes);
    if (length > longest) {
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

  void read_at(std::uint64_t offset, std::uint64_t size, void* destination) const {
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

  std::string path_;
  Descriptor file_;
  struct stat status_{};
  std::uint64_t data_start_ = 0;
  std::map<std::string, std::string> metadata_;
  std::vector<StoredTensor> tensors_;
};

[[noreturn]] void fail_memory(const std::string& path, std::uint64_t bytes) {
  throw Error(ErrorCode::out_of_memory, path + ": no memory for " + std::to_string(bytes) + " bytes of tensor data");
}

// ---------------------------------------------------------------------------------------------- writing a container

/// A new file in `folder` under a name of its own, removed again unless it becomes the target.
class TemporaryFile {
 public:
  TemporaryFile(std::string target, const std::filesystem::path& folder, mode_t mode)
      : target_(std::move(target)), file_(create(folder, mode)) {}
  ~TemporaryFile() {
    if (!path_.empty()) ::unlink(path_.c_str());
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  void set_mode(mode_t mode) {
    if (::fchmod(file_.number(), mode) != 0) fail_io(target_, "its mode cannot be kept", errno);
  }

  void write(const void* data, std::uint64_t size) {
    const auto* bytes = static_cast<const unsigned char*>(data);
    while (size > 0) {
      const std::size_t wanted = std::min<std::uint64_t>(size, kMaxTransfer);
      const ssize_t written = uninterrupted([&] { return ::write(file_.number(), bytes, wanted); });
      // No progress and no error: no file system should say so, and none may keep us here for ever.
      if (written <= 0) fail_io(target_, "cannot be written", written < 0 ? errno : EIO);
      bytes += written;
      size -= static_cast<std::uint64_t>(written);
    }
  }

  /// Syncs, closes and renames.
  void become_target() {
    if (uninterrupted([&] { return ::fsync(file_.number()); }) != 0)
      fail_io(target_, "cannot be synced to the disk", errno);
    if (file_.close() != 0) fail_io(target_, "cannot be closed", errno);
    if (::rename(path_.c_str(), target_.c_str()) != 0) fail_io(target_, "cannot be replaced", errno);
    path_.clear();
  }

 private:
  // Not derived from the target's name, which may be as long as the file system allows.
  static std::string unique_name() {
    static std::atomic<unsigned> counter{0};
    std::random_device random;
    return ".nvpflow-" + std::to_string(::getpid()) + "-" + std::to_string(counter++) + "-" + std::to_string(random()) +
           ".tmp";
  }

  int create(const std::filesystem::path& folder, mode_t mode) {
    int error = EEXIST;
    for (int attempt = 0; attempt < 100 && error == EEXIST; ++attempt) {
      std::string path = (folder / unique_name()).string();
      const int number =
          uninterrupted([&] { return ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode); });
      if (number >= 0) {
        path_ = std::move(path);
        return number;
      }
      error = errno;
    }
    fail_io(target_, "no temporary file can be made beside it", error);
  }

  std::string target_;
  std::string path_;  // empty: nothing to remove
  Descriptor file_;
};

/// Where a path that may be a symbolic link, dangling or not, ends.
std::filesystem::path follow_links(const std::string& path) {
  std::filesystem::path target = path;
  constexpr int kMostLinks = 40;  // as Linux itself
  for (int i = 0; i <= kMostLinks; ++i) {
    std::error_code error;
    const std::filesystem::file_status status = std::filesystem::symlink_status(target, error);
    if (error && status.type() != std::filesystem::file_type::not_found) {
      fail_io(path, "cannot be examined", error.value());
    }
    if (!std::filesystem::is_symlink(status)) return target;
    const std::filesystem::path next = std::filesystem::read_symlink(target, error);
    if (error) fail_io(path, "its symbolic link cannot be read", error.value());
    target = target.parent_path() / next;  // `next` alone where it is absolute
  }
  fail_io(path, "cannot be resolved", ELOOP);
}

/// Makes the rename durable. File systems and folders that offer no such thing are let pass: those that may be written
/// to and not read, and those that cannot be synced.
void sync_folder(const std::string& path, const std::filesystem::path& folder) {
  const auto fail = [&] { fail_io(path, "was written, but its folder cannot be synced to the disk", errno); };
  Descriptor file(uninterrupted([&] { return ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); }));
  if (file.number() < 0) {
    if (errno != EACCES && errno != EPERM) fail();
  } else if (uninterrupted([&] { return ::fsync(file.number()); }) != 0 && errno != EINVAL && errno != ENOTSUP) {
    fail();
  }
}

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

// ---------------------------------------------------------------------------------------------- the spec as JSON

[[noreturn]] void fail_field(const std::string& field, const json& value, const std::string& expected) {
  throw Error(ErrorCode::file_format, field + " is " + quote(value.dump(-1, ' ', true)) + ", expected " + expected);
}

}  // namespace

json parse_metadata_json(const std::string& text) {
  if (text.size() > kMaxJsonBytes) {
    throw Error(ErrorCode::file_format, "the text is " + std::to_string(text.size()) +
                                            " bytes long, expected at most " + std::to_string(kMaxJsonBytes));
  }
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto check = [&](int depth, json::parse_event_t event, json& parsed) {
    using Event = json::parse_event_t;
    if ((event == Event::object_start || event == Event::array_start) && depth >= kMaxJsonDepth) {
      throw Error(ErrorCode::file_format, "the JSON is nested too deeply");
    }
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event == Event::key && !keys.back().insert(parsed.get_ref<const std::string&>()).second) {
      throw Error(ErrorCode::file_format,
                  "the key " + quote(parsed.get_ref<const std::string&>()) + " appears twice in one object");
    }
    return true;
  };
  json document = json::parse(text, check, /*allow_exceptions=*/false);
  // The parser takes a zero byte for the end of the text.
  if (document.is_discarded() || text.find('\0') != std::string::npos)
    throw Error(ErrorCode::file_format, "the text is not valid JSON");
  return document;
}

namespace {

/// `where` is empty for the spec itself, else "layers[3]".
void check_keys(const json& object, const std::string& where, std::initializer_list<std::string_view> keys) {
  const std::string prefix = where.empty() ? "" : where + ".";
  if (!object.is_object()) fail_field(where.empty() ? "the spec" : where, object, "an object");
  for (const std::string_view key : keys) {
    if (!object.contains(key)) throw Error(ErrorCode::file_format, prefix + std::string(key) + " is missing");
  }
  for (const auto& [key, value] : object.items()) {
    if (std::find(keys.begin(), keys.end(), key) == keys.end()) {
      throw Error(ErrorCode::file_format, prefix + quote(key) + " is not a field of this version of the format");
    }
  }
}

std::int64_t integer_of(const json& value, const std::string& field) {
  constexpr auto kLargest = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  if (!value.is_number_integer() || (value.is_number_unsigned() && value.get<std::uint64_t>() > kLargest)) {
    fail_field(field, value, "a whole number");
  }
  return value.get<std::int64_t>();
}

const std::string& string_of(const json& value, const std::string& field) {
  if (!value.is_string()) fail_field(field, value, "a string");
  return value.get_ref<const std::string&>();
}

/// parse(text) with the field's name in front of what it throws.
template <class Parse>
auto name_from(const json& value, const std::string& field, Parse parse) {
  const std::string& text = string_of(value, field);
  if (text.size() > 80) fail_field(field, value, "a known name");  // an error below quotes the whole text
  try {
    return parse(text);
  } catch (const Error& error) {
    throw Error(ErrorCode::file_format, field + ": " + error.what());
  }
}

LayerSpec layer_from_json(const json& value, const std::string& where) {
  if (!value.is_object() || !value.contains("kind")) check_keys(value, where, {"kind"});
  LayerSpec layer;
  layer.kind = name_from(value["kind"], where + ".kind", parse_layer_kind);
  if (layer.kind == LayerKind::standardize) {
    check_keys(value, where, {"kind"});
    return layer;
  }
  check_keys(value, where, {"kind", "swapped", "hidden_sizes", "activation", "scale_bound"});
  if (!value["swapped"].is_boolean()) fail_field(where + ".swapped", value["swapped"], "true or false");
  layer.swapped = value["swapped"].get<bool>();
  const json& sizes = value["hidden_sizes"];
  if (!sizes.is_array()) fail_field(where + ".hidden_sizes", sizes, "an array");
  for (const json& size : sizes) layer.hidden_sizes.push_back(integer_of(size, where + ".hidden_sizes"));
  layer.activation = name_from(value["activation"], where + ".activation", parse_activation);
  if (!value["scale_bound"].is_number()) fail_field(where + ".scale_bound", value["scale_bound"], "a number");
  layer.scale_bound = value["scale_bound"].get<double>();
  return layer;
}

// ---------------------------------------------------------------------------------------------- models

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

/// "" where they are equal, else the first field that differs.
std::string difference(const FlowSpec& file, const FlowSpec& expected) {
  const auto differs = [](const std::string& field, const std::string& came, const std::string& wanted) {
    return field + " is " + came + " in the file, expected " + wanted;
  };
  if (file == expected) return "";
  if (file.input_size != expected.input_size) {
    return differs("input_size", std::to_string(file.input_size), std::to_string(expected.input_size));
  }
  if (file.dtype != expected.dtype) {
    return differs("dtype", std::string(name_of(file.dtype)), std::string(name_of(expected.dtype)));
  }
  if (file.layers.size() != expected.layers.size()) {
    return differs("the number of layers", std::to_string(file.layers.size()), std::to_string(expected.layers.size()));
  }
  std::size_t i = 0;
  while (file.layers[i] == expected.layers[i]) ++i;
  const LayerSpec& came = file.layers[i];
  const LayerSpec& wanted = expected.layers[i];
  const std::string prefix = "layers[" + std::to_string(i) + "].";
  if (came.kind != wanted.kind) {
    return differs(prefix + "kind", std::string(name_of(came.kind)), std::string(name_of(wanted.kind)));
  }
  if (came.swapped != wanted.swapped) {
    return differs(prefix + "swapped", came.swapped ? "true" : "false", wanted.swapped ? "true" : "false");
  }
  if (came.hidden_sizes != wanted.hidden_sizes) {
    return differs(prefix + "hidden_sizes", text_of(came.hidden_sizes), text_of(wanted.hidden_sizes));
  }
  if (came.activation != wanted.activation) {
    return differs(prefix + "activation", std::string(name_of(came.activation)),
                   std::string(name_of(wanted.activation)));
  }
  return differs(prefix + "scale_bound", json(came.scale_bound).dump(), json(wanted.scale_bound).dump());
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

/// The spec of a file of tensors alone. What does not fit together shows when the tensors are matched with its layout.
FlowSpec infer_spec(const std::string& path, const TensorsByName& tensors) {
  FlowSpec spec;
  for (std::size_t k = 0;; ++k) {
    const std::string name = "flow_" + std::to_string(k);
    const StoredTensor* const scale = find_kernel(path, tensors, name + "_scale.kernel");
    if (scale == nullptr) break;
    LayerSpec& layer = spec.layers.emplace_back();
    layer.swapped = k % 2 == 1;
    const StoredTensor* first = scale;
    for (std::size_t j = 0;; ++j) {
      const StoredTensor* const dense =
          find_kernel(path, tensors, name + "_coupling_dense_" + std::to_string(j) + ".kernel");
      if (dense == nullptr) break;
      if (j == 0) first = dense;
      layer.hidden_sizes.push_back(dense->shape[1]);
    }
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
    spec = spec_from_json(text->second);
  } catch (const Error& error) {
    fail_format(file.path(), std::string(kSpecKey) + ": " + error.what());
  }
  const auto dtype = metadata.find(kDTypeKey);
  if (dtype == metadata.end() || dtype->second != name_of(spec.dtype)) {
    fail_format(file.path(), std::string("metadata key ") + kDTypeKey + " is " +
                                 (dtype == metadata.end() ? "missing" : quote(dtype->second)) + ", expected '" +
                                 std::string(name_of(spec.dtype)) + "' as in " + kSpecKey);
  }
  const std::string difference_found = expected != nullptr ? difference(spec, *expected) : "";
  if (!difference_found.empty()) fail_format(file.path(), difference_found);
  return spec;
}

/// Empty where the file has none.
std::vector<std::string> column_names_of(const ContainerReader& file, std::int64_t input_size) {
  const auto text = file.metadata().find(kColumnNamesKey);
  if (text == file.metadata().end()) return {};
  const auto fail = [&](const std::string& what) {
    fail_format(file.path(), std::string(kColumnNamesKey) + ": " + what);
  };
  json document;
  try {
    document = parse_metadata_json(text->second);
  } catch (const Error& error) {
    fail(error.what());
  }
  const std::string expected = "expected an array of " + std::to_string(input_size) + " strings";
  if (!document.is_array()) fail("the text is no array, " + expected);
  if (static_cast<std::int64_t>(document.size()) != input_size) {
    fail("the array holds " + std::to_string(document.size()) + " values, " + expected);
  }
  std::vector<std::string> names;
  names.reserve(document.size());
  for (json& name : document) {
    if (!name.is_string()) fail("value " + std::to_string(names.size()) + " is no string, " + expected);
    names.push_back(std::move(name.get_ref<std::string&>()));
  }
  return names;
}

double number_of(const json& value, const std::string& field) {
  if (!value.is_number()) fail_field(field, value, "a number");
  return value.get<double>();
}

Threshold threshold_from_json(const std::string& text) {
  const json document = parse_metadata_json(text);
  if (!document.is_object()) throw Error(ErrorCode::file_format, "the text is no object");
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

std::string threshold_to_json(const Threshold& threshold) {
  const bool known = !std::isnan(threshold.quantile);
  return json{{"log_prob", threshold.log_prob}, {"quantile", known ? json(threshold.quantile) : json()}}.dump();
}

/// As JSON text; Error(invalid_argument) where that cannot be.
std::string names_to_json(const std::vector<std::string>& column_names) {
  std::string text;
  try {
    text = json(column_names).dump();
  } catch (const json::exception&) {
    throw Error(ErrorCode::invalid_argument, "column_names holds a name that is not UTF-8");
  }
  if (text.size() > kMaxJsonBytes) {
    throw Error(ErrorCode::invalid_argument, "column_names takes " + std::to_string(text.size()) +
                                                 " bytes as JSON, expected at most " + std::to_string(kMaxJsonBytes));
  }
  return text;
}

/// A few bytes of description can ask for thousands of tensors, each with a name, a shape and an offset: no layout is
/// made for a file that does not hold about as many.
void check_count(const std::string& path, const FlowSpec& spec, std::size_t held) {
  std::int64_t wanted = 0;
  for (const LayerSpec& layer : spec.layers) wanted += layer.num_tensors();
  constexpr std::size_t kAlwaysListed = 64;  // so that a message can name the one that is missing
  if (static_cast<std::size_t>(wanted) <= 2 * held + kAlwaysListed) return;
  fail_format(path, "the file holds " + std::to_string(held) + " tensors, expected the " + std::to_string(wanted) +
                        " of its description");
}

/// kMeanLowName as a tensor beside the layout's, which has the shape of the mean. Only where takes_float64_rows.
TensorInfo mean_low_of(const ParamLayout& layout) {
  TensorInfo tensor = layout.tensors().front();
  tensor.name = kMeanLowName;
  return tensor;
}

/// The layout's tensors, and behind them kMeanLowName where the file has it and may have it.
std::vector<TensorInfo> wanted_tensors(const TensorsByName& tensors, const FlowSpec& spec, const ParamLayout& layout) {
  std::vector<TensorInfo> wanted = layout.tensors();
  if (takes_float64_rows(spec) && tensors.contains(kMeanLowName)) wanted.push_back(mean_low_of(layout));
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

void write_tensor_file(const std::string& path, const std::map<std::string, std::string>& metadata,
                       const std::vector<FileTensor>& tensors) {
  check_path(path);
  const std::string header = make_header(metadata, tensors);
  const std::filesystem::path target = follow_links(path);
  const std::filesystem::path folder = target.has_parent_path() ? target.parent_path() : ".";

  struct stat old{};
  const bool exists = ::stat(target.c_str(), &old) == 0;
  if (!exists && errno != ENOENT) fail_io(path, "cannot be written", errno);
  if (exists) {
    check_regular(path, old);
    if (::access(target.c_str(), W_OK) != 0) fail_io(path, "cannot be written", errno);
  }
  constexpr mode_t kReadWriteForAll = 0666;  // less the umask
  const mode_t mode = exists ? old.st_mode & 07777 : kReadWriteForAll;
  TemporaryFile temporary(target.string(), folder, mode & kReadWriteForAll);
  if (exists) temporary.set_mode(mode);
  temporary.write(header.data(), header.size());
  for (const FileTensor& tensor : tensors) temporary.write(tensor.data, byte_count(tensor));
  temporary.become_target();
  sync_folder(path, folder);
}

TensorFile read_tensor_file(const std::string& path) {
  const ContainerReader reader(path);
  TensorFile file;
  try {
    file.bytes = std::make_unique_for_overwrite<unsigned char[]>(reader.data_size());
  } catch (const std::bad_alloc&) {
    fail_memory(path, reader.data_size());
  }
  reader.read_data(0, reader.data_size(), file.bytes.get());
  reader.check_unchanged();
  file.metadata = reader.metadata();
  for (const StoredTensor& stored : reader.tensors()) {
    file.tensors.push_back({stored.name, stored.dtype, stored.shape, file.bytes.get() + stored.begin});
  }
  return file;
}

std::string spec_to_json(const FlowSpec& spec) {
  nlohmann::ordered_json layers = nlohmann::ordered_json::array();
  for (const LayerSpec& layer : spec.layers) {
    nlohmann::ordered_json& entry = layers.emplace_back();
    entry["kind"] = name_of(layer.kind);
    if (layer.kind == LayerKind::standardize) continue;
    entry["swapped"] = layer.swapped;
    entry["hidden_sizes"] = layer.hidden_sizes;
    entry["activation"] = name_of(layer.activation);
    entry["scale_bound"] = layer.scale_bound;
  }
  nlohmann::ordered_json document;
  document["input_size"] = spec.input_size;
  document["dtype"] = name_of(spec.dtype);
  document["layers"] = std::move(layers);
  return document.dump();
}

FlowSpec spec_from_json(const std::string& text) {
  const json document = parse_metadata_json(text);
  check_keys(document, "", {"input_size", "dtype", "layers"});
  FlowSpec spec;
  spec.input_size = integer_of(document["input_size"], "input_size");
  spec.dtype = name_from(document["dtype"], "dtype", parse_dtype);
  const json& layers = document["layers"];
  if (!layers.is_array()) fail_field("layers", layers, "an array");
  for (std::size_t i = 0; i < layers.size(); ++i) {
    spec.layers.push_back(layer_from_json(layers[i], "layers[" + std::to_string(i) + "]"));
  }
  try {
    spec.validate();
  } catch (const Error& error) {
    throw Error(ErrorCode::file_format, error.what());
  }
  return spec;
}

void check_column_names(const std::vector<std::string>& names, std::int64_t input_size) {
  if (!names.empty() && static_cast<std::int64_t>(names.size()) != input_size) {
    throw Error(ErrorCode::invalid_argument, "column_names holds " + std::to_string(names.size()) +
                                                 " names, expected " + std::to_string(input_size) + " or none");
  }
  names_to_json(names);
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

std::string difference(const std::vector<std::string>& names, const std::vector<std::string>& expected) {
  for (std::size_t i = 0; i < std::min(names.size(), expected.size()); ++i) {
    if (names[i] != expected[i]) {
      return "column " + std::to_string(i + 1) + " is " + quote(names[i]) + ", expected " + quote(expected[i]);
    }
  }
  return "";
}

void save_model(const std::string& path, const FlowSpec& spec, const ParamLayout& layout, const void* parameters,
                const std::vector<std::string>& column_names, const std::optional<Threshold>& threshold,
                const std::vector<float>& mean_low) {
  std::vector<FileTensor> tensors;
  const auto add = [&](const TensorInfo& tensor, const void* values) {
    const std::string wrong = describe_not_finite(tensor, spec.dtype, values);
    if (!wrong.empty()) throw Error(ErrorCode::invalid_argument, path + ": not saved: " + wrong);
    tensors.push_back({tensor.name, spec.dtype, tensor.shape, values});
  };
  for (const TensorInfo& tensor : layout.tensors()) {
    add(tensor, static_cast<const unsigned char*>(parameters) + byte_offset(tensor, spec.dtype));
  }
  if (!mean_low.empty()) add(mean_low_of(layout), mean_low.data());
  std::map<std::string, std::string> metadata = {{kVersionKey, mean_low.empty() ? kFormatVersion : kMeanLowVersion},
                                                 {kLibraryKey, version()},
                                                 {kDTypeKey, std::string(name_of(spec.dtype))},
                                                 {kSpecKey, spec_to_json(spec)}};
  if (!column_names.empty()) {
    check_column_names(column_names, spec.input_size);
    metadata[kColumnNamesKey] = names_to_json(column_names);
  }
  if (threshold) {
    check_threshold(*threshold);
    metadata[kThresholdKey] = threshold_to_json(*threshold);
  }
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
  model.column_names = column_names_of(file, model.spec.input_size);
  model.threshold = threshold_of(file);

  // Not before here: the tensors are all in the file, so the size asked for is the file's own.
  try {
    model.parameters.resize(static_cast<std::size_t>(layout.size() * size_of(dtype)));
  } catch (const std::bad_alloc&) {
    fail_memory(path, file.data_size());
  }
  const auto read = [&](const TensorInfo& tensor, void* values) {
    const StoredTensor& stored = *tensors.at(tensor.name);
    file.read_data(stored.begin, stored.end, static_cast<unsigned char*>(values));
    const std::string wrong = describe_not_finite(tensor, dtype, values);
    if (!wrong.empty()) fail_format(path, wrong);
  };
  for (const TensorInfo& tensor : layout.tensors()) {
    read(tensor, model.parameters.data() + byte_offset(tensor, dtype));
  }
  if (takes_float64_rows(model.spec) && tensors.contains(kMeanLowName)) {
    model.mean_low.resize(static_cast<std::size_t>(model.spec.input_size));
    read(mean_low_of(layout), model.mean_low.data());
  }
  file.check_unchanged();
  return model;
}

}  // namespace nvpflow
