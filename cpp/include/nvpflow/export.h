/** @file
 * The mark of the library's public symbols: all others are hidden. For C and C++. */
#ifndef NVPFLOW_EXPORT_H
#define NVPFLOW_EXPORT_H

/** Marks a public symbol. */
#if defined(__GNUC__) || defined(__clang__)
#define NVPFLOW_API __attribute__((visibility("default")))
#else
#define NVPFLOW_API
#endif

#endif
