// What the emulation adds for sm_90a: barriers in shared memory, copies of boxes, products of a warpgroup.
//
//     barrier             counts arrivals and bytes; its state is kept aside, its 8 bytes must not be touched
//     copy of a box       poisons its destination with NaN when issued; arrives at once, when no thread can run, or at
//                         random; one that goes out reads its source at once, at the wait, or when no thread can run
//     product             each warp does the 16 rows that are its own. The accumulators are NaN from issue to wait; the
//                         operands are read at issue, or as late as at this warp's wait
//
// Whoever writes where something under way reads or writes is told so, as is an asynchronous reader of what an ordinary
// store wrote without a fence. The machinery is in boxes.cpp and products.cpp.
#pragma once

#include "emulation/cuda.h"

namespace emulation {

constexpr uint32_t kRowBytes = 128;  // of a box and of a panel: what the swizzle spans

// [batch, head, token, column] of bf16, by the extents and strides of column, token, head, batch; strides count
// elements. A box is box[0] columns of box[1] tokens. It takes the room of CUDA's CUtensorMap: parameters lie alike.
struct alignas(128) TensorMap {
    uint16_t* data;
    int64_t sizes[4];
    int64_t strides[4];
    int box[2];
};
static_assert(sizeof(TensorMap) == 128, "as CUtensorMap");

struct BoxCopy {
    TensorMap map;
    uint32_t shared;
    uint32_t barrier;  // of one that comes in
    int at[4];         // column, token, head, batch
    void (*carry_out)(const BoxCopy& copy);
};

void init_barrier(const Site& site, uint32_t barrier, int count);
void publish_barriers(const Site& site);
void arrive(const Site& site, uint32_t barrier, uint32_t expected_bytes);
void wait_for_phase(const Site& site, uint32_t barrier, uint32_t parity);

void start_load(const Site& site, const BoxCopy& copy);
void start_store(const Site& site, const BoxCopy& copy);
void end_store_group();
void wait_for_stores();
void check_reading(const Site& site, uint32_t begin, uint32_t end);
void fence_stores();

// Barrier `number` of `threads` threads; one that does not wait only counts.
void come_to_barrier(const Site& site, int number, int threads, bool waits);

// A warpgroup changes the number of registers of its threads.
void set_registers(const Site& site, int count, bool takes);

struct ProductIn {
    Site site;
    float* c;           // of this lane: columns / 2
    const uint32_t* a;  // null: from shared memory
    uint64_t a_operand, b_operand;
    int columns;
    bool adds;
};

struct WaitIn {
    Site site;
    int keep;
};

// Element (token, column) of a box for the address where it lies, with the swizzle: 16-byte places of a row are
// exchanged by the number of the row.
inline uint32_t place_in_box(uint32_t shared, int token, int column) {
    const uint32_t address = shared + static_cast<uint32_t>(token) * kRowBytes + static_cast<uint32_t>(column) * 2;
    return address ^ (address / kRowBytes % 8) * 16;
}

// Compiled with the kernel, for the sanitizers to see the addresses in global memory. The race detector would take the
// thread that happens to run for the one that copies.
__attribute__((no_sanitize("thread"))) inline void carry_out_load(const BoxCopy& copy) {
    const TensorMap& map = copy.map;
    const uint16_t* from = map.data + copy.at[2] * map.strides[2] + copy.at[3] * map.strides[3];
    for (int row = 0; row < map.box[1]; ++row) {
        const int64_t token = int64_t{copy.at[1]} + row;
        for (int i = 0; i < map.box[0]; ++i) {
            const int64_t column = int64_t{copy.at[0]} + i;
            const bool is_inside = token >= 0 && token < map.sizes[1] && column >= 0 && column < map.sizes[0];
            *reinterpret_cast<uint16_t*>(shared_memory() + place_in_box(copy.shared, row, i)) =
                is_inside ? from[token * map.strides[1] + column] : uint16_t{0};
        }
    }
}

__attribute__((no_sanitize("thread"))) inline void carry_out_store(const BoxCopy& copy) {
    const TensorMap& map = copy.map;
    uint16_t* to = map.data + copy.at[2] * map.strides[2] + copy.at[3] * map.strides[3];
    for (int row = 0; row < map.box[1]; ++row) {
        const int64_t token = int64_t{copy.at[1]} + row;
        for (int i = 0; i < map.box[0]; ++i) {
            const int64_t column = int64_t{copy.at[0]} + i;
            if (token < 0 || token >= map.sizes[1] || column < 0 || column >= map.sizes[0]) continue;
            to[token * map.strides[1] + column] =
                *reinterpret_cast<const uint16_t*>(shared_memory() + place_in_box(copy.shared, row, i));
        }
    }
}

}  // namespace emulation
