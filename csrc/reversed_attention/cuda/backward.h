// Backward for sm_80 and later, in three kernels without atomics: each number is summed by one warp, in one order, so
// that two runs give the same bits.
//
//     attention_delta             delta = row sums of o * d_o
//     attention_backward_keys     d_k, d_v: a block holds keys and walks the query tiles that attend them, for each of
//                                 the query heads that share the key head, and sums them all
//     attention_backward_queries  d_q: a block holds query rows and walks the key tiles that they attend
//
// With P = exp(scale * S - lse) and dS = P * (dP - delta):
//
//     keys     S^T = K Q^T,  dP^T = V dO^T,  d_v += P^T dO,  d_k += scale * dS^T Q       rows: keys, columns: queries
//     queries  S = Q K^T,    dP = dO V^T,                    d_q += scale * dS K
//
// In both the result of the first products is the left side of the last ones as it lies in the registers. The tiles
// that are walked have two stages, as in forward.h. At head size 192 the registers do not hold d_k and d_v: a block
// then sums one of the two, and S^T is computed twice.
#pragma once

#include "reversed_attention/cuda/tile.h"

namespace ledom {

constexpr int kBackwardRows = 64;  // that a block holds: of keys, or of queries
constexpr int kBackwardThreads = kBackwardRows / kWarpRows * 32;
constexpr int kDeltaThreads = 128;
constexpr int kDeltaRows = kDeltaThreads / 32;

template <int kDim>
struct Backward {
    static constexpr int kWalked = kDim <= 64 ? 64 : 32;  // rows of a tile that is walked
    using Held = Tile<kBackwardRows, kDim>;
    using Walked = Tile<kWalked, kDim>;
    static constexpr uint32_t kHeldBytes = 2 * Held::kBytes;
    // Two tiles, then lse and delta of their rows; attention_backward_queries leaves the latter out.
    static constexpr uint32_t kStageBytes = 2 * Walked::kBytes + kWalked * 8;
    static constexpr uint32_t kSharedBytes = kHeldBytes + 2 * kStageBytes;
    static_assert(kSharedBytes <= 99 * 1024, "all GPUs from sm_80 on give a block this much");
    static_assert(2 * kWalked <= kBackwardThreads, "one thread copies one number of lse or delta");

