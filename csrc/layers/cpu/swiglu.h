// SwiGLU in one pass over memory. The backward pass computes the sigmoid again instead of reading it.
#pragma once

#include "layers/cpu/rows.h"
#include "layers/params.h"

namespace {

// 1 / (1 + e^-x), and 0 where e^-x is beyond what `exponential` has.
LEDOM_INLINE Floats sigmoid(Floats x) {
    const Floats opposite = -x;
    return opposite > 88.0f ? Floats{} : 1.0f / (1.0f + exponential(opposite));
}

template <typename T>
void swiglu_row(const T* x, int64_t width, T* y) {
    for_vectors(width, [=](int64_t i, int lanes) __attribute__((always_inline)) {
        const Floats gate = read_some(x + i, lanes), up = read_some(x + width + i, lanes);
        write_some(gate * sigmoid(gate) * up, y + i, lanes);
    });
}

template <typename T>
void swiglu_row_backward(const T* x, const T* d_y, int64_t width, T* d_x) {
    for_vectors(width, [=](int64_t i, int lanes) __attribute__((always_inline)) {
        const Floats gate = read_some(x + i, lanes), up = read_some(x + width + i, lanes);
        const Floats d = read_some(d_y + i, lanes), part = sigmoid(gate), silu = gate * part;
        write_some(d * up * (part + silu * (1.0f - part)), d_x + i, lanes);
        write_some(d * silu, d_x + width + i, lanes);
    });
}

template <typename T>
int swiglu(const ledom_swiglu_params& p, bool is_backward) {
    const T *x = static_cast<const T*>(p.x), *d_y = static_cast<const T*>(p.d_y);
    T *y = static_cast<T*>(p.y), *d_x = static_cast<T*>(p.d_x);
#pragma omp parallel for schedule(static) num_threads(p.num_threads)
    for (int64_t row = 0; row < p.rows; ++row) {
        if (is_backward) {
            swiglu_row_backward(x + 2 * row * p.width, d_y + row * p.width, p.width, d_x + 2 * row * p.width);
        } else {
            swiglu_row(x + 2 * row * p.width, p.width, y + row * p.width);
        }
    }
    return LEDOM_OK;
}

}  // namespace
