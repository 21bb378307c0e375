// Vectors of floats and what the kernels do with them, for whatever processor this file is compiled for: GCC's and
// Clang's vector extension turns into AVX-512, AVX2 or SSE2 by the compiler's flags alone.
//
// Everything is in an unnamed namespace: each copy belongs to one object file and one set of flags.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float)), aligned(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(kLanes * sizeof(int32_t))));
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t)), aligned(kLanes * sizeof(uint32_t))));

// Registers decide these: a block of kBroadcast x kVectors sums, the vectors of one step and a broadcast value fit.
// Two shapes, because the lanes run over rows in one kind of product and over the head dim in the other.
#if defined(__AVX512F__)
constexpr int kRowVectors = 3, kRowBroadcast = 8;
constexpr int kDimVectors = 2, kDimBroadcast = 12;
#elif defined(__AVX2__)
constexpr int kRowVectors = 3, kRowBroadcast = 4;
constexpr int kDimVectors = 2, kDimBroadcast = 6;
#else
constexpr int kRowVectors = 2, kRowBroadcast = 4;
constexpr int kDimVectors = 2, kDimBroadcast = 4;
#endif

#define LEDOM_INLINE inline __attribute__((always_inline))

LEDOM_INLINE Floats load(const float* at) { return *reinterpret_cast<const Floats*>(at); }
LEDOM_INLINE void store(float* at, Floats value) { *reinterpret_cast<Floats*>(at) = value; }
LEDOM_INLINE Floats splat(float value) { return value - Floats{}; }
// a * b + c, rounded once where the processor can and `multiply` does.
LEDOM_INLINE float multiply_add(float a, float b, float c) {
#if defined(__FMA__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}
LEDOM_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Added, it leaves the nearest integer in the lowest bits of a number: 1.5 * 2^23.
constexpr float kShift = 12582912.0f;

// 2 to the power of n + f, for f in -0.5 .. 0.5 and `shifted` = n + kShift; wraps around below -126.
LEDOM_INLINE Floats power_of_parts(Floats f, Floats shifted) {
    // Minimax in the relative error: 1.6e-8 before rounding.
    Floats p = splat(1.53458118828391e-4f);
    p = p * f + 1.3399931217935109e-3f;
    p = p * f + 9.6184889575471e-3f;
    p = p * f + 5.550328776968815e-2f;
    p = p * f + 2.402264689063016e-1f;
    p = p * f + 6.931472057372658e-1f;
    p = p * f + 1.0f;
    return (Floats)((Bits)p + ((Bits)shifted << 23));
}

// `value`, that of a power of x >= least; 0 below, and NaN for NaN: the addition of exponents above makes a number of a
// NaN whose lowest bits are set. `larger` gives its second argument where one is NaN, so there is no branch.
LEDOM_INLINE Floats from_least(float least, Floats x, Floats value) {
    return x >= least ? value : larger(Floats{}, x);
}

// 2 to the power of x, for x <= 127; 0 below -126, and NaN for NaN. Relative error about 1e-7.
LEDOM_INLINE Floats power_of_two(Floats x) {
    const Floats shift = splat(kShift), shifted = x + shift;
    const Floats value = power_of_parts(x - (shifted - shift), shifted);
    return from_least(-126.0f, x, value);
}

// e to the power of x, for x <= 88; 0 below -87, and NaN for NaN. Relative error about 1e-7 for large |x| too: the
// multiple of ln 2 is taken off in two parts, of which the first has no rounding.
LEDOM_INLINE Floats exponential(Floats x) {
    const Floats shift = splat(kShift), shifted = x * 1.44269504088896340736f + shift, n = shifted - shift;
    const Floats rest = (x - n * 0.693359375f) - n * -2.12194440054690583e-4f;
    const Floats value = power_of_parts(rest * 1.44269504088896340736f, shifted);
    return from_least(-87.0f, x, value);
}

enum class Into { kStore, kAdd, kScaleAndAdd };

// c[r][lane] = sum over k < n of a[r * a_row + k * a_step] * b[k * b_step + lane], for kRows x (kVectors * kLanes)
// sums that stay in registers; kAdd adds them to what c holds, kScaleAndAdd first multiplies that by scale[lane]. What c
// holds joins last: the error of a long sum grows with the number of blocks and not with that of their terms.
template <int kRows, int kVectors, Into kInto>
LEDOM_INLINE void multiply(int n, const float* a, ptrdiff_t a_row, ptrdiff_t a_step, const float* b, ptrdiff_t b_step,
                           float* c, ptrdiff_t c_row, const float* scale = nullptr) {
    Floats sum[kRows][kVectors] = {};
    for (int k = 0; k < n; ++k) {
        Floats right[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * b_step + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            const Floats left = splat(a[r * a_row + k * a_step]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            float* at = c + r * c_row + v * kLanes;
            if (kInto == Into::kAdd) sum[r][v] += load(at);
            if (kInto == Into::kScaleAndAdd) sum[r][v] += load(at) * load(scale + v * kLanes);
            store(at, sum[r][v]);
        }
    }
}

}  // namespace