    // The places of the two stages.
    struct Stage {
        Walked first, second;
        uint32_t lse, delta;
    };
    LEDOM_DEVICE static Stage stage(uint32_t arena, int number) {
        const uint32_t at = arena + kHeldBytes + static_cast<uint32_t>(number) * kStageBytes;
        const uint32_t numbers = at + 2 * Walked::kBytes;
        return {{at}, {at + Walked::kBytes}, numbers, numbers + kWalked * 4};
    }
};

enum class Gradient { kKeys, kValues, kBoth };

// One warp to a row.
template <int kDim>
__global__ void __launch_bounds__(kDeltaThreads) attention_delta(const ledom_attention_params p) {
    const int row = static_cast<int>(blockIdx.x) * kDeltaRows + warp();
    const int head = static_cast<int>(blockIdx.y), batch = static_cast<int>(blockIdx.z);
    float sum = 0.0f;
    if (row < p.seq && lane() < kDim / 8) {
        const Head o = head_of(p.o, batch, head), d_o = head_of(p.d_o, batch, head);
        const uint4 a = *reinterpret_cast<const uint4*>(o.data + row * o.row_stride + lane() * 8);
        const uint4 b = *reinterpret_cast<const uint4*>(d_o.data + row * d_o.row_stride + lane() * 8);
        sum = dot_of_pairs(a.x, b.x) + dot_of_pairs(a.y, b.y) + dot_of_pairs(a.z, b.z) + dot_of_pairs(a.w, b.w);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (row < p.seq && lane() == 0) p.delta[(static_cast<int64_t>(batch) * p.heads + head) * p.seq + row] = sum;
}

template <int kDim, Gradient kWhich>
__global__ void __launch_bounds__(kBackwardThreads) attention_backward_keys(const ledom_attention_params p) {
    using B = Backward<kDim>;
    constexpr bool kOfKeys = kWhich != Gradient::kValues, kOfValues = kWhich != Gradient::kKeys;
    LEDOM_SHARED_MEMORY(shared);
    const uint32_t arena = shared_address(shared);
    const typename B::Held keys = {arena}, values = {arena + B::Held::kBytes};

    const int kv_head = static_cast<int>(blockIdx.y), batch = static_cast<int>(blockIdx.z);
    const Mask mask = transposed(mask_of(p, batch));
    const int begin = longest_first(mask) * kBackwardRows, row = warp() * kWarpRows;
    const Interval tiles = tiles_of(attended_by_rows(mask, begin, begin + kBackwardRows), B::kWalked);
    const int num_tiles = tiles.hi - tiles.lo + 1, group = p.heads / p.kv_heads, num_steps = num_tiles * group;
    const auto start_copies = [&](int step) {
        const typename B::Stage to = B::stage(arena, step % 2);
        const int head = kv_head * group + step / num_tiles, first = (tiles.lo + step % num_tiles) * B::kWalked;
        copy_rows<kBackwardThreads>(to.first, head_of(p.q, batch, head), first, p.seq);
        copy_rows<kBackwardThreads>(to.second, head_of(p.d_o, batch, head), first, p.seq);
        const int thread = static_cast<int>(threadIdx.x), query = first + thread % B::kWalked;
        if (thread < 2 * B::kWalked) {
            const float* from = (thread < B::kWalked ? p.lse : p.delta) +
                                (static_cast<int64_t>(batch) * p.heads + head) * p.seq + (query < p.seq ? query : 0);
            copy_async_4(to.lse + 4 * thread, from, query < p.seq);
        }
    };

    if (num_steps > 0) {
        copy_rows<kBackwardThreads>(keys, head_of(p.k, batch, kv_head), begin, p.seq);
        if (kOfKeys) copy_rows<kBackwardThreads>(values, head_of(p.v, batch, kv_head), begin, p.seq);
        start_copies(0);
    }
    commit_copies();
    const LaneRows lane_rows(mask, begin + row);
    const float scale_log2 = p.scale * kLog2E;
    float d_k[kOfKeys ? kDim / 8 : 1][4] = {}, d_v[kOfValues ? kDim / 8 : 1][4] = {};
    for (int step = 0; step < num_steps; ++step) {
        const typename B::Stage stage = B::stage(arena, step % 2);
        const int first_query = (tiles.lo + step % num_tiles) * B::kWalked;
        wait_for_copies<0>();
        __syncthreads();  // the tiles are here for all, and all have left those before them
        if (step + 1 < num_steps) start_copies(step + 1);
        commit_copies();
        const bool is_all_seen =
            is_full(mask, begin + row, begin + row + kWarpRows, {first_query, first_query + B::kWalked - 1});
        float weights[B::kWalked / 8][4];
        multiply_by_rows(weights, keys, row, stage.first);
#pragma unroll
        for (int n = 0; n < B::kWalked / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float lse = load_shared_float(stage.lse + 4 * column_of(n, i));
                const bool is_seen = is_all_seen || lane_rows.sees(n, i, first_query);
                weights[n][i] = is_seen ? power_of_two(weights[n][i] * scale_log2 - lse * kLog2E) : 0.0f;
            }
        }
        if constexpr (kOfValues) add_product(d_v, weights, stage.second);
        if constexpr (kOfKeys) {
            float d_weights[B::kWalked / 8][4];
            multiply_by_rows(d_weights, values, row, stage.second);
#pragma unroll
            for (int n = 0; n < B::kWalked / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    weights[n][i] *= d_weights[n][i] - load_shared_float(stage.delta + 4 * column_of(n, i));
                }
            }
            add_product(d_k, weights, stage.first);
        }
    }
    // Each warp's own rows of the two tiles serve it once more.
    if constexpr (kOfValues) {
        store_rows(d_v, {1.0f, 1.0f}, values, row, head_of(p.d_v, batch, kv_head), begin + row, p.seq);
    }
    if constexpr (kOfKeys) {
        store_rows(d_k, {p.scale, p.scale}, keys, row, head_of(p.d_k, batch, kv_head), begin + row, p.seq);
    }
}

