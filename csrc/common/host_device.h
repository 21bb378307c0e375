// One definition for the CPU and for CUDA: a function marked LEDOM_HD is compiled for both by nvcc, and is an
// ordinary inline function for any other compiler.
#pragma once

#if defined(__CUDACC__)
#define LEDOM_HD __host__ __device__ __forceinline__
#else
#define LEDOM_HD inline
#endif
