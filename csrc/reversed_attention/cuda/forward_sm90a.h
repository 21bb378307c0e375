// Forward for sm_90a. A block is one warpgroup that loads and kGroups that compute, 64 query rows of one head each. The
// loading one runs ahead by two stages of keys and of values; barriers in shared memory say which are full and which are
// empty again.
//
//     loads      Q  K(0)  V(0)  K(1)  V(1)  |  K(2)       |  V(2)           |  K(3) ...
//     group 0    S(0)  soften  |  S(1), O += P(0) V(0)  |  soften               |  S(2), O += P(1) V(1)  |  soften ...
//     group 1    S(0)  soften                           |  S(1), O += P(0) V(0) |  soften                |  S(2) ...
//
// A group starts the scores of tile t + 1 before the output of tile t, and softens the former while the latter is under
// way. The groups take turns in starting products, so that one softens while the tensor cores work for the other.
//
// Maxima are of the raw scores; the scale and log2(e) enter with the exponent. The weights are rounded to bf16 for
// their product with V, their sum is not. The output goes through the place of Q, which is read by then.
#pragma once

#include "reversed_attention/cuda/device_sm90a.h"
#include "reversed_attention/cuda/tile.h"

namespace ledom {

struct ForwardSm90aParams {
    TensorMap q, k, v, o;
    ledom_attention_params p;
    int32_t blocks;   // of rows in a sequence
    int32_t section;  // heads (of all sequences) whose keys and values the second-level cache holds together
    int32_t device;   // as in p
    void* stream;
};

constexpr int kGroupRows = 64, kGroupThreads = 128, kGroupWarps = 4, kPanelColumns = 64;
constexpr uint32_t kPanelRowBytes = kPanelColumns * 2;

template <int kDim, int kKeyRows, int kGroupCount>
struct ForwardSm90a {
    static constexpr int kKeys = kKeyRows;
    static constexpr int kGroups = kGroupCount;
    static constexpr int kRows = kGroups * kGroupRows;
    static constexpr int kThreads = (kGroups + 1) * kGroupThreads;
    static constexpr int kStages = 2;
    static constexpr int kPanels = kDim / kPanelColumns;
    // Of the 512 that the warps of a block which share a quarter of the multiprocessor have together.
    static constexpr int kLoadingRegisters = kGroups == 2 ? 24 : 32;
    static constexpr int kComputingRegisters = kGroups == 2 ? 240 : 160;

    static constexpr uint32_t kQueryPanelBytes = kRows * kPanelRowBytes;
    static constexpr uint32_t kQueryBytes = kPanels * kQueryPanelBytes;
    static constexpr uint32_t kKeyPanelBytes = kKeys * kPanelRowBytes;
    static constexpr uint32_t kTileBytes = kPanels * kKeyPanelBytes;
    static constexpr uint32_t kBarrierBytes = 128;
    static constexpr uint32_t kAlignment = 1024;
    static constexpr uint32_t kSharedBytes = kQueryBytes + 2 * kStages * kTileBytes + kBarrierBytes + kAlignment;
    static_assert(kSharedBytes <= 227 * 1024, "what a block of sm_90 gets");
    static_assert(kKeys % 16 == 0 && kKeyPanelBytes % kAlignment == 0, "panels begin at multiples of 1024");

    uint32_t arena;

