// Rotary positions on the GPU, counted from a document's end or its beginning. Memory sets the pace: a block takes one
// token, and a thread the next few pairs of one of its heads, so that a warp reads and writes whole lines.
//
//     not interleaved   x  a0 a1 a2 a3 ... | b0 b1 b2 b3 ...      interleaved   x  a0 b0 a1 b1 | a2 b2 a3 b3 ...
//     thread 0             ^^^^^^^^^^^       ^^^^^^^^^^^                           ^^^^^^^^^^^   ^^^^^^^^^^^
//
// Each thread reads all that it turns before it writes any of it: y may be x.
#pragma once

#include "reversed_attention/cuda/device.h"
#include "reversed_attention/mask.h"
#include "reversed_attention/params.h"

namespace ledom {

constexpr int kRopeThreads = 256;
constexpr int kRopeWidth = 4;  // pairs that a thread turns at once, where rows and sizes allow it; otherwise 1

// bf16, as the bits that it is.
struct Bf16 {
    uint16_t bits;
};

LEDOM_DEVICE float wide(float x) { return x; }
LEDOM_DEVICE float wide(Bf16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }
LEDOM_DEVICE void narrow(float x, float* to) { *to = x; }
LEDOM_DEVICE void narrow(float x, Bf16* to) { to->bits = static_cast<uint16_t>(pack_bf16(x, 0.0f)); }

// Neighbours that are read and written by one instruction.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Neighbours {
    T element[kWidth];
};

template <typename T, int kWidth>
LEDOM_DEVICE Neighbours<T, kWidth> load(const T* from) {
    return *reinterpret_cast<const Neighbours<T, kWidth>*>(from);
}

template <typename T, int kWidth>
LEDOM_DEVICE void store(const Neighbours<T, kWidth>& value, T* to) {
    *reinterpret_cast<Neighbours<T, kWidth>*>(to) = value;
}

// Turns the pairs d .. d + kWidth - 1 of one token of one head.
template <typename T, int kWidth>
LEDOM_DEVICE void turn_pairs(const ledom_rope_params& p, const T* x, T* y, int d, const float* cosines,
                             const float* sines) {
    const int a_at = p.interleaved ? 2 * d : d, b_at = p.interleaved ? 2 * d + kWidth : d + p.rotary_dim / 2;
    const auto first = load<T, kWidth>(x + a_at), second = load<T, kWidth>(x + b_at);
    const auto cosine = load<float, kWidth>(cosines + d), sine = load<float, kWidth>(sines + d);
    T a[kWidth], b[kWidth], both[2 * kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        both[i] = first.element[i];
        both[kWidth + i] = second.element[i];
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        const float u = wide(p.interleaved ? both[2 * i] : both[i]);
        const float v = wide(p.interleaved ? both[2 * i + 1] : both[kWidth + i]);
        const float c = cosine.element[i], s = p.inverse ? -sine.element[i] : sine.element[i];
        narrow(u * c - v * s, a + i);
        narrow(v * c + u * s, b + i);
    }
    Neighbours<T, kWidth> low, high;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        const int j = kWidth + i;
        low.element[i] = p.interleaved ? (i % 2 ? b[i / 2] : a[i / 2]) : a[i];
        high.element[i] = p.interleaved ? (j % 2 ? b[j / 2] : a[j / 2]) : b[i];
    }
    store<T, kWidth>(low, y + a_at);
    store<T, kWidth>(high, y + b_at);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kRopeThreads) rope(const ledom_rope_params p) {
    const int token = static_cast<int>(blockIdx.x), batch = static_cast<int>(blockIdx.y), half = p.rotary_dim / 2;
    const int64_t row = static_cast<int64_t>(batch) * p.seq;
    const Mask mask = {p.seq, p.seq, p.seq, p.doc_first ? p.doc_first + row : nullptr,
                       p.doc_last ? p.doc_last + row : nullptr};
    const int64_t at = static_cast<int64_t>(position(mask, token, p.from_end != 0)) * half;
    const T* x = static_cast<const T*>(p.x.data) + batch * p.x.stride_batch + token * p.x.stride_seq;
    T* y = static_cast<T*>(p.y.data) + batch * p.y.stride_batch + token * p.y.stride_seq;
    const int turned = half / kWidth, copied = (p.head_dim - p.rotary_dim) / kWidth, steps = turned + copied;
    for (int i = static_cast<int>(threadIdx.x); i < p.heads * steps; i += kRopeThreads) {
        const int head = i / steps, step = i % steps;
        const T* from = x + head * p.x.stride_head;
        T* to = y + head * p.y.stride_head;
        if (step < turned) {
            turn_pairs<T, kWidth>(p, from, to, step * kWidth, p.cosines + at, p.sines + at);
        } else {
            const int d = p.rotary_dim + (step - turned) * kWidth;
            store<T, kWidth>(load<T, kWidth>(from + d), to + d);
        }
    }
}

}  // namespace ledom
