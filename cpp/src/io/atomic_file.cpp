#include "atomic_file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <random>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "descriptor.hpp"
#include "messages.hpp"

namespace nvpflow::io {
namespace {

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
    target = target.parent_path() / next;  // just `next` where it is absolute
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

}  // namespace

void replace_file(const std::string& path, const std::vector<Bytes>& parts) {
  check_path(path);
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
  for (const Bytes& part : parts) temporary.write(part.data, part.size);
  temporary.become_target();
  sync_folder(path, folder);
}

}  // namespace nvpflow::io
