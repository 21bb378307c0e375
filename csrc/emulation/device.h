// The functions of reversed_attention/cuda/device.h for the CPU. Each one's last argument is the line that calls it.
#pragma once

#include "emulation/cuda.h"

namespace ledom {

using ::emulation::Collective;
using ::emulation::Site;

inline uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(static_cast<const char*>(p) - ::emulation::shared_memory());
}

inline void copy_async_16(uint32_t to, const void* from, bool is_valid, LEDOM_CALLER) {
    ::emulation::copy_async<16>(to, from, is_valid, LEDOM_SITE("copy_async_16"));
}

inline void copy_async_4(uint32_t to, const void* from, bool is_valid, LEDOM_CALLER) {
    ::emulation::copy_async<4>(to, from, is_valid, LEDOM_SITE("copy_async_4"));
}

inline void commit_copies(LEDOM_CALLER) {
    if (!::emulation::is_removed(LEDOM_SITE("commit_copies"))) ::emulation::end_group();
}

template <int kKeep>
inline void wait_for_copies(LEDOM_CALLER) {
    if (::emulation::is_removed(LEDOM_SITE("wait_for_copies"))) return;
    ::emulation::Copy copy;
    while (::emulation::next_due_copy(kKeep, &copy)) ::emulation::carry_out(copy);
}

inline void load_matrices(uint32_t (&r)[4], uint32_t row, LEDOM_CALLER) {
    ::emulation::load_matrices(r, row, Collective::kLoadMatrices, LEDOM_SITE("load_matrices"));
}

inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t row, LEDOM_CALLER) {
    ::emulation::load_matrices(r, row, Collective::kLoadMatricesTransposed, LEDOM_SITE("load_matrices_transposed"));
}

inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, LEDOM_CALLER) {
    const ::emulation::MultiplyIn in = {{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    ::emulation::wait_for_warp(LEDOM_SITE("multiply_add"), Collective::kMultiply, &in, c);
}

inline void store_shared_4(uint32_t to, uint32_t value, LEDOM_CALLER) {
    ::emulation::note_store(LEDOM_SITE("store_shared_4"), to, 4);
    *reinterpret_cast<uint32_t*>(::emulation::shared_at(to, 4, LEDOM_SITE("store_shared_4"))) = value;
}

inline float load_shared_float(uint32_t from, LEDOM_CALLER) {
    return *reinterpret_cast<const float*>(::emulation::shared_at(from, 4, LEDOM_SITE("load_shared_float")));
}

inline uint4 load_shared_16(uint32_t from, LEDOM_CALLER) {
    return *reinterpret_cast<const uint4*>(::emulation::shared_at(from, 16, LEDOM_SITE("load_shared_16")));
}

inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// To nearest even; a NaN stays one.
inline uint32_t bf16_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline uint32_t pack_bf16(float low, float high) { return bf16_of(low) | bf16_of(high) << 16; }

inline float power_of_two(float x) { return x < -126.0f ? 0.0f : exp2f(x); }

}  // namespace ledom