    LEDOM_DEVICE explicit ForwardSm90a(uint32_t begin) : arena((begin + kAlignment - 1) / kAlignment * kAlignment) {}
    LEDOM_DEVICE uint32_t queries() const { return arena; }
    LEDOM_DEVICE uint32_t keys(int stage) const { return arena + kQueryBytes + stage * kTileBytes; }
    LEDOM_DEVICE uint32_t values(int stage) const { return keys(kStages + stage); }
    LEDOM_DEVICE uint32_t barriers() const { return keys(2 * kStages); }
    LEDOM_DEVICE uint32_t queries_full() const { return barriers(); }
    LEDOM_DEVICE uint32_t keys_full(int stage) const { return barriers() + 8 + stage * 8; }
    LEDOM_DEVICE uint32_t values_full(int stage) const { return keys_full(kStages + stage); }
    LEDOM_DEVICE uint32_t keys_empty(int stage) const { return keys_full(2 * kStages + stage); }
    LEDOM_DEVICE uint32_t values_empty(int stage) const { return keys_full(3 * kStages + stage); }
};

// Barriers of warpgroups, by number; __syncthreads has 0.
constexpr int kTurnBarrier = 1;   // + group: its turn to start products
constexpr int kGroupBarrier = 5;  // + group: all of its warps are here

// Where the walk through the stages stands. The parity flips each time the first stage comes round.
template <int kStages>
struct StageWalk {
    int stage = 0;
    uint32_t parity = 0;
    LEDOM_DEVICE void step() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// What a block works on: the rows begin .. of one head, and the tiles of keys that they attend.
struct Item {
    int begin, head, batch;
    Mask mask;
    Interval tiles;
};

// Blocks start in order. Section by section, those with the most to walk come first.
template <typename F>
LEDOM_DEVICE Item item_of_block(const ForwardSm90aParams& params) {
    const ledom_attention_params& p = params.p;
    const int number = static_cast<int>(blockIdx.x), heads = p.heads * p.batch;
    const int first_head = number / (params.section * params.blocks) * params.section;
    const int size = params.section < heads - first_head ? params.section : heads - first_head;
    const int rest = number - first_head * params.blocks, rank = rest / size, head = first_head + rest % size;
    Item item;
    item.batch = head / p.heads;
    item.head = head % p.heads;
    item.mask = mask_of(p, item.batch);
    item.begin = (item.mask.left > item.mask.right ? params.blocks - 1 - rank : rank) * F::kRows;
    item.tiles = tiles_of(attended_by_rows(item.mask, item.begin, item.begin + F::kRows), F::kKeys);
    return item;
}

// The panels of a tile.
template <int kPanels>
LEDOM_DEVICE void load_tile(uint32_t to, uint32_t panel_bytes, const TensorMap& map, uint32_t barrier, int token,
                            int head, int batch) {
    for (int panel = 0; panel < kPanels; ++panel) {
        load_box(to + panel * panel_bytes, map, barrier, panel * kPanelColumns, token, head, batch);
    }
}

// What one thread of the loading warpgroup does.
template <typename F>
LEDOM_DEVICE void load_all(const F& at, const ForwardSm90aParams& params, const Item& item) {
    arrive_expecting(at.queries_full(), F::kQueryBytes);
    load_tile<F::kPanels>(at.queries(), F::kQueryPanelBytes, params.q, at.queries_full(), item.begin, item.head,
                          item.batch);
    const int kv_head = item.head / (params.p.heads / params.p.kv_heads);
    StageWalk<F::kStages> walk;
    for (int t = item.tiles.lo; t <= item.tiles.hi; ++t, walk.step()) {
        const int stage = walk.stage, token = t * F::kKeys;
        wait(at.keys_empty(stage), walk.parity ^ 1);
        arrive_expecting(at.keys_full(stage), F::kTileBytes);
        load_tile<F::kPanels>(at.keys(stage), F::kKeyPanelBytes, params.k, at.keys_full(stage), token, kv_head,
                              item.batch);
        wait(at.values_empty(stage), walk.parity ^ 1);
        arrive_expecting(at.values_full(stage), F::kTileBytes);
        load_tile<F::kPanels>(at.values(stage), F::kKeyPanelBytes, params.v, at.values_full(stage), token, kv_head,
                              item.batch);
    }
}

// A lane's two rows so far: the maximum of the raw scores and the sum of this lane's weights.
struct Running {
    float maximum[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0.0f, 0.0f};
};

// Scores become weights, relative to the new maximum of their row; `factor` is what older weights are to be times.
// Four chains of operations at a time: one alone would wait for each result.
template <int kCount>
LEDOM_DEVICE void soften(float (&s)[kCount], Running& rows, float (&factor)[2], float scale_log2) {
    float top[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
    for (int n = 4; n < kCount; ++n) top[n % 4] = fmaxf(top[n % 4], s[n]);
    float shift[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float best = fmaxf(rows.maximum[r], maximum_of_quad(fmaxf(top[2 * r], top[2 * r + 1])));
        shift[r] = best == -INFINITY ? 0.0f : best * scale_log2;  // nothing seen yet: all weights are 0
        factor[r] = power_of_two(rows.maximum[r] * scale_log2 - shift[r]);
        rows.maximum[r] = best;
    }
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
        s[n] = power_of_two(s[n] * scale_log2 - shift[n / 2 % 2]);
        sum[n % 4] += s[n];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) rows.sum[r] = rows.sum[r] * factor[r] + (sum[2 * r] + sum[2 * r + 1]);
}

template <int kCount>
LEDOM_DEVICE void hide(float (&s)[kCount], const LaneRows& rows, int first_key) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) s[n] = rows.sees(n / 4, n % 4, first_key) ? s[n] : -INFINITY;
}

