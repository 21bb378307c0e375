// Forward: a block of rows walks the key tiles that it attends, with a running maximum and sum for each row.
//
// The lanes of a vector are rows of the scores. A panel is kPanel rows, turned so that Q^T is [head dim][row]:
//
//     S^T[key][row] = sum over d of K[key][d] * Q^T[d][row]           K and V are only read one number at a time,
//     O^T[d][row]  += sum over keys of V[key][d] * P^T[key][row]      broadcast: neither is ever transposed
//
// so maximum and sum of a row run straight down, without any exchange between lanes. Scores carry a factor log2(e).
#pragma once

#include <cmath>

#include "reversed_attention/cpu/pack.h"
#include "reversed_attention/mask.h"

namespace {

constexpr int kPanel = kRowVectors * kLanes;  // rows
constexpr int kTile = 96;                     // keys; a multiple of every kRowBroadcast and kDimBroadcast
constexpr int kForwardPanels = 192 / kPanel;  // of a block: the more, the less often a tile is copied
constexpr int kDimPanel = kDimVectors * kLanes;
constexpr int kPadding = 16;  // floats after each row of a tile: rows 2^n apart would share a few sets of the cache
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
constexpr float kNoMaximum = -1e30f;  // finite, so that a row without keys makes no NaN

static_assert(kTile % kRowBroadcast == 0 && kTile % kDimBroadcast == 0, "tiles hold whole groups of keys");

LEDOM_INLINE int padded_dim(int dim) { return round_up(dim, kDimPanel > kRowBroadcast ? kDimPanel : kRowBroadcast); }

struct Range {
    int begin;
    int end;
    LEDOM_INLINE bool is_empty() const { return end <= begin; }
};

// The keys of the tile at `tile`, counted from it, that a panel attends: whole groups of kRowBroadcast.
LEDOM_INLINE Range keys_of_panel(const ledom::Mask& mask, int row, int tile) {
    const ledom::Interval keys = ledom::attended_by_rows(mask, row, row + kPanel);
    const int lo = keys.lo > tile ? keys.lo - tile : 0;
    const int hi = keys.hi < tile + kTile - 1 ? keys.hi - tile : kTile - 1;
    if (hi < lo) return {0, 0};
    return {lo / kRowBroadcast * kRowBroadcast, round_up(hi + 1, kRowBroadcast)};
}

// What the rows of a panel attend, one lane a row; rows beyond the sequence attend nothing.
struct LaneIntervals {
    Ints lo[kRowVectors];
    Ints hi[kRowVectors];

    LaneIntervals(const ledom::Mask& mask, int row) {
        for (int v = 0; v < kRowVectors; ++v) {
            for (int lane = 0; lane < kLanes; ++lane) {
                const int i = row + v * kLanes + lane;
                const ledom::Interval keys = i < mask.seq ? ledom::attended(mask, i) : ledom::Interval{1, 0};
                lo[v][lane] = keys.lo;
                hi[v][lane] = keys.hi;
            }
        }
    }

    // `value` where the row attends the key, `otherwise` elsewhere.
    LEDOM_INLINE Floats choose(int v, int key, Floats value, Floats otherwise) const {
        return ((lo[v] <= key) & (hi[v] >= key)) ? value : otherwise;
    }
};

// Sums over a long head dim are taken in parts of this many, for the sake of their rounding.
LEDOM_INLINE int dim_step(int padded) { return padded > 128 ? 96 : padded; }

// S^T of one panel and the keys of `range`: scores[key][row], `row_stride` floats a key.
template <int kDim>
LEDOM_INLINE void multiply_by_panel(const float* tile, int padded, Range range, const float* panel, float* scores,
                                    ptrdiff_t row_stride) {
    const int n = kDim ? padded_dim(kDim) : padded, step = dim_step(n);
    for (int key = range.begin; key < range.end; key += kRowBroadcast) {
        const float* keys = tile + static_cast<ptrdiff_t>(key) * (n + kPadding);
        float* to = scores + key * row_stride;
        multiply<kRowBroadcast, kRowVectors, Into::kStore>(step, keys, n + kPadding, 1, panel, kPanel, to, row_stride);
        for (int d = step; d < n; d += step) {
            multiply<kRowBroadcast, kRowVectors, Into::kAdd>(n - d < step ? n - d : step, keys + d, n + kPadding, 1,
                                                             panel + d * kPanel, kPanel, to, row_stride);
        }
    }
}

// Scores become weights; the running maximum and sum of the rows move on. Returns the rows' rescaling in `scale`.
LEDOM_INLINE void soften(const ledom::Mask& mask, int row, int tile, Range range, float* scores, float* maximum,
                         float* sum, float* scale) {
    const ledom::Interval keys = {tile + range.begin, tile + range.end - 1};
    if (!ledom::is_full(mask, row, row + kPanel, keys)) {
        const LaneIntervals lanes(mask, row);
        const Floats never = splat(-INFINITY);
        for (int key = range.begin; key < range.end; ++key) {
            for (int v = 0; v < kRowVectors; ++v) {
                float* at = scores + key * kPanel + v * kLanes;
                store(at, lanes.choose(v, tile + key, load(at), never));
            }
        }
    }
    Floats top[kRowVectors], total[kRowVectors];
    for (int v = 0; v < kRowVectors; ++v) top[v] = load(maximum + v * kLanes);
    for (int key = range.begin; key < range.end; ++key) {
        for (int v = 0; v < kRowVectors; ++v) top[v] = larger(load(scores + key * kPanel + v * kLanes), top[v]);
    }
    for (int v = 0; v < kRowVectors; ++v) {
        const Floats factor = power_of_two(load(maximum + v * kLanes) - top[v]);
        store(scale + v * kLanes, factor);
        store(maximum + v * kLanes, top[v]);
        total[v] = load(sum + v * kLanes) * factor;
    }
    for (int key = range.begin; key < range.end; ++key) {
        for (int v = 0; v < kRowVectors; ++v) {
            float* at = scores + key * kPanel + v * kLanes;
            const Floats weight = power_of_two(load(at) - top[v]);
            store(at, weight);
            total[v] += weight;
        }
    }
    for (int v = 0; v < kRowVectors; ++v) store(sum + v * kLanes, total[v]);
}

// One block of rows of one head.
struct ForwardScratch {
    float* keys;     // [kTile][padded + kPadding]
    float* values;   // the same
    float* queries;  // [panels][padded][kPanel], the scale and log2(e) in them
    float* outputs;  // [panels][padded][kPanel]
    float* scores;   // [kTile][kPanel]
    float* maximum;  // [panels][kPanel]
    float* sum;      // [panels][kPanel]

