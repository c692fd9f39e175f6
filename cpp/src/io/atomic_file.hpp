// Files that are replaced whole or not at all.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace nvpflow::io {

struct Bytes {
  const void* data = nullptr;
  std::uint64_t size = 0;
};

/// Atomic: a temporary file in the folder of `path` is written, synced and renamed. On failure (Error(io)) the old file
/// is as it was and no temporary is left. A symbolic link stays and its target is replaced; the mode of an existing
/// file is kept, and one that this process may not write is refused. `parts` are written one behind the other.
void replace_file(const std::string& path, const std::vector<Bytes>& parts);

}  // namespace nvpflow::io
