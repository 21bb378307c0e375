// Backward: one unit is one query head, or a part of one where there are fewer heads than threads. Its rows are walked in blocks and every block its key tiles; scores are
// recomputed once and serve all three gradients:
//
//     P^T = exp2(K Q^T - lse)      dP^T = V dO^T      dS^T = P^T * (dP^T - delta)         lanes: rows
//     dQ^T[d][row]  += sum over keys of K[key][d] * dS^T[key][row]                        lanes: rows
//     dV[key][d]    += sum over rows of P^T[key][row] * dO[row][d]                        lanes: head dim
//     dK[key][d]    += sum over rows of dS^T[key][row] * Q[row][d]                        lanes: head dim
//
// The order of all sums is that of the loops, so results do not depend on the number of threads. Query heads that share
// a key head leave their dK and dV in fp32; these are added up afterwards, in the order of the heads.
#pragma once

#include "reversed_attention/cpu/attention_forward.h"

namespace {

constexpr int kBackwardPanels = 96 / kPanel;  // of a block of rows
constexpr int kBlock = kBackwardPanels * kPanel;

// dK and dV of one query head, fp32: [rows_of_keys][padded] each.
struct KeyGradients {
    float* d_keys;
    float* d_values;
    static size_t rows(int seq) { return round_up(seq, kTile); }
    static size_t floats(int seq, int padded) { return 2 * rows(seq) * padded; }
};

struct BackwardScratch {
    float* keys;         // [seq rounded up to tiles][padded + kPadding]
    float* values;       // the same
    float* queries;      // [panels][padded][kPanel], the scale and log2(e) in them
    float* d_outputs;    // [panels][padded][kPanel]
    float* queries_d;    // [padded / kDimPanel][kBlock][kDimPanel], as they are
    float* d_outputs_d;  // the same
    float* d_queries;    // [panels][padded][kPanel]
    float* weights;      // P^T [kTile][kBlock]
    float* d_scores;     // dS^T [kTile][kBlock]
    float* lse;          // [kBlock], base 2
    float* delta;        // [kBlock]

    static size_t floats(int seq, int padded) {
        const size_t all_keys = KeyGradients::rows(seq) * (padded + kPadding);
        return 2 * all_keys + 5 * static_cast<size_t>(kBlock) * padded + 2 * kTile * kBlock + 2 * kBlock;
    }

