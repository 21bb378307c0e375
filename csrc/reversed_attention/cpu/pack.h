// Rows of a tensor into the contiguous fp32 layouts that `multiply` reads, and back. Both dtypes come and go here:
// between, all is fp32.
#pragma once

#include "reversed_attention/cpu/vector.h"
#include "reversed_attention/params.h"

namespace {

struct Bfloat16 {
    uint16_t bits;
};

LEDOM_INLINE float to_float(float value) { return value; }
LEDOM_INLINE float to_float(Bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

LEDOM_INLINE void from_float(float value, float* to) { *to = value; }
LEDOM_INLINE void from_float(float value, Bfloat16* to) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to->bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
}

// One head of one sequence: rows `stride` elements apart.
template <typename T>
struct Rows {
    T* data;
    ptrdiff_t stride;
    LEDOM_INLINE T* operator[](ptrdiff_t row) const { return data + row * stride; }
};

template <typename T>
LEDOM_INLINE Rows<T> head_of(const ledom_tensor& tensor, int64_t batch, int64_t head) {
    T* data = static_cast<T*>(tensor.data) + batch * tensor.stride_batch + head * tensor.stride_head;
    return {data, static_cast<ptrdiff_t>(tensor.stride_seq)};
}

// to[row][0 .. padded): the rows begin .. begin + count as they are, zeros after the head dim and after `seq`.
template <typename T>
void copy_rows(Rows<T> from, int begin, int count, int seq, int dim, int padded, float* to, ptrdiff_t to_stride) {
    for (int row = 0; row < count; ++row, to += to_stride) {
        const int used = begin + row < seq ? dim : 0;
        const T* line = from[begin + row];
        for (int d = 0; d < used; ++d) to[d] = to_float(line[d]);
        for (int d = used; d < padded; ++d) to[d] = 0.0f;
    }
}

// to[d][lane]: `count` rows become the lanes, times `scale`; zeros after the head dim and after `seq`.
template <typename T>
void turn_rows(Rows<T> from, int begin, int count, int seq, int dim, int padded, float scale, float* to) {
    const int rows = begin + count <= seq ? count : seq - begin;
    if (rows < count || dim < padded) memset(to, 0, sizeof(float) * count * padded);
    constexpr int kBlock = 16;  // of d: a line of the cache is read once
    for (int d0 = 0; d0 < dim; d0 += kBlock) {
        const int d1 = d0 + kBlock < dim ? d0 + kBlock : dim;
        for (int row = 0; row < rows; ++row) {
            const T* line = from[begin + row];
            for (int d = d0; d < d1; ++d) to[d * count + row] = to_float(line[d]) * scale;
        }
    }
}

// The inverse: lanes become rows, each times its own factor.
template <typename T>
void turn_back(const float* from, int begin, int count, int seq, int dim, const float* factor, Rows<T> to) {
    const int rows = begin + count <= seq ? count : seq - begin;
    for (int row = 0; row < rows; ++row) {
        T* line = to[begin + row];
        for (int d = 0; d < dim; ++d) from_float(from[d * count + row] * factor[row], line + d);
    }
}

// to[panel][row][lane]: the head dim cut into panels of `width`, the rows of each panel one after the other.
template <typename T>
void cut_rows(Rows<T> from, int begin, int count, int seq, int dim, int padded, int width, float* to) {
    for (int row = 0; row < count; ++row) {
        const int used = begin + row < seq ? dim : 0;
        const T* line = from[begin + row];
        for (int d = 0; d < padded; ++d) {
            float* at = to + (static_cast<ptrdiff_t>(d / width) * count + row) * width + d % width;
            *at = d < used ? to_float(line[d]) : 0.0f;
        }
    }
}

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace
