// Cross entropy without the table of probabilities: forward reads the logits and leaves three numbers a row, backward
// turns logits into their gradient, in place if asked.
#pragma once

#include <cmath>

#include "layers/cpu/rows.h"
#include "layers/params.h"

namespace {

// The target's place in this part of the vocabulary, or -1.
LEDOM_INLINE int64_t place_of(const ledom_cross_entropy_params& p, int64_t row) {
    const int64_t at = p.targets[row] - p.first;
    return at >= 0 && at < p.width ? at : -1;
}

template <typename T>
void entropy_row(const ledom_cross_entropy_params& p, int64_t row) {
    const T* logits = static_cast<const T*>(p.logits) + row * p.width;
    Floats tops = splat(-INFINITY), doubts = {};
    for_vectors(p.width, [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const Floats value = read_some(logits + i, lanes, -INFINITY);
        tops = larger(value, tops);
        doubts += value != value ? splat(1.0f) : Floats{};  // a comparison passes over NaN
    });
    const float top = total(doubts) > 0.0f ? NAN : largest(tops);
    p.maximum[row] = top;
    p.sum[row] = sum_of_row(p.width, [=](int64_t i, int lanes) __attribute__((always_inline)) {
        return exponential(read_some(logits + i, lanes, -INFINITY) - top);
    });
    const int64_t at = place_of(p, row);
    p.predicted[row] = at < 0 ? 0.0f : to_float(logits[at]);
}

template <typename T>
void entropy_row_backward(const ledom_cross_entropy_params& p, int64_t row) {
    const T* logits = static_cast<const T*>(p.logits) + row * p.width;
    T* d_logits = static_cast<T*>(p.d_logits) + row * p.width;
    const float lse = p.lse[row], d_loss = p.d_loss[row];
    const int64_t at = place_of(p, row);
    const float at_target = at < 0 ? 0.0f : (expf(to_float(logits[at]) - lse) - 1.0f) * d_loss;
    for_vectors(p.width, [=](int64_t i, int lanes) __attribute__((always_inline)) {
        write_some(exponential(read_some(logits + i, lanes) - lse) * d_loss, d_logits + i, lanes);
    });
    if (at >= 0) from_float(at_target, d_logits + at);
}

template <typename T>
int cross_entropy(const ledom_cross_entropy_params& p, bool is_backward) {
#pragma omp parallel for schedule(static) num_threads(p.num_threads)
    for (int64_t row = 0; row < p.rows; ++row) {
        if (is_backward) {
            entropy_row_backward<T>(p, row);
        } else {
            entropy_row<T>(p, row);
        }
    }
    return LEDOM_OK;
}

}  // namespace