template <int kCount>
LEDOM_DEVICE void pack(uint32_t (&p)[kCount / 8][4], const float (&s)[kCount]) {
#pragma unroll
    for (int k = 0; k < kCount / 8; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) p[k][i] = pack_bf16(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
    }
}

template <int kCount>
LEDOM_DEVICE void multiply_rows(float (&o)[kCount], const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) o[n] *= factor[n / 2 % 2];
}

// s = Q K^T, started.
template <typename F>
LEDOM_DEVICE void start_scores(float (&s)[F::kKeys / 2], uint32_t queries, uint32_t keys) {
    const uint64_t a = operand(queries, 0), b = operand(keys, 0);
#pragma unroll
    for (int k = 0; k < F::kPanels * 4; ++k) {
        multiply_by_rows<F::kKeys>(s, moved(a, k / 4 * F::kQueryPanelBytes + k % 4 * 32),
                                   moved(b, k / 4 * F::kKeyPanelBytes + k % 4 * 32), k > 0);
    }
    commit_products();
}

// o += P V, started.
template <typename F>
LEDOM_DEVICE void start_output(float (&o)[F::kPanels * 32], const uint32_t (&p)[F::kKeys / 16][4], uint32_t values) {
    const uint64_t b = operand(values, F::kKeyPanelBytes);
#pragma unroll
    for (int k = 0; k < F::kKeys / 16; ++k) {
        multiply_by_columns<F::kPanels * kPanelColumns>(o, p[k], moved(b, k * 16 * kPanelRowBytes));
    }
    commit_products();
}

// Rows of the output, each times its factor, to the place of the queries and from there to global memory.
template <typename F>
LEDOM_DEVICE void store_output(const F& at, const ForwardSm90aParams& params, const Item& item, int group,
                               const float (&o)[F::kPanels * 32], const float (&factor)[2]) {
    const int row = group * kGroupRows + warp() % kGroupWarps * kWarpRows, g = lane() / 4, t = lane() % 4;
    const uint32_t from = at.queries() + row * kPanelRowBytes, mine = from + g * kPanelRowBytes + 4 * t;
    wait_at_barrier(kGroupBarrier + group, kGroupThreads);  // no warp's products read the queries any more
#pragma unroll
    for (int n = 0; n < F::kPanels * 8; ++n) {
        const uint32_t to = mine + n / 8 * F::kQueryPanelBytes + ((n % 8) ^ g) * 16;
        store_shared_4(to, pack_bf16(o[4 * n] * factor[0], o[4 * n + 1] * factor[0]));
        store_shared_4(to + 8 * kPanelRowBytes, pack_bf16(o[4 * n + 2] * factor[1], o[4 * n + 3] * factor[1]));
    }
    fence_for_copies();
    __syncwarp();
    if (lane() == 0) {
        for (int panel = 0; panel < F::kPanels; ++panel) {
            store_box(params.o, from + panel * F::kQueryPanelBytes, panel * kPanelColumns, item.begin + row, item.head,
                      item.batch);
        }
        commit_stores();
        wait_for_stores();  // shared memory is the block's only while a thread of it lives
    }
}

// The logarithms of the rows' sums, and what the output is to be times.
LEDOM_DEVICE void finish_rows(const Running& running, const ledom_attention_params& p, const Item& item, int warp_row,
                              float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = sum_of_quad(running.sum[r]);
        const bool is_row_empty = sum == 0.0f;
        factor[r] = is_row_empty ? 0.0f : 1.0f / sum;
        const int i = warp_row + lane() / 4 + 8 * r;
        if (lane() % 4 == 0 && i < p.seq) {
            p.lse[(static_cast<int64_t>(item.batch) * p.heads + item.head) * p.seq + i] =
                is_row_empty ? -INFINITY : running.maximum[r] * p.scale + logf(sum);
        }
    }
}

