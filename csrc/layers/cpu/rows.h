// Rows of any length as vectors: unaligned, fp32 or bf16 in memory, fp32 in registers.
#pragma once

#include "reversed_attention/cpu/pack.h"

namespace {

typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));

LEDOM_INLINE Floats read(const float* at) {
    Floats value;
    memcpy(&value, at, sizeof value);
    return value;
}

LEDOM_INLINE Floats read(const Bfloat16* at) {
    Halves halves;
    memcpy(&halves, at, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Bits) << 16);
}

LEDOM_INLINE void write(Floats value, float* at) { memcpy(at, &value, sizeof value); }

LEDOM_INLINE void write(Floats value, Bfloat16* at) {
    const Bits bits = (Bits)value, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const Bits chosen = (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded;
    const Halves halves = __builtin_convertvector(chosen, Halves);
    memcpy(at, &halves, sizeof halves);
}

// The first `count` lanes, the others `otherwise`.
template <typename T>
LEDOM_INLINE Floats read_some(const T* at, int count, float otherwise = 0.0f) {
    if (count >= kLanes) return read(at);
    T part[kLanes];
    for (int i = 0; i < kLanes; ++i) from_float(otherwise, part + i);
    memcpy(part, at, sizeof(T) * count);
    return read(part);
}

template <typename T>
LEDOM_INLINE void write_some(Floats value, T* at, int count) {
    if (count >= kLanes) return write(value, at);
    T part[kLanes];
    write(value, part);
    memcpy(at, part, sizeof(T) * count);
}

// body(i, lanes) for the whole vectors of a row, and once more for the rest of it.
template <typename Body>
LEDOM_INLINE void for_vectors(int64_t width, const Body& body) {
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) body(i, kLanes);
    if (i < width) body(i, static_cast<int>(width - i));
}

// Always in the same order: halves of the lanes, from the outside in.
LEDOM_INLINE float total(Floats value) {
    float lanes[kLanes];
    memcpy(lanes, &value, sizeof lanes);
    for (int n = kLanes / 2; n > 0; n /= 2) {
        for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
    }
    return lanes[0];
}

LEDOM_INLINE float largest(Floats value) {
    float top = value[0];
    for (int i = 1; i < kLanes; ++i) top = value[i] > top ? value[i] : top;
    return top;
}

constexpr int64_t kChunk = 1024;  // elements whose sum is taken before it joins that of the row, for its rounding

// The sum over a row of term(i, lanes), in chunks.
template <typename Term>
LEDOM_INLINE float sum_of_row(int64_t width, const Term& term) {
    Floats whole = {};
    for (int64_t from = 0; from < width; from += kChunk) {
        Floats part = {}, other = {};
        const int64_t size = width - from < kChunk ? width - from : kChunk;
        int64_t i = 0;
        for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
            part += term(from + i, kLanes);
            other += term(from + i + kLanes, kLanes);
        }
        for (; i < size; i += kLanes) part += term(from + i, size - i < kLanes ? static_cast<int>(size - i) : kLanes);
        whole += part + other;
    }
    return total(whole);
}

}  // namespace
