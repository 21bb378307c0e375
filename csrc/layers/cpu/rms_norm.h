// RMSNorm: each row is read from memory once a pass. The weight's gradient is a sum over rows: blocks of rows leave
// theirs apart, and these are added in the order of the blocks, so that it does not depend on the number of threads.
#pragma once

#include <cmath>

#include "common/cpu/memory.h"
#include "layers/cpu/rows.h"
#include "layers/params.h"

namespace {

constexpr int64_t kNormRows = 32;  // of a block

template <typename T>
void norm_row(const ledom_rms_norm_params& p, int64_t row) {
    const T *x = static_cast<const T*>(p.x) + row * p.width, *weight = static_cast<const T*>(p.weight);
    T* y = static_cast<T*>(p.y) + row * p.width;
    const float squares = sum_of_row(p.width, [=](int64_t i, int lanes) __attribute__((always_inline)) {
        const Floats value = read_some(x + i, lanes);
        return value * value;
    });
    const float scale = 1.0f / sqrtf(squares / static_cast<float>(p.width) + p.eps);
    p.scale[row] = scale;
    for_vectors(p.width, [=](int64_t i, int lanes) __attribute__((always_inline)) {
        write_some(read_some(x + i, lanes) * scale * read_some(weight + i, lanes), y + i, lanes);
    });
}

// d_x of a row; what it adds to the weight's gradient joins `d_weight`, whose length is that of whole vectors.
template <typename T>
void norm_row_backward(const ledom_rms_norm_params& p, int64_t row, float* d_weight) {
    const T *x = static_cast<const T*>(p.x) + row * p.width, *weight = static_cast<const T*>(p.weight);
    const T* d_y = static_cast<const T*>(p.d_y) + row * p.width;
    T* d_x = static_cast<T*>(p.d_x) + row * p.width;
    const float scale = p.scale[row];
    const float product = sum_of_row(p.width, [=](int64_t i, int lanes) __attribute__((always_inline)) {
        return read_some(d_y + i, lanes) * read_some(weight + i, lanes) * (read_some(x + i, lanes) * scale);
    });
    const float mean = product / static_cast<float>(p.width);
    for_vectors(p.width, [=](int64_t i, int lanes) __attribute__((always_inline)) {
        const Floats normed = read_some(x + i, lanes) * scale, d = read_some(d_y + i, lanes);
        write_some((d * read_some(weight + i, lanes) - normed * mean) * scale, d_x + i, lanes);
        store(d_weight + i, load(d_weight + i) + d * normed);
    });
}

template <typename T>
int rms_norm_backward(const ledom_rms_norm_params& p) {
    const int64_t blocks = (p.rows + kNormRows - 1) / kNormRows, stride = (p.width + kLanes - 1) / kLanes * kLanes;
    const Memory parts(static_cast<size_t>(blocks) * stride);
    if (parts.get() == nullptr) return LEDOM_OUT_OF_MEMORY;
    T* d_weight = static_cast<T*>(p.d_weight);
#pragma omp parallel num_threads(p.num_threads)
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            float* part = parts.get() + block * stride;
            memset(part, 0, sizeof(float) * stride);
            const int64_t end = (block + 1) * kNormRows < p.rows ? (block + 1) * kNormRows : p.rows;
            for (int64_t row = block * kNormRows; row < end; ++row) norm_row_backward<T>(p, row, part);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < stride; i += kLanes) {
            Floats sum = {};
            for (int64_t block = 0; block < blocks; ++block) sum += load(parts.get() + block * stride + i);
            write_some(sum, d_weight + i, p.width - i < kLanes ? static_cast<int>(p.width - i) : kLanes);
        }
    }
    return LEDOM_OK;
}

template <typename T>
int rms_norm(const ledom_rms_norm_params& p, bool is_backward) {
    if (is_backward) return rms_norm_backward<T>(p);
#pragma omp parallel for schedule(static) num_threads(p.num_threads)
    for (int64_t row = 0; row < p.rows; ++row) norm_row<T>(p, row);
    return LEDOM_OK;
}

}  // namespace