// The walk of a computing warpgroup over the tiles: o and the running rows.
template <typename F>
LEDOM_DEVICE void walk_tiles(const F& at, const Item& item, int group, int warp_row, float scale_log2,
                             float (&o)[F::kPanels * 32], Running& running) {
    const uint32_t queries = at.queries() + group * kGroupRows * kPanelRowBytes;
    const int next_group = group + 1 == F::kGroups ? 0 : group + 1;
    const LaneRows lane_rows(item.mask, warp_row);
    const auto hide_some = [&](float (&s)[F::kKeys / 2], int tile) {
        const Interval keys = {tile * F::kKeys, tile * F::kKeys + F::kKeys - 1};
        if (!is_full(item.mask, warp_row, warp_row + kWarpRows, keys)) hide(s, lane_rows, keys.lo);
    };
    float s[F::kKeys / 2], factor[2];
    uint32_t weights[F::kKeys / 16][4];
    StageWalk<F::kStages> walk;
    wait(at.queries_full(), 0);
    wait(at.keys_full(walk.stage), walk.parity);
    begin_products();
    start_scores<F>(s, queries, at.keys(walk.stage));
    wait_for_products<0>(s);
    arrive_as_warp(at.keys_empty(walk.stage));
    hide_some(s, item.tiles.lo);
    soften(s, running, factor, scale_log2);
    pack(weights, s);
    for (int t = item.tiles.lo + 1; t <= item.tiles.hi; ++t) {
        const StageWalk<F::kStages> before = walk;
        walk.step();
        wait(at.keys_full(walk.stage), walk.parity);
        wait(at.values_full(before.stage), before.parity);
        wait_at_barrier(kTurnBarrier + group, 2 * kGroupThreads);
        begin_products();
        start_scores<F>(s, queries, at.keys(walk.stage));
        start_output<F>(o, weights, at.values(before.stage));
        pass_barrier(kTurnBarrier + next_group, 2 * kGroupThreads);
        wait_for_products<1>(s);
        arrive_as_warp(at.keys_empty(walk.stage));
        hide_some(s, t);
        soften(s, running, factor, scale_log2);
        wait_for_products<0>(o);
        arrive_as_warp(at.values_empty(before.stage));
        multiply_rows(o, factor);
        pack(weights, s);
    }
    wait(at.values_full(walk.stage), walk.parity);
    begin_products();
    start_output<F>(o, weights, at.values(walk.stage));
    wait_for_products<0>(o);
}

// What a computing warpgroup does.
template <typename F>
LEDOM_DEVICE void compute(const F& at, const ForwardSm90aParams& params, const Item& item, int group) {
    const ledom_attention_params& p = params.p;
    const int warp_row = item.begin + group * kGroupRows + warp() % kGroupWarps * kWarpRows;
    Running running;
    float o[F::kPanels * 32], factor[2];
#pragma unroll
    for (int n = 0; n < F::kPanels * 32; ++n) o[n] = 0.0f;
    if (!is_empty(item.tiles)) {
        if (group == F::kGroups - 1) pass_barrier(kTurnBarrier, 2 * kGroupThreads);  // the first turn is group 0's
        walk_tiles(at, item, group, warp_row, p.scale * kLog2E, o, running);
        if (group == 0) wait_at_barrier(kTurnBarrier, 2 * kGroupThreads);  // the last turn passed on to it
    }
    finish_rows(running, p, item, warp_row, factor);
    store_output<F>(at, params, item, group, o, factor);
}

template <int kDim, int kKeys, int kGroups>
__global__ void __launch_bounds__(ForwardSm90a<kDim, kKeys, kGroups>::kThreads, 1)
    attention_forward_sm90a(const LEDOM_GRID_CONSTANT ForwardSm90aParams params) {
    using F = ForwardSm90a<kDim, kKeys, kGroups>;
    LEDOM_SHARED_MEMORY(shared);
    const F at(shared_address(shared));
    if (threadIdx.x == 0) {
        init_barrier(at.queries_full(), 1);
        for (int stage = 0; stage < F::kStages; ++stage) {
            init_barrier(at.keys_full(stage), 1);
            init_barrier(at.values_full(stage), 1);
            init_barrier(at.keys_empty(stage), kGroups * kGroupWarps);
            init_barrier(at.values_empty(stage), kGroups * kGroupWarps);
        }
        publish_barriers();
    }
    __syncthreads();
    const Item item = item_of_block<F>(params);
    const int group = static_cast<int>(threadIdx.x) / kGroupThreads - 1;
    if (group < 0) {
        keep_registers<F::kLoadingRegisters>();
        if (threadIdx.x == 0 && !is_empty(item.tiles)) load_all(at, params, item);
    } else {
        take_registers<F::kComputingRegisters>();
        compute(at, params, item, group);
    }
}

}  // namespace ledom
