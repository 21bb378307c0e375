// The functions of reversed_attention/cuda/device_sm90a.h for the CPU. Each one's last argument is the line that calls
// it; those that order something can be taken out.
#pragma once

#include "emulation/device.h"
#include "emulation/sm90a.h"

namespace ledom {

using ::emulation::TensorMap;

inline void init_barrier(uint32_t barrier, int count, LEDOM_CALLER) {
    const Site site = LEDOM_SITE("init_barrier");
    if (!::emulation::is_removed(site)) ::emulation::init_barrier(site, barrier, count);
}

inline void publish_barriers(LEDOM_CALLER) {
    const Site site = LEDOM_SITE("publish_barriers");
    if (!::emulation::is_removed(site)) ::emulation::publish_barriers(site);
}

inline void arrive(uint32_t barrier, LEDOM_CALLER) {
    const Site site = LEDOM_SITE("arrive");
    if (!::emulation::is_removed(site)) ::emulation::arrive(site, barrier, 0);
}

inline void arrive_as_warp(uint32_t barrier, LEDOM_CALLER) {
    const Site site = LEDOM_SITE("arrive_as_warp");
    if (::emulation::is_removed(site)) return;
    ::emulation::wait_for_warp(site, Collective::kBarrier, nullptr, nullptr);
    if (threadIdx.x % 32 == 0) ::emulation::arrive(site, barrier, 0);
}

inline void arrive_expecting(uint32_t barrier, uint32_t bytes, LEDOM_CALLER) {
    const Site site = LEDOM_SITE("arrive_expecting");
    if (!::emulation::is_removed(site)) ::emulation::arrive(site, barrier, bytes);
}

inline void wait(uint32_t barrier, uint32_t parity, LEDOM_CALLER) {
    const Site site = LEDOM_SITE("wait");
    if (!::emulation::is_removed(site)) ::emulation::wait_for_phase(site, barrier, parity);
}

inline void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, int column, int token, int head, int batch,
                     LEDOM_CALLER) {
    ::emulation::start_load(LEDOM_SITE("load_box"),
                            {map, to, barrier, {column, token, head, batch}, &::emulation::carry_out_load});
}

inline void store_box(const TensorMap& map, uint32_t from, int column, int token, int head, int batch, LEDOM_CALLER) {
    ::emulation::start_store(LEDOM_SITE("store_box"),
                             {map, from, 0, {column, token, head, batch}, &::emulation::carry_out_store});
}

inline void commit_stores(LEDOM_CALLER) {
    if (!::emulation::is_removed(LEDOM_SITE("commit_stores"))) ::emulation::end_store_group();
}

inline void wait_for_stores(LEDOM_CALLER) {
    if (!::emulation::is_removed(LEDOM_SITE("wait_for_stores"))) ::emulation::wait_for_stores();
}

inline void fence_for_copies(LEDOM_CALLER) {
    if (!::emulation::is_removed(LEDOM_SITE("fence_for_copies"))) ::emulation::fence_stores();
}

template <int kCount>
inline void keep_registers(LEDOM_CALLER) {
    const Site site = LEDOM_SITE("keep_registers");
    if (!::emulation::is_removed(site)) ::emulation::set_registers(site, kCount, false);
}

template <int kCount>
inline void take_registers(LEDOM_CALLER) {
    const Site site = LEDOM_SITE("take_registers");
    if (!::emulation::is_removed(site)) ::emulation::set_registers(site, kCount, true);
}

inline void wait_at_barrier(int number, int threads, LEDOM_CALLER) {
    const Site site = LEDOM_SITE("wait_at_barrier");
    if (!::emulation::is_removed(site)) ::emulation::come_to_barrier(site, number, threads, true);
}

inline void pass_barrier(int number, int threads, LEDOM_CALLER) {
    const Site site = LEDOM_SITE("pass_barrier");
    if (!::emulation::is_removed(site)) ::emulation::come_to_barrier(site, number, threads, false);
}

inline void begin_products(LEDOM_CALLER) {
    const Site site = LEDOM_SITE("begin_products");
    if (!::emulation::is_removed(site)) ::emulation::wait_for_warp(site, Collective::kBeginProducts, nullptr, nullptr);
}

inline void commit_products(LEDOM_CALLER) {
    const Site site = LEDOM_SITE("commit_products");
    if (!::emulation::is_removed(site)) ::emulation::wait_for_warp(site, Collective::kCommitProducts, nullptr, nullptr);
}

template <int kKeep, int kCount>
inline void wait_for_products(float (&)[kCount], LEDOM_CALLER) {
    const ::emulation::WaitIn in = {LEDOM_SITE("wait_for_products"), kKeep};
    if (::emulation::is_removed(in.site)) return;
    ::emulation::wait_for_warp(in.site, Collective::kWaitForProducts, &in, nullptr);
}

template <int kColumns>
inline void multiply_by_rows(float (&c)[kColumns / 2], uint64_t a, uint64_t b, bool adds, LEDOM_CALLER) {
    const ::emulation::ProductIn in = {LEDOM_SITE("multiply_by_rows"), c, nullptr, a, b, kColumns, adds};
    ::emulation::wait_for_warp(in.site, Collective::kStartProduct, &in, nullptr);
}

template <int kColumns>
inline void multiply_by_columns(float (&c)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, LEDOM_CALLER) {
    const ::emulation::ProductIn in = {LEDOM_SITE("multiply_by_columns"), c, a, 0, b, kColumns, true};
    ::emulation::wait_for_warp(in.site, Collective::kStartProduct, &in, nullptr);
}

}  // namespace ledom
