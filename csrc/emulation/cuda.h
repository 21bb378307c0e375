// What the source of a CUDA kernel finds when a plain C++ compiler reads it: CUDA's words, and the functions of
// reversed_attention/cuda/device.h, run on the CPU with the same results. Nothing here is part of the product.
//
//     a CUDA thread       a fiber (fiber.h), switched only where it waits
//     a block             an OS thread runs the blocks one after another, several OS threads share the grid
//     shared memory       one arena, full of NaN when a block begins
//     cp.async            poisons its destination with NaN when issued; the data arrive at once, at the wait that
//                         covers them, or at either (Completion); the source is read only then
//     a warp collective   all 32 lanes must come to the same line; the last one computes for all
//
// A kernel that waits too little, too early or in only some threads so gives NaN or an error that says where, under
// at least one order of threads (Order) and one mode of completion. This file is compiled together with the kernel,
// so that a sanitizer sees every access to shared memory; the machinery is in grid.cpp and warp.cpp.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace emulation {

enum class Order { kFirst, kLast, kRandom };       // which of the threads that can run goes on: first or last woken
enum class Completion { kEager, kLazy, kRandom };  // of asynchronous copies: at issue, at the wait, either

struct Options {
    Order order = Order::kFirst;
    Completion completion = Completion::kLazy;
    uint64_t seed = 1;
    int workers = 1;                     // OS threads
    const char* removed_file = nullptr;  // the end of a path; with removed_line: the synchronisation of this line
    int removed_line = 0;                // does nothing, as if it were deleted
};

struct Counts {
    uint64_t matrix_loads;
    uint64_t bank_conflicts;  // of matrix loads: 16-byte rows of one 8 x 8 matrix that share banks
    uint64_t products;
    uint64_t copies;
    uint64_t block_barriers;
};

struct Index3 {
    unsigned x, y, z;
};

// A line of the kernel and what it does there.
struct Site {
    const char* what;
    const char* file;
    int line;
};

// Runs `body(argument)` once in every thread of every block. Returns whether all went well; if not, `last_error` says
// what happened, where and in which thread.
bool run_grid(Index3 grid, unsigned threads, unsigned shared_bytes, void (*body)(const void*), const void* argument);
void configure(const Options& options);
const char* last_error();
// Of all launches since `configure`.
Counts counts_so_far();
const char* synchronisations_so_far();  // the lines of barriers, waits and commits that were reached, one a line

const Index3& thread_index();
const Index3& block_index();
const Index3& block_size();
const Index3& grid_size();
char* shared_memory();
unsigned shared_bytes();

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Is this the synchronisation that was taken out? (It also notes that the line was reached.)
bool is_removed(const Site& site);

enum class Collective {
    kShuffle,
    kLoadMatrices,
    kLoadMatricesTransposed,
    kMultiply,
    kBarrier,
    // Of a warpgroup's products, sm90a.h: each warp does its own rows.
    kBeginProducts,
    kStartProduct,
    kCommitProducts,
    kWaitForProducts,
};

// All lanes of a warp, at one line: `in` and `out` of each lane are the operation's, below.
void wait_for_warp(const Site& site, Collective operation, const void* in, void* out);
void wait_for_block(const Site& site);

struct ShuffleIn {
    uint32_t value;
    unsigned from_lane;
};
struct LoadMatricesIn {
    uint16_t row[8];
    uint32_t address;
};
struct MultiplyIn {
    float c[4];
    uint32_t a[4];
    uint32_t b[2];
};

struct Copy {
    uint32_t to;
    const void* from;
    int bytes;
    bool is_valid;  // otherwise zeros arrive
};

// Notes a copy; true if it is to be carried out at once.
bool begin_copy(const Copy& copy);
void end_group();
// Gives a copy that must be complete before all but the last `keep` groups are; false when there is none left.
bool next_due_copy(int keep, Copy* copy);

// The memory behind a shared address, after checking that it is there and aligned.
inline char* shared_at(uint32_t address, unsigned bytes, const Site& site) {
    const unsigned arena_bytes = shared_bytes();
    if (address % bytes != 0) {
        fail("%s at %s:%d: shared address %u is not a multiple of %u", site.what, site.file, site.line, address, bytes);
    }
    if (address > arena_bytes || arena_bytes - address < bytes) {
        fail("%s at %s:%d: shared address %u lies outside the block's %u bytes", site.what, site.file, site.line,
             address, arena_bytes);
    }
    return shared_memory() + address;
}

// An ordinary store to shared memory (sm90a.h: what reads there without knowing of it).
void note_store(const Site& site, uint32_t address, int bytes);

// Words, not memcpy: a sanitizer then names the line.
inline void carry_out(const Copy& copy) {
    uint32_t* to = reinterpret_cast<uint32_t*>(shared_memory() + copy.to);
    const uint32_t* from = static_cast<const uint32_t*>(copy.from);
    for (int i = 0; i < copy.bytes / 4; ++i) to[i] = copy.is_valid ? from[i] : 0;
}

template <int kBytes>
inline void copy_async(uint32_t to, const void* from, bool is_valid, const Site& site) {
    uint32_t* memory = reinterpret_cast<uint32_t*>(shared_at(to, kBytes, site));
    if (reinterpret_cast<uintptr_t>(from) % kBytes != 0) {
        fail("%s at %s:%d: global address %p is not a multiple of %d", site.what, site.file, site.line, from, kBytes);
    }
    for (int i = 0; i < kBytes / 4; ++i) memory[i] = 0xffffffffu;  // NaN, as bf16 and as fp32
    const Copy copy = {to, from, kBytes, is_valid};
    if (begin_copy(copy)) carry_out(copy);
}

inline void load_matrices(uint32_t (&r)[4], uint32_t address, Collective operation, const Site& site) {
    LoadMatricesIn in;
    const uint16_t* row = reinterpret_cast<const uint16_t*>(shared_at(address, 16, site));
    for (int i = 0; i < 8; ++i) in.row[i] = row[i];
    in.address = address;
    wait_for_warp(site, operation, &in, r);
}

}  // namespace emulation

#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())
#define blockDim (::emulation::block_size())
#define gridDim (::emulation::grid_size())

// As last parameters: the line that calls the function. In its body: that line, and what it calls.
#define LEDOM_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define LEDOM_SITE(what) (::emulation::Site{what, file, line})

inline void __syncthreads(LEDOM_CALLER) { emulation::wait_for_block(LEDOM_SITE("__syncthreads")); }

inline void __syncwarp(LEDOM_CALLER) {
    emulation::wait_for_warp(LEDOM_SITE("__syncwarp"), emulation::Collective::kBarrier, nullptr, nullptr);
}

template <typename T>
inline T __shfl_xor_sync(uint32_t lanes, T value, int distance, LEDOM_CALLER) {
    static_assert(sizeof(T) == 4, "a lane gives one word");
    if (lanes != 0xffffffffu) emulation::fail("%s at %s:%d: not all lanes take part", "__shfl_xor_sync", file, line);
    emulation::ShuffleIn in = {0, (threadIdx.x % 32) ^ static_cast<unsigned>(distance)};
    memcpy(&in.value, &value, 4);
    uint32_t out;
    emulation::wait_for_warp(LEDOM_SITE("__shfl_xor_sync"), emulation::Collective::kShuffle, &in, &out);
    memcpy(&value, &out, 4);
    return value;
}
