// What a CUDA thread can do that C++ cannot say, as functions. All inline assembly of the sm_80 kernels is here; a
// plain C++ compiler gets the same functions from csrc/emulation/ and runs the same kernels on the CPU, in tests.
//
// Addresses in shared memory are 32-bit numbers of that space (`shared_address`). Every function that reads or writes
// memory says "memory" to the compiler, so that nothing is moved across it. Source of each: PTX ISA 9.0, section 9.7.
//
// Fragments of the matrix product, lane = 4 * g + t; each register of a and b holds two bf16, the lower column first:
//
//     a (16 rows x 16)          b (16 x 8 columns)          c (16 rows x 8 columns)
//     a0: row g,     2t 2t+1    b0: rows 2t 2t+1, col g     c0 c1: row g,     2t 2t+1
//     a1: row g + 8, 2t 2t+1    b1: rows 2t + 8 2t + 9      c2 c3: row g + 8, 2t 2t+1
//     a2, a3: as a0, a1, columns + 8
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define LEDOM_DEVICE __device__ __forceinline__
// The block's shared memory, all of it: its size is given at launch.
#define LEDOM_SHARED_MEMORY(name) extern __shared__ __align__(128) char name[]

namespace ledom {

LEDOM_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Starts a copy of 16 bytes from global to shared memory, both aligned to 16; zeros arrive if not `is_valid`.
LEDOM_DEVICE void copy_async_16(uint32_t to, const void* from, bool is_valid) {
    const int bytes = is_valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// The same for 4 bytes.
LEDOM_DEVICE void copy_async_4(uint32_t to, const void* from, bool is_valid) {
    const int bytes = is_valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// The copies that this thread has started since the last commit become a group.
LEDOM_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until all groups of this thread but the last `kKeep` have arrived. Other threads see the data after a barrier.
template <int kKeep>
LEDOM_DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kKeep) : "memory");
}

// Four 8 x 8 matrices of bf16. Lane i gives the address of row i % 8 of matrix i / 8; register m of lane 4 * g + t
// gets columns 2t and 2t + 1 of row g of matrix m.
LEDOM_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

// The same, each matrix transposed.
LEDOM_DEVICE void load_matrices_transposed(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

// c += a b, bf16 with fp32 sums.
LEDOM_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two bf16, rounded to nearest even; `low` goes to the lower half.
LEDOM_DEVICE uint32_t pack_bf16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// 2^x, its relative error at most 2^-22; 0 where the result would be subnormal.
LEDOM_DEVICE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

LEDOM_DEVICE void store_shared_4(uint32_t to, uint32_t value) {
    asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(to), "r"(value) : "memory");
}

LEDOM_DEVICE float load_shared_float(uint32_t from) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];\n" : "=f"(value) : "r"(from) : "memory");
    return value;
}

LEDOM_DEVICE uint4 load_shared_16(uint32_t from) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}

LEDOM_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }

}  // namespace ledom

#else

#include "emulation/device.h"

#define LEDOM_DEVICE inline
#define LEDOM_SHARED_MEMORY(name) char* const name = ::emulation::shared_memory()

#endif

namespace ledom {

// The two numbers of a packed pair.
LEDOM_DEVICE float low_of(uint32_t packed) { return float_of_bits(packed << 16); }
LEDOM_DEVICE float high_of(uint32_t packed) { return float_of_bits(packed & 0xffff0000u); }

LEDOM_DEVICE int lane() { return static_cast<int>(threadIdx.x) % 32; }
LEDOM_DEVICE int warp() { return static_cast<int>(threadIdx.x) / 32; }

// The sum over the 4 lanes that share the rows of a c fragment, and their maximum; all 4 get it.
LEDOM_DEVICE float sum_of_quad(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

LEDOM_DEVICE float maximum_of_quad(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

}  // namespace ledom
