// One definition for the CPU and for CUDA: a function marked LEDOM_HD is compiled for both by nvcc. Elsewhere it is a
// static inline function: static, because the CPU kernels are compiled several times for different processors, and the
// linker must not keep one copy for all of them.
#pragma once

#if defined(__CUDACC__)
#define LEDOM_HD __host__ __device__ __forceinline__
#else
#define LEDOM_HD static inline
#endif
