// Forward for sm_80 and later. A block holds kRows query rows of one head and walks the key tiles that they attend,
// with a running maximum and sum for each row; a warp has 16 of the rows.
//
//     tile t      wait, barrier | start copies of t + 1 | S = Q K^T | hide, soften | O += P V | tile t + 1 ...
//     stage 0     K(t)     V(t)                        <- the two stages take turns: the barrier at the beginning of
//     stage 1     K(t + 1) V(t + 1)                       t + 1 says that its tile is here, and that t's is free
//
// Maxima are of the raw scores; the scale and log2(e) enter with the exponent. The weights are rounded to bf16 for
// their product with V, their sum is not.
#pragma once

#include "reversed_attention/cuda/tile.h"

namespace ledom {

template <int kDim>
struct Forward {
    static constexpr int kRows = kDim <= 128 ? 128 : 64;
    static constexpr int kKeys = kDim <= 128 ? 64 : 32;
    static constexpr int kThreads = kRows / kWarpRows * 32;
    using Queries = Tile<kRows, kDim>;
    using Keys = Tile<kKeys, kDim>;
    static constexpr uint32_t kStageBytes = 2 * Keys::kBytes;
    static constexpr uint32_t kSharedBytes = Queries::kBytes + 2 * kStageBytes;
    static_assert(kSharedBytes <= 99 * 1024, "all GPUs from sm_80 on give a block this much");
};

// The maximum and the sum of a lane's two rows so far. The sum is only of this lane's columns.
struct RunningRows {
    float maximum[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0.0f, 0.0f};
};

// Scores become weights, relative to the new maximum of their row, and `o` follows it.
template <int kColumns, int kOutputs>
LEDOM_DEVICE void soften(float (&s)[kColumns][4], float (&o)[kOutputs][4], RunningRows& rows, float scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float top = rows.maximum[r];
#pragma unroll
        for (int n = 0; n < kColumns; ++n) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
        top = maximum_of_quad(top);
        const float shift = top == -INFINITY ? 0.0f : top * scale_log2;  // nothing seen yet: all weights are 0
        const float factor = power_of_two(rows.maximum[r] * scale_log2 - shift);
        rows.maximum[r] = top;
        rows.sum[r] *= factor;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; ++i) {
                s[n][i] = power_of_two(s[n][i] * scale_log2 - shift);
                rows.sum[r] += s[n][i];
            }
        }
#pragma unroll
        for (int n = 0; n < kOutputs; ++n) {
            o[n][2 * r] *= factor;
            o[n][2 * r + 1] *= factor;
        }
    }
}

template <int kDim>
__global__ void __launch_bounds__(Forward<kDim>::kThreads) attention_forward(const ledom_attention_params p) {
    using F = Forward<kDim>;
    LEDOM_SHARED_MEMORY(shared);
    const uint32_t arena = shared_address(shared);
    const typename F::Queries queries = {arena};
    const auto keys_of = [&](int stage) {
        return typename F::Keys{arena + F::Queries::kBytes + static_cast<uint32_t>(stage) * F::kStageBytes};
    };
    const auto values_of = [&](int stage) { return typename F::Keys{keys_of(stage).address + F::Keys::kBytes}; };

    const int head = static_cast<int>(blockIdx.y), batch = static_cast<int>(blockIdx.z);
    const int kv_head = head / (p.heads / p.kv_heads);
    const Head k = head_of(p.k, batch, kv_head), v = head_of(p.v, batch, kv_head);
    const Mask mask = mask_of(p, batch);
    const int begin = longest_first(mask) * F::kRows, row = warp() * kWarpRows;
    const Interval tiles = tiles_of(attended_by_rows(mask, begin, begin + F::kRows), F::kKeys);
    const auto start_copies = [&](int tile, int stage) {
        copy_rows<F::kThreads>(keys_of(stage), k, tile * F::kKeys, p.seq);
        copy_rows<F::kThreads>(values_of(stage), v, tile * F::kKeys, p.seq);
    };

    if (!is_empty(tiles)) {
        copy_rows<F::kThreads>(queries, head_of(p.q, batch, head), begin, p.seq);
        start_copies(tiles.lo, 0);
    }
    commit_copies();
    const LaneRows lane_rows(mask, begin + row);
    const float scale_log2 = p.scale * kLog2E;
    RunningRows running;
    float o[kDim / 8][4] = {};
    for (int t = tiles.lo; t <= tiles.hi; ++t) {
        const int stage = (t - tiles.lo) % 2, first_key = t * F::kKeys;
        wait_for_copies<0>();
        __syncthreads();  // the tile is here for all, and all have left the one before it
        if (t < tiles.hi) start_copies(t + 1, stage ^ 1);
        commit_copies();
        float s[F::kKeys / 8][4];
        multiply_by_rows(s, queries, row, keys_of(stage));
        if (!is_full(mask, begin + row, begin + row + kWarpRows, {first_key, first_key + F::kKeys - 1})) {
#pragma unroll
            for (int n = 0; n < F::kKeys / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) s[n][i] = lane_rows.sees(n, i, first_key) ? s[n][i] : -INFINITY;
            }
        }
        soften(s, o, running, scale_log2);
        add_product(o, s, values_of(stage));
    }

    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = sum_of_quad(running.sum[r]);
        const bool is_row_empty = sum == 0.0f;
        factor[r] = is_row_empty ? 0.0f : 1.0f / sum;
        const int i = begin + row + lane() / 4 + 8 * r;
        if (lane() % 4 == 0 && i < p.seq) {
            p.lse[(static_cast<int64_t>(batch) * p.heads + head) * p.seq + i] =
                is_row_empty ? -INFINITY : running.maximum[r] * p.scale + logf(sum);
        }
    }
    store_rows(o, factor, queries, row, head_of(p.o, batch, head), begin + row, p.seq);
}

}  // namespace ledom