    BackwardScratch(float* memory, int seq, int padded) {
        const size_t all_keys = KeyGradients::rows(seq) * (padded + kPadding);
        const size_t block = static_cast<size_t>(kBlock) * padded;
        keys = memory;
        values = keys + all_keys;
        queries = values + all_keys;
        d_outputs = queries + block;
        queries_d = d_outputs + block;
        d_outputs_d = queries_d + block;
        d_queries = d_outputs_d + block;
        weights = d_queries + block;
        d_scores = weights + kTile * kBlock;
        lse = d_scores + kTile * kBlock;
        delta = lse + kBlock;
    }
};

// What a unit computes of a head: the gradient of the queries `row_begin .. row_end`, or that of the keys and values of
// the tiles `tile_begin .. tile_end`, or both of everything. Apart they cost 7 products of matrices instead of 5, and
// each sum is taken in the same order.
struct Part {
    bool has_queries;
    bool has_keys;
    int row_begin;  // a multiple of kBlock
    int row_end;
    int tile_begin;
    int tile_end;
};

// Everything of a block of rows that does not depend on the keys.
template <typename T>
void load_block(const ledom_attention_params& p, int batch, int head, int begin, int panels, int dim, int padded,
                bool has_queries, const BackwardScratch& s) {
    const Rows<T> q = head_of<T>(p.q, batch, head), o = head_of<T>(p.o, batch, head);
    const Rows<T> d_o = head_of<T>(p.d_o, batch, head);
    const size_t panel_floats = static_cast<size_t>(padded) * kPanel;
    for (int i = 0; i < panels; ++i) {
        const int row = begin + i * kPanel;
        turn_rows(q, row, kPanel, p.seq, dim, padded, p.scale * kLog2E, s.queries + i * panel_floats);
        turn_rows(d_o, row, kPanel, p.seq, dim, padded, 1.0f, s.d_outputs + i * panel_floats);
    }
    cut_rows(q, begin, kBlock, p.seq, dim, padded, kDimPanel, s.queries_d);
    cut_rows(d_o, begin, kBlock, p.seq, dim, padded, kDimPanel, s.d_outputs_d);
    memset(s.d_queries, 0, sizeof(float) * panel_floats * panels);
    const ptrdiff_t first = (static_cast<ptrdiff_t>(batch) * p.heads + head) * p.seq;
    for (int i = 0; i < kBlock; ++i) {
        const int row = begin + i;
        float product = 0.0f, lse = INFINITY;  // exp2(score - inf) is 0: a row beyond the sequence, or without keys
        if (row < p.seq) {
            const T *a = o[row], *b = d_o[row];
            // In the order and with the rounding of `multiply_by_panel`: dP - delta is exactly 0 for a row with one key.
            for (int from = 0; from < dim; from += dim_step(padded)) {
                const int to = from + dim_step(padded) < dim ? from + dim_step(padded) : dim;
                float part = 0.0f;
                for (int d = from; d < to; ++d) part = multiply_add(to_float(a[d]), to_float(b[d]), part);
                product += part;
            }
            if (has_queries) p.delta[first + row] = product;  // of the units that pass here, one writes
            if (p.lse[first + row] != -INFINITY) lse = p.lse[first + row] * kLog2E;
        }
        s.lse[i] = lse;
        s.delta[i] = product;
    }
}

// P^T and dS^T of one panel against one tile, `column` floats into the block's rows; zeros where it attends nothing.
template <int kDim>
LEDOM_INLINE void panel_gradients(const ledom::Mask& mask, int row, int tile, Range range, int padded, int panel,
                                  const BackwardScratch& s) {
    const int stride = padded + kPadding, column = panel * kPanel;
    float *weights = s.weights + column, *d_scores = s.d_scores + column;
    for (int key = 0; key < kTile; ++key) {
        if (key == range.begin && !range.is_empty()) key = range.end;
        if (key == kTile) break;
        memset(weights + key * kBlock, 0, sizeof(float) * kPanel);
        memset(d_scores + key * kBlock, 0, sizeof(float) * kPanel);
    }
    if (range.is_empty()) return;
    const size_t at = static_cast<size_t>(panel) * padded * kPanel;
    multiply_by_panel<kDim>(s.keys + static_cast<ptrdiff_t>(tile) * stride, padded, range, s.queries + at, weights,
                            kBlock);
    multiply_by_panel<kDim>(s.values + static_cast<ptrdiff_t>(tile) * stride, padded, range, s.d_outputs + at, d_scores,
                            kBlock);
    const bool is_full = ledom::is_full(mask, row, row + kPanel, {tile + range.begin, tile + range.end - 1});
    const LaneIntervals lanes(mask, row);
    Floats lse[kRowVectors], delta[kRowVectors];
    for (int v = 0; v < kRowVectors; ++v) {
        lse[v] = load(s.lse + column + v * kLanes);
        delta[v] = load(s.delta + column + v * kLanes);
    }
    for (int key = range.begin; key < range.end; ++key) {
        for (int v = 0; v < kRowVectors; ++v) {
            float* at_weight = weights + key * kBlock + v * kLanes;
            float* at_score = d_scores + key * kBlock + v * kLanes;
            Floats weight = power_of_two(load(at_weight) - lse[v]);
            Floats d_score = weight * (load(at_score) - delta[v]);
            if (!is_full) {
                weight = lanes.choose(v, tile + key, weight, Floats{});
                d_score = lanes.choose(v, tile + key, d_score, Floats{});
            }
            store(at_weight, weight);
            store(at_score, d_score);
        }
    }
}

// The rows of the block, counted from it, that attend any of the keys tile + key .. + kDimBroadcast - 1.
LEDOM_INLINE Range rows_of_keys(const ledom::Mask& transposed, int key, int begin, int count) {
    if (key >= transposed.seq) return {0, 0};
    const ledom::Interval rows = ledom::attended_by_rows(transposed, key, key + kDimBroadcast);
    const int lo = rows.lo > begin ? rows.lo - begin : 0;
    const int hi = rows.hi < begin + count - 1 ? rows.hi - begin : count - 1;
    return {lo, hi + 1};
}

// One block of rows against all its tiles.
template <typename T, int kDim>
void backward_block(const ledom_attention_params& p, const ledom::Mask& mask, int batch, int head, int begin,
                    const Part& part, const BackwardScratch& s, const KeyGradients& gradients) {
    const int dim = kDim ? kDim : p.head_dim, padded = padded_dim(dim), stride = padded + kPadding;
    const int left = p.seq - begin, panels = left < kBlock ? round_up(left, kPanel) / kPanel : kBackwardPanels;
    const int rows = panels * kPanel;
    const size_t panel_floats = static_cast<size_t>(padded) * kPanel;
    const ledom::Mask transposed = ledom::transposed(mask);
    const ledom::Interval tiles = ledom::tiles_of(ledom::attended_by_rows(mask, begin, begin + rows), kTile);
    const int tile_begin = tiles.lo > part.tile_begin ? tiles.lo : part.tile_begin;
    const int tile_end = tiles.hi < part.tile_end ? tiles.hi + 1 : part.tile_end;
    if (!part.has_queries && tile_begin >= tile_end) return;
    load_block<T>(p, batch, head, begin, panels, dim, padded, part.has_queries, s);
    for (int t = tile_begin; t < tile_end; ++t) {
        const int tile = t * kTile;
        for (int i = 0; i < panels; ++i) {
            const Range range = keys_of_panel(mask, begin + i * kPanel, tile);
            panel_gradients<kDim>(mask, begin + i * kPanel, tile, range, padded, i, s);
            if (range.is_empty() || !part.has_queries) continue;
            const float* keys = s.keys + static_cast<ptrdiff_t>(tile + range.begin) * stride;
            for (int d = 0; d < padded; d += kRowBroadcast) {
                multiply<kRowBroadcast, kRowVectors, Into::kAdd>(
                    range.end - range.begin, keys + d, 1, stride, s.d_scores + range.begin * kBlock + i * kPanel, kBlock,
                    s.d_queries + i * panel_floats + d * kPanel, kPanel);
            }
        }
        for (int key = 0; part.has_keys && key < kTile; key += kDimBroadcast) {
            const Range range = rows_of_keys(transposed, tile + key, begin, rows);
            if (range.is_empty()) continue;
            const float *weights = s.weights + key * kBlock + range.begin;
            const float *d_scores = s.d_scores + key * kBlock + range.begin;
            for (int d = 0; d < padded; d += kDimPanel) {
                const ptrdiff_t from = static_cast<ptrdiff_t>(d) * kBlock + range.begin * kDimPanel;
                const ptrdiff_t to = static_cast<ptrdiff_t>(tile + key) * padded + d;
                multiply<kDimBroadcast, kDimVectors, Into::kAdd>(range.end - range.begin, weights, kBlock, 1,
                                                                 s.d_outputs_d + from, kDimPanel,
                                                                 gradients.d_values + to, padded);
                multiply<kDimBroadcast, kDimVectors, Into::kAdd>(range.end - range.begin, d_scores, kBlock, 1,
                                                                 s.queries_d + from, kDimPanel, gradients.d_keys + to,
                                                                 padded);
            }
        }
    }
    if (!part.has_queries) return;
    float factor[kPanel];
    for (int lane = 0; lane < kPanel; ++lane) factor[lane] = p.scale;
    for (int i = 0; i < panels; ++i) {
        turn_back(s.d_queries + i * panel_floats, begin + i * kPanel, kPanel, p.seq, dim, factor,
                  head_of<T>(p.d_q, batch, head));
    }
}

// A part of one query head: d_q is written, dK and dV are left in `gradients`.
template <typename T, int kDim>
void backward_head(const ledom_attention_params& p, const ledom::Mask& mask, int batch, int head, const Part& part,
                   const BackwardScratch& s, const KeyGradients& gradients) {
    const int dim = kDim ? kDim : p.head_dim, padded = padded_dim(dim), stride = padded + kPadding;
    const int kv_head = head / (p.heads / p.kv_heads);
    const int begin = part.tile_begin * kTile, rows = (part.tile_end - part.tile_begin) * kTile;
    const ptrdiff_t at = static_cast<ptrdiff_t>(begin) * stride, own = static_cast<ptrdiff_t>(begin) * padded;
    copy_rows(head_of<T>(p.k, batch, kv_head), begin, rows, p.seq, dim, padded, s.keys + at, stride);
    copy_rows(head_of<T>(p.v, batch, kv_head), begin, rows, p.seq, dim, padded, s.values + at, stride);
    if (part.has_keys) {
        memset(gradients.d_keys + own, 0, sizeof(float) * rows * padded);
        memset(gradients.d_values + own, 0, sizeof(float) * rows * padded);
    }
    for (int row = part.row_begin; row < part.row_end; row += kBlock) {
        backward_block<T, kDim>(p, mask, batch, head, row, part, s, gradients);
    }
}

// The parts of a head of `seq` tokens: all of it, or first `pieces` of its queries, then as many of its keys.
LEDOM_INLINE Part part_of(const ledom::Mask& mask, int pieces, int piece) {
    const int blocks = (mask.seq + kBlock - 1) / kBlock, tiles = (mask.seq + kTile - 1) / kTile;
    if (pieces == 0) return {true, true, 0, mask.seq, 0, tiles};
    const auto cut = [pieces](int whole, int i) { return static_cast<int>(static_cast<int64_t>(whole) * i / pieces); };
    if (piece >= pieces) {
        return {false, true, 0, mask.seq, cut(tiles, piece - pieces), cut(tiles, piece - pieces + 1)};
    }
    const int begin = cut(blocks, piece) * kBlock, end = cut(blocks, piece + 1) * kBlock;
    const int row_end = end < mask.seq ? end : mask.seq;
    if (begin >= row_end) return {true, false, 0, 0, 0, 0};
    const ledom::Interval attended = ledom::tiles_of(ledom::attended_by_rows(mask, begin, row_end), kTile);
    return {true, false, begin, row_end, attended.lo, attended.hi + 1 > attended.lo ? attended.hi + 1 : attended.lo};
}

// Rows of d_k or d_v of one key head: the sum over the query heads that read it, `floats` apart, times `scale` for d_k.
template <typename T>
void add_up(const float* parts, ptrdiff_t part_floats, int num_parts, Range rows, int dim, int padded, float scale,
            Rows<T> to) {
    for (int row = rows.begin; row < rows.end; ++row) {
        T* line = to[row];
        const float* from = parts + static_cast<ptrdiff_t>(row) * padded;
        for (int d = 0; d < dim; ++d) {
            float sum = from[d];
            for (int i = 1; i < num_parts; ++i) sum += from[i * part_floats + d];
            from_float(sum * scale, line + d);
        }
    }
}

}  // namespace