template <int kDim>
__global__ void __launch_bounds__(kBackwardThreads) attention_backward_queries(const ledom_attention_params p) {
    using B = Backward<kDim>;
    LEDOM_SHARED_MEMORY(shared);
    const uint32_t arena = shared_address(shared);
    const typename B::Held queries = {arena}, d_outputs = {arena + B::Held::kBytes};

    const int head = static_cast<int>(blockIdx.y), batch = static_cast<int>(blockIdx.z);
    const int kv_head = head / (p.heads / p.kv_heads);
    const Head k = head_of(p.k, batch, kv_head), v = head_of(p.v, batch, kv_head);
    const Mask mask = mask_of(p, batch);
    const int begin = longest_first(mask) * kBackwardRows, row = warp() * kWarpRows;
    const Interval tiles = tiles_of(attended_by_rows(mask, begin, begin + kBackwardRows), B::kWalked);
    const auto start_copies = [&](int tile) {
        const typename B::Stage to = B::stage(arena, (tile - tiles.lo) % 2);
        copy_rows<kBackwardThreads>(to.first, k, tile * B::kWalked, p.seq);
        copy_rows<kBackwardThreads>(to.second, v, tile * B::kWalked, p.seq);
    };

    if (!is_empty(tiles)) {
        copy_rows<kBackwardThreads>(queries, head_of(p.q, batch, head), begin, p.seq);
        copy_rows<kBackwardThreads>(d_outputs, head_of(p.d_o, batch, head), begin, p.seq);
        start_copies(tiles.lo);
    }
    commit_copies();
    const LaneRows lane_rows(mask, begin + row);
    float lse_log2[2], delta[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int i = begin + row + lane() / 4 + 8 * r;
        const int64_t at = (static_cast<int64_t>(batch) * p.heads + head) * p.seq + (i < p.seq ? i : 0);
        lse_log2[r] = p.lse[at] * kLog2E;
        delta[r] = p.delta[at];
    }
    const float scale_log2 = p.scale * kLog2E;
    float d_q[kDim / 8][4] = {};
    for (int t = tiles.lo; t <= tiles.hi; ++t) {
        const typename B::Stage stage = B::stage(arena, (t - tiles.lo) % 2);
        const int first_key = t * B::kWalked;
        wait_for_copies<0>();
        __syncthreads();  // the tiles are here for all, and all have left those before them
        if (t < tiles.hi) start_copies(t + 1);
        commit_copies();
        const bool is_all_seen =
            is_full(mask, begin + row, begin + row + kWarpRows, {first_key, first_key + B::kWalked - 1});
        float scores[B::kWalked / 8][4], d_weights[B::kWalked / 8][4];
        multiply_by_rows(scores, queries, row, stage.first);
        multiply_by_rows(d_weights, d_outputs, row, stage.second);
#pragma unroll
        for (int n = 0; n < B::kWalked / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool is_seen = is_all_seen || lane_rows.sees(n, i, first_key);
                const float weight = is_seen ? power_of_two(scores[n][i] * scale_log2 - lse_log2[i / 2]) : 0.0f;
                scores[n][i] = weight * (d_weights[n][i] - delta[i / 2]);
            }
        }
        add_product(d_q, scores, stage.first);
    }
    store_rows(d_q, {p.scale, p.scale}, queries, row, head_of(p.d_q, batch, head), begin + row, p.seq);
}

}  // namespace ledom
