/** @file
 * What the library offers to others: everything else is hidden. For C and C++. */
#ifndef NVPFLOW_EXPORT_H
#define NVPFLOW_EXPORT_H

/** Marks what the library offers. */
#if defined(__GNUC__) || defined(__clang__)
#define NVPFLOW_API __attribute__((visibility("default")))
#else
#define NVPFLOW_API
#endif

#endif
