// What a thread of sm_90a can do that C++ cannot say: barriers in shared memory that count bytes, copies of boxes by
// tensor map (TMA), products of a warpgroup (wgmma), registers that move between warpgroups. All inline assembly of the
// sm_90a kernels is here and in device.h; a plain C++ compiler gets the same functions from csrc/emulation/. Source of
// each: PTX ISA 9.0, sections 9.7.9.25 (copies), 9.7.13.15 (barriers), 9.7.15 (products).
//
// A tile lies in panels of 64 columns, 128 bytes a row; chunk c (16 bytes) of row r in place c ^ (r % 8) of its row.
// That is what the copies write with a 128-byte swizzle and what the products read. Tiles begin at multiples of 1024.
#pragma once

#include "reversed_attention/cuda/device.h"

#if defined(__CUDACC__)

#include <cuda.h>

namespace ledom {

using TensorMap = CUtensorMap;

#define LEDOM_GRID_CONSTANT __grid_constant__

// ---- Barriers in shared memory. A phase ends when `count` arrivals and all expected bytes have come; `wait` with the
// phase's parity (0 for the first) returns once it has ended.
LEDOM_DEVICE void init_barrier(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(count) : "memory");
}

// Makes new barriers known to the copies. The block's threads learn of them by a __syncthreads after it.
LEDOM_DEVICE void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;\n" ::: "memory");
}

LEDOM_DEVICE void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// One arrival for a warp, all of whose lanes are done.
LEDOM_DEVICE void arrive_as_warp(uint32_t barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(barrier);
}

// One arrival, and `bytes` more that copies will bring in this phase.
LEDOM_DEVICE void arrive_expecting(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

LEDOM_DEVICE void wait(uint32_t barrier, uint32_t parity) {
    uint32_t is_over = 0;
    do {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}\n"
            : "=r"(is_over)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (is_over == 0);
}

// ---- Copies of boxes: coordinates are column, token, head, sequence. What lies outside the tensor arrives as 0 and
// is not stored.
LEDOM_DEVICE void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, int column, int token, int head,
                           int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];\n" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(column), "r"(token), "r"(head), "r"(batch)
        : "memory");
}

LEDOM_DEVICE void store_box(const TensorMap& map, uint32_t from, int column, int token, int head, int batch) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n" ::"l"(
                     &map),
                 "r"(from), "r"(column), "r"(token), "r"(head), "r"(batch)
                 : "memory");
}

LEDOM_DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }

// Until the stores of this thread have read shared memory.
LEDOM_DEVICE void wait_for_stores() { asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory"); }

// What this thread wrote to shared memory by ordinary stores may from now on be read by copies.
LEDOM_DEVICE void fence_for_copies() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// ---- Warpgroups: 4 warps, the first one's number divisible by 4.
template <int kCount>
LEDOM_DEVICE void keep_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCount));
}

template <int kCount>
LEDOM_DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kCount));
}

