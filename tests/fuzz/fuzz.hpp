// What the fuzz targets share, under libFuzzer and under replay.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#ifdef NVPFLOW_FUZZ_REPLAY
inline constexpr bool kReplay = true;
inline std::size_t fuzz_mutate(std::uint8_t*, std::size_t size, std::size_t) { return size; }
#else
inline constexpr bool kReplay = false;
extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t most);
inline std::size_t fuzz_mutate(std::uint8_t* data, std::size_t size, std::size_t most) {
  return LLVMFuzzerMutate(data, size, most);
}
#endif

/// A promise that no input may break.
inline void require(bool kept, const char* promise) {
  if (kept) return;
  std::fprintf(stderr, "broken: %s\n", promise);
  std::abort();
}

/// FNV-1a.
inline std::uint64_t hash_of(const std::uint8_t* data, std::size_t size) {
  std::uint64_t hash = 14695981039346656037ULL;
  for (std::size_t i = 0; i < size; ++i) hash = (hash ^ data[i]) * 1099511628211ULL;
  return hash >> 7;
}