    static size_t floats(int padded) {
        const size_t tile = static_cast<size_t>(kTile) * (padded + kPadding);
        const size_t block = static_cast<size_t>(kForwardPanels) * kPanel;
        return 2 * tile + 2 * block * padded + kTile * kPanel + 2 * block;
    }

    ForwardScratch(float* memory, int padded) {
        const size_t tile = static_cast<size_t>(kTile) * (padded + kPadding);
        const size_t block = static_cast<size_t>(kForwardPanels) * kPanel;
        keys = memory;
        values = keys + tile;
        queries = values + tile;
        outputs = queries + block * padded;
        scores = outputs + block * padded;
        maximum = scores + kTile * kPanel;
        sum = maximum + block;
    }
};

template <typename T, int kDim>
void forward_block(const ledom_attention_params& p, const ledom::Mask& mask, int batch, int head, int begin,
                   const ForwardScratch& s) {
    const int dim = kDim ? kDim : p.head_dim, padded = padded_dim(dim);
    const int stride = padded + kPadding, kv_head = head / (p.heads / p.kv_heads);
    const Rows<T> k = head_of<T>(p.k, batch, kv_head), v = head_of<T>(p.v, batch, kv_head);
    const int left = p.seq - begin;
    const int panels = left < kForwardPanels * kPanel ? round_up(left, kPanel) / kPanel : kForwardPanels;
    const size_t panel_floats = static_cast<size_t>(padded) * kPanel;
    for (int i = 0; i < panels; ++i) {
        turn_rows(head_of<T>(p.q, batch, head), begin + i * kPanel, kPanel, p.seq, dim, padded, p.scale * kLog2E,
                  s.queries + i * panel_floats);
    }
    memset(s.outputs, 0, sizeof(float) * panel_floats * panels);
    memset(s.sum, 0, sizeof(float) * panels * kPanel);
    for (int i = 0; i < panels * kPanel; ++i) s.maximum[i] = kNoMaximum;

    const ledom::Interval tiles = ledom::tiles_of(ledom::attended_by_rows(mask, begin, begin + panels * kPanel), kTile);
    for (int t = tiles.lo; t <= tiles.hi; ++t) {
        const int tile = t * kTile;
        copy_rows(k, tile, kTile, p.seq, dim, padded, s.keys, stride);
        copy_rows(v, tile, kTile, p.seq, dim, padded, s.values, stride);
        for (int i = 0; i < panels; ++i) {
            const int row = begin + i * kPanel;
            const Range range = keys_of_panel(mask, row, tile);
            if (range.is_empty()) continue;
            alignas(64) float scale[kPanel];
            multiply_by_panel<kDim>(s.keys, padded, range, s.queries + i * panel_floats, s.scores, kPanel);
            soften(mask, row, tile, range, s.scores, s.maximum + i * kPanel, s.sum + i * kPanel, scale);
            for (int d = 0; d < padded; d += kRowBroadcast) {
                multiply<kRowBroadcast, kRowVectors, Into::kScaleAndAdd>(
                    range.end - range.begin, s.values + range.begin * stride + d, 1, stride,
                    s.scores + range.begin * kPanel, kPanel, s.outputs + i * panel_floats + d * kPanel, kPanel, scale);
            }
        }
    }
    for (int i = 0; i < panels; ++i) {
        const int row = begin + i * kPanel;
        float factor[kPanel];
        for (int lane = 0; lane < kPanel; ++lane) {
            const float total = s.sum[i * kPanel + lane], top = s.maximum[i * kPanel + lane];
            const bool is_empty = total == 0.0f;
            factor[lane] = is_empty ? 0.0f : 1.0f / total;
            if (row + lane < p.seq) {
                float* lse = p.lse + (static_cast<ptrdiff_t>(batch) * p.heads + head) * p.seq + row + lane;
                *lse = is_empty ? -INFINITY : top * kLn2 + logf(total);
            }
        }
        turn_back(s.outputs + i * panel_floats, row, kPanel, p.seq, dim, factor, head_of<T>(p.o, batch, head));
    }
}

}  // namespace