// Barrier `number` (1 .. 15) is complete when `threads` threads have come; `pass_barrier` does not wait for that.
LEDOM_DEVICE void wait_at_barrier(int number, int threads) {
    asm volatile("bar.sync %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
}

LEDOM_DEVICE void pass_barrier(int number, int threads) {
    asm volatile("bar.arrive %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
}

// ---- Products of a warpgroup: c (64 x kColumns, fp32) is under way from the call to the wait, and nobody may touch it
// or the registers of `a`. Warp w holds rows 16w .. 16w + 15, as c[n] of device.h lies in them: element i of c[n] is
// c[4n + i].
LEDOM_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
LEDOM_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Nothing that reads or writes `c` moves over this.
template <int kCount>
LEDOM_DEVICE void pin(float (&c)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

// Until all groups of products but the last kKeep are complete; `c` is the result of one of them.
template <int kKeep, int kCount>
LEDOM_DEVICE void wait_for_products(float (&c)[kCount]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kKeep) : "memory");
    pin(c);
}

// The accumulators as operands of an instruction, 8 at a time.
#define LEDOM_NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LEDOM_NAMES_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define LEDOM_NAMES_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define LEDOM_NAMES_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define LEDOM_NAMES_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define LEDOM_NAMES_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define LEDOM_NAMES_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define LEDOM_NAMES_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define LEDOM_NAMES_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define LEDOM_NAMES_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define LEDOM_NAMES_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define LEDOM_NAMES_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define LEDOM_PLACES(i) \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define LEDOM_NAMES_32 LEDOM_NAMES_0 ", " LEDOM_NAMES_1 ", " LEDOM_NAMES_2 ", " LEDOM_NAMES_3
#define LEDOM_PLACES_32 LEDOM_PLACES(0), LEDOM_PLACES(8), LEDOM_PLACES(16), LEDOM_PLACES(24)
#define LEDOM_NAMES_40 LEDOM_NAMES_32 ", " LEDOM_NAMES_4
#define LEDOM_PLACES_40 LEDOM_PLACES_32, LEDOM_PLACES(32)
#define LEDOM_NAMES_48 LEDOM_NAMES_40 ", " LEDOM_NAMES_5
#define LEDOM_PLACES_48 LEDOM_PLACES_40, LEDOM_PLACES(40)
#define LEDOM_NAMES_56 LEDOM_NAMES_48 ", " LEDOM_NAMES_6
#define LEDOM_PLACES_56 LEDOM_PLACES_48, LEDOM_PLACES(48)
#define LEDOM_NAMES_64 LEDOM_NAMES_56 ", " LEDOM_NAMES_7
#define LEDOM_PLACES_64 LEDOM_PLACES_56, LEDOM_PLACES(56)
#define LEDOM_NAMES_72 LEDOM_NAMES_64 ", " LEDOM_NAMES_8
#define LEDOM_PLACES_72 LEDOM_PLACES_64, LEDOM_PLACES(64)
#define LEDOM_NAMES_80 LEDOM_NAMES_72 ", " LEDOM_NAMES_9
#define LEDOM_PLACES_80 LEDOM_PLACES_72, LEDOM_PLACES(72)
#define LEDOM_NAMES_88 LEDOM_NAMES_80 ", " LEDOM_NAMES_10
#define LEDOM_PLACES_88 LEDOM_PLACES_80, LEDOM_PLACES(80)
#define LEDOM_NAMES_96 LEDOM_NAMES_88 ", " LEDOM_NAMES_11
#define LEDOM_PLACES_96 LEDOM_PLACES_88, LEDOM_PLACES(88)

template <int kColumns>
struct Products;

// The last five numbers are those of the operands after the accumulators.
#define LEDOM_PRODUCTS(columns, names, places, o0, o1, o2, o3, o4)                                                   \
    template <>                                                                                                      \
    struct Products<columns> {                                                                                       \
        LEDOM_DEVICE static void rows(float (&c)[columns / 2], uint64_t a, uint64_t b, int adds) {                   \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o2 ", 0;\n"                                           \
                         "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 {" names "}, %" #o0 ", %" #o1 \
                         ", p, 1, 1, 0, 0;\n}\n"                                                                     \
                         : places                                                                                    \
                         : "l"(a), "l"(b), "r"(adds));                                                               \
        }                                                                                                            \
        LEDOM_DEVICE static void columns_of(float (&c)[columns / 2], const uint32_t* a, uint64_t b) {                \
            asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                                  \
                         "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 {" names "}, {%" #o0 ", %" #o1 \
                         ", %" #o2 ", %" #o3 "}, %" #o4 ", p, 1, 1, 1;\n}\n"                                         \
                         : places                                                                                    \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                      \
        }                                                                                                            \
    }

LEDOM_PRODUCTS(64, LEDOM_NAMES_32, LEDOM_PLACES_32, 32, 33, 34, 35, 36);
LEDOM_PRODUCTS(80, LEDOM_NAMES_40, LEDOM_PLACES_40, 40, 41, 42, 43, 44);
LEDOM_PRODUCTS(96, LEDOM_NAMES_48, LEDOM_PLACES_48, 48, 49, 50, 51, 52);
LEDOM_PRODUCTS(112, LEDOM_NAMES_56, LEDOM_PLACES_56, 56, 57, 58, 59, 60);
LEDOM_PRODUCTS(128, LEDOM_NAMES_64, LEDOM_PLACES_64, 64, 65, 66, 67, 68);
LEDOM_PRODUCTS(176, LEDOM_NAMES_88, LEDOM_PLACES_88, 88, 89, 90, 91, 92);
LEDOM_PRODUCTS(192, LEDOM_NAMES_96, LEDOM_PLACES_96, 96, 97, 98, 99, 100);

// c = a b^T (or c += a b^T if `adds`) over 16 columns: a is 64 rows, b is kColumns rows, both in shared memory.
template <int kColumns>
LEDOM_DEVICE void multiply_by_rows(float (&c)[kColumns / 2], uint64_t a, uint64_t b, bool adds) {
    Products<kColumns>::rows(c, a, b, adds);
}

// c += a b: a is 64 x 16 in registers (a fragment as device.h draws it), b is 16 rows in shared memory.
template <int kColumns>
LEDOM_DEVICE void multiply_by_columns(float (&c)[kColumns / 2], const uint32_t (&a)[4], uint64_t b) {
    Products<kColumns>::columns_of(c, a, b);
}

}  // namespace ledom

#else

#include "emulation/device_sm90a.h"

#define LEDOM_GRID_CONSTANT

#endif

namespace ledom {

// How a product finds an operand in shared memory: its address, the bytes from panel to panel (only if the product runs
// along rows, `multiply_by_columns`), the bytes from 8 rows to the next 8, and the 128-byte swizzle. All in units of 16.
LEDOM_DEVICE uint64_t operand(uint32_t address, uint32_t panel_bytes) {
    constexpr uint64_t kEightRows = 1024 / 16, kSwizzle128 = 1;
    return static_cast<uint64_t>((address & 0x3ffff) / 16) | static_cast<uint64_t>(panel_bytes / 16) << 16 |
           kEightRows << 32 | kSwizzle128 << 62;
}

// The same operand, `bytes` further on.
LEDOM_DEVICE uint64_t moved(uint64_t operand, uint32_t bytes) { return operand + bytes / 16; }

}  // namespace ledom
