// What a warp computes together once all its lanes have come: the layouts of PTX ISA 9.0, sections 9.7.9.22
// (shfl.sync), 9.7.14.5.15 (ldmatrix) and 9.7.14.5.8 (mma.m16n8k16).
#include "emulation/grid.h"

namespace emulation {

namespace {

float bf16_to_float(uint32_t bits) {
    const uint32_t wide = bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

void shuffle(const Lane* lanes) {
    for (int i = 0; i < kLanes; ++i) {
        const auto* in = static_cast<const ShuffleIn*>(lanes[i].in);
        const auto* from = static_cast<const ShuffleIn*>(lanes[in->from_lane % kLanes].in);
        *static_cast<uint32_t*>(lanes[i].out) = from->value;
    }
}

uint64_t bank_conflicts(const Lane* rows) {
    unsigned used = 0;
    uint64_t conflicts = 0;
    for (int i = 0; i < 8; ++i) {
        const unsigned banks = 1u << (static_cast<const LoadMatricesIn*>(rows[i].in)->address / 16 % 8);
        conflicts += (used & banks) != 0;
        used |= banks;
    }
    return conflicts;
}

void load_matrices(const Lane* lanes, bool is_transposed, Counts* counts) {
    ++counts->matrix_loads;
    for (int m = 0; m < 4; ++m) {
        const Lane* rows = lanes + 8 * m;
        counts->bank_conflicts += bank_conflicts(rows);
        const auto element = [&](int row, int column) -> uint32_t {
            return static_cast<const LoadMatricesIn*>(rows[row].in)->row[column];
        };
        for (int i = 0; i < kLanes; ++i) {
            const int g = i / 4, t = i % 4;
            static_cast<uint32_t*>(lanes[i].out)[m] = is_transposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                                                                    : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
        }
    }
}

void multiply(const Lane* lanes) {
    float a[16][16], b[16][8], c[16][8];
    for (int i = 0; i < kLanes; ++i) {
        const auto* in = static_cast<const MultiplyIn*>(lanes[i].in);
        const int g = i / 4, t = i % 4;
        for (int half = 0; half < 2; ++half) {
            for (int r = 0; r < 4; ++r) {
                a[g + r % 2 * 8][r / 2 * 8 + 2 * t + half] = bf16_to_float(in->a[r] >> (16 * half) & 0xffff);
            }
            for (int r = 0; r < 2; ++r) b[r * 8 + 2 * t + half][g] = bf16_to_float(in->b[r] >> (16 * half) & 0xffff);
        }
        for (int r = 0; r < 4; ++r) c[g + r / 2 * 8][2 * t + r % 2] = in->c[r];
    }
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < 16; ++k) {
            for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
        }
    }
    for (int i = 0; i < kLanes; ++i) {
        for (int r = 0; r < 4; ++r) {
            static_cast<float*>(lanes[i].out)[r] = c[i / 4 + r / 2 * 8][2 * (i % 4) + r % 2];
        }
    }
}

}  // namespace

void compute(Collective operation, const Lane* lanes, Counts* counts) {
    switch (operation) {
        case Collective::kShuffle:
            return shuffle(lanes);
        case Collective::kLoadMatrices:
        case Collective::kLoadMatricesTransposed:
            return load_matrices(lanes, operation == Collective::kLoadMatricesTransposed, counts);
        case Collective::kMultiply:
            ++counts->products;
            return multiply(lanes);
        case Collective::kBarrier:
            return;
        case Collective::kBeginProducts:
            return begin_products(lanes);
        case Collective::kStartProduct:
            ++counts->products;
            return start_product(lanes);
        case Collective::kCommitProducts:
            return commit_products(lanes);
        case Collective::kWaitForProducts:
            return wait_for_products(lanes);
    }
}

}  // namespace emulation
