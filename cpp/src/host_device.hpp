// What marks a function that a device's compiler makes for the device, too.
#pragma once

#if defined(__CUDACC__)
#define NVPFLOW_HOST_DEVICE __host__ __device__
#else
#define NVPFLOW_HOST_DEVICE
#endif
