// Tiles of bf16 rows in shared memory, and the products of tiles. All three kernels are made of these.
//
// A row is cut into chunks of 16 bytes; chunk c of row r lies in place c ^ (r % 8) of its row. The 8 rows that a matrix
// load reads at once so come from 8 different groups of banks, and 16 neighbouring bytes of global memory stay
// together:
//
//     row 0   c0 c1 c2 c3 c4 c5 c6 c7       row 1   c1 c0 c3 c2 c5 c4 c7 c6       row 2   c2 c3 c0 c1 c6 c7 c4 c5
#pragma once

#include "reversed_attention/cuda/device.h"
#include "reversed_attention/mask.h"
#include "reversed_attention/params.h"

namespace ledom {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr int kWarpRows = 16;  // of a tile that one warp works on: the height of a fragment

// One head of one sequence in global memory; `row_stride` counts elements.
struct Head {
    uint16_t* data;
    int64_t row_stride;
};

LEDOM_DEVICE Head head_of(const ledom_tensor& x, int batch, int head) {
    return {static_cast<uint16_t*>(x.data) + batch * x.stride_batch + head * x.stride_head, x.stride_seq};
}

LEDOM_DEVICE Mask mask_of(const ledom_attention_params& p, int batch) {
    const int64_t row = static_cast<int64_t>(batch) * p.seq;
    return {p.seq, p.left, p.right, p.doc_first ? p.doc_first + row : nullptr, p.doc_last ? p.doc_last + row : nullptr};
}

// Which of the blocks of rows this one works on. Blocks start in order: those with the most to walk come first.
LEDOM_DEVICE int longest_first(const Mask& mask) {
    return static_cast<int>(mask.left > mask.right ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

// Where element i of c[n] lies in a row of a product.
LEDOM_DEVICE int column_of(int n, int i) { return 8 * n + lane() % 4 * 2 + i % 2; }

// The products of two packed pairs, summed.
LEDOM_DEVICE float dot_of_pairs(uint32_t a, uint32_t b) { return low_of(a) * low_of(b) + high_of(a) * high_of(b); }

template <int kRows, int kDim>
struct Tile {
    static constexpr uint32_t kRowBytes = kDim * 2;
    static constexpr uint32_t kBytes = kRows * kRowBytes;
    static_assert(kDim % 64 == 0 && kRows % 16 == 0, "chunks come in groups of 8, rows in fragments");

    uint32_t address;

    // Chunk 8 * group + chunk of a row. Where group is a constant it is so in the instruction too.
    LEDOM_DEVICE uint32_t at(int row, int group, int chunk) const {
        return address + static_cast<uint32_t>(row) * kRowBytes + static_cast<uint32_t>(group) * 128 +
               static_cast<uint32_t>(chunk ^ (row & 7)) * 16;
    }
};

// Starts the copies of rows begin .. of a head into a tile; rows beyond the sequence become 0. 8 threads take 128 bytes
// of a row.
template <int kThreads, int kRows, int kDim>
LEDOM_DEVICE void copy_rows(const Tile<kRows, kDim>& tile, const Head& head, int begin, int seq) {
    constexpr int kRowsAtOnce = kThreads / 8;
    static_assert(kRows % kRowsAtOnce == 0, "every thread copies as much");
    const int first = static_cast<int>(threadIdx.x) / 8, chunk = static_cast<int>(threadIdx.x) % 8;
#pragma unroll
    for (int step = 0; step < kRows; step += kRowsAtOnce) {
        const int row = begin + step + first;
        const bool is_valid = row < seq;
        const uint16_t* from = head.data + (is_valid ? row : 0) * head.row_stride + chunk * 8;
        // kRowsAtOnce is a multiple of 8: the place in the group is the same in every step.
        const uint32_t to = tile.at(first, 0, chunk) + step * Tile<kRows, kDim>::kRowBytes;
#pragma unroll
        for (int group = 0; group < kDim / 64; ++group) copy_async_16(to + group * 128, from + group * 64, is_valid);
    }
}

// c = the 16 rows of `a` from `row` on, times the rows of b turned: c[n] holds columns 8n .. 8n + 7.
template <int kRows, int kColumns, int kDim>
LEDOM_DEVICE void multiply_by_rows(float (&c)[kColumns / 8][4], const Tile<kRows, kDim>& a, int row,
                                   const Tile<kColumns, kDim>& b) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) c[n][i] = 0.0f;
    }
    const int i = lane();
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
        uint32_t x[4];
        load_matrices(x, a.at(row + i % 16, k / 4, k % 4 * 2 + i / 16));
#pragma unroll
        for (int n = 0; n < kColumns / 16; ++n) {
            uint32_t y[4];
            load_matrices(y, b.at(16 * n + i / 16 * 8 + i % 8, k / 4, k % 4 * 2 + i / 8 % 2));
            multiply_add(c[2 * n], x, y[0], y[1]);
            multiply_add(c[2 * n + 1], x, y[2], y[3]);
        }
    }
}

