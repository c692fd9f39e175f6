#include "descriptor.hpp"

#include <sys/stat.h>

#include <cerrno>
#include <string>

#include <nvpflow/error.hpp>

#include "messages.hpp"

namespace nvpflow::io {

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

}  // namespace nvpflow::io