// c += p times b. p holds 16 rows of kRows numbers as a product leaves them, which are rounded to bf16.
template <int kRows, int kDim>
LEDOM_DEVICE void add_product(float (&c)[kDim / 8][4], const float (&p)[kRows / 8][4], const Tile<kRows, kDim>& b) {
    const int i = lane();
#pragma unroll
    for (int k = 0; k < kRows / 16; ++k) {
        const float(&left)[4] = p[2 * k], (&right)[4] = p[2 * k + 1];
        const uint32_t x[4] = {pack_bf16(left[0], left[1]), pack_bf16(left[2], left[3]), pack_bf16(right[0], right[1]),
                               pack_bf16(right[2], right[3])};
#pragma unroll
        for (int n = 0; n < kDim / 16; ++n) {
            uint32_t y[4];
            load_matrices_transposed(y, b.at(16 * k + i / 8 % 2 * 8 + i % 8, n / 4, n % 4 * 2 + i / 16));
            multiply_add(c[2 * n], x, y[0], y[1]);
            multiply_add(c[2 * n + 1], x, y[2], y[3]);
        }
    }
}

// Writes 16 rows, each times its factor, to rows begin .. of a head. They go through the rows of `tile` from `row` on,
// which only this warp has read: a lane then writes 16 bytes of global memory at a time.
template <int kRows, int kDim>
LEDOM_DEVICE void store_rows(const float (&c)[kDim / 8][4], const float (&factor)[2], const Tile<kRows, kDim>& tile,
                             int row, const Head& head, int begin, int seq) {
    const int g = lane() / 4, t = lane() % 4;
    __syncwarp();  // all lanes have read what is overwritten now
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
        store_shared_4(tile.at(row + g, n / 8, n % 8) + 4 * t, pack_bf16(c[n][0] * factor[0], c[n][1] * factor[0]));
        store_shared_4(tile.at(row + g + 8, n / 8, n % 8) + 4 * t, pack_bf16(c[n][2] * factor[1], c[n][3] * factor[1]));
    }
    __syncwarp();  // all 16 rows are complete
#pragma unroll
    for (int step = 0; step < kWarpRows; step += 4) {
        const int r = step + lane() / 8, chunk = lane() % 8;
        if (begin + r >= seq) break;
        uint16_t* to = head.data + (begin + r) * head.row_stride + chunk * 8;
#pragma unroll
        for (int group = 0; group < kDim / 64; ++group) {
            *reinterpret_cast<uint4*>(to + group * 64) = load_shared_16(tile.at(row + r, group, chunk));
        }
    }
}

// What the two rows of a lane attend: rows begin + lane / 4 and the eighth after it. Rows beyond the sequence attend
// nothing.
struct LaneRows {
    Interval keys[2];

    LEDOM_DEVICE LaneRows(const Mask& mask, int begin) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = begin + lane() / 4 + 8 * r;
            keys[r] = row < mask.seq ? attended(mask, row) : Interval{1, 0};
        }
    }

    // May element i of c[n] be seen, if the columns begin with the key `begin`?
    LEDOM_DEVICE bool sees(int n, int i, int begin) const {
        const int key = begin + column_of(n, i);
        return keys[i / 2].lo <= key && key <= keys[i / 2].hi;
    }
};

}  // namespace ledom
