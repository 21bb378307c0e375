// Each function of cuda/device.h once, on numbers that the caller gives: compiled by nvcc it runs on a GPU, compiled by
// g++ with csrc/emulation/ on the CPU. megatron_ledom/ops/verify/wrappers.py compares the two, which checks the emulation.
//
// Every lane of one warp reads its own 32 words of `in`, and writes for section s the words out[s][lane][0 .. 3].
#include "reversed_attention/cuda/device.h"
#include "reversed_attention/cuda/launch.h"

namespace {

constexpr int kWords = 32, kSections = 12;

struct Params {
    const uint32_t* in;
    uint32_t* out;
    int device;
    void* stream;
};

LEDOM_DEVICE void write(const Params& p, int section, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    uint32_t* to = p.out + (section * 32 + ledom::lane()) * 4;
    to[0] = a;
    to[1] = b;
    to[2] = c;
    to[3] = d;
}

LEDOM_DEVICE uint32_t bits_of(float value) {
    union {
        float number;
        uint32_t bits;
    } both;
    both.number = value;
    return both.bits;
}

LEDOM_DEVICE void write(const Params& p, int section, float a, float b, float c, float d) {
    write(p, section, bits_of(a), bits_of(b), bits_of(c), bits_of(d));
}

__global__ void wrappers(const Params p) {
    LEDOM_SHARED_MEMORY(shared);
    const uint32_t arena = ledom::shared_address(shared);
    const int lane = ledom::lane();
    const uint32_t* in = p.in + lane * kWords;
    const auto number = [&](int i) { return ledom::float_of_bits(in[i]); };

    // 0, 1: copies to shared memory; every fifth and every third are of zeros.
    ledom::copy_async_16(arena + 16 * lane, in, lane % 5 != 4);
    ledom::commit_copies();
    ledom::copy_async_4(arena + 512 + 4 * lane, in + 4, lane % 3 != 2);
    ledom::commit_copies();
    ledom::wait_for_copies<0>();
    __syncthreads();
    const int other = (7 * lane + 3) % 32;
    const uint4 read = ledom::load_shared_16(arena + 16 * other);
    write(p, 0, read.x, read.y, read.z, read.w);
    write(p, 1, bits_of(ledom::load_shared_float(arena + 512 + 4 * other)), 0u, 0u, 0u);

    // 2, 3: matrices, whose rows lie in an order of their own.
    uint32_t a[4], b[4];
    ledom::load_matrices(a, arena + 16 * other);
    ledom::load_matrices_transposed(b, arena + 16 * other);
    write(p, 2, a[0], a[1], a[2], a[3]);
    write(p, 3, b[0], b[1], b[2], b[3]);
    __syncthreads();

    // 4: words written to shared memory.
    ledom::store_shared_4(arena + 4 * other, in[5]);
    __syncthreads();
    write(p, 4, bits_of(ledom::load_shared_float(arena + 4 * lane)), 0u, 0u, 0u);

    // 5: rounding, of any bits: ties, subnormal numbers, infinities and NaN among them.
    write(p, 5, ledom::pack_bf16(number(6), number(7)), ledom::pack_bf16(number(8), number(9)),
          ledom::pack_bf16(number(10), number(11)), ledom::pack_bf16(number(12), number(13)));
    // 6: and back.
    write(p, 6, ledom::low_of(in[6]), ledom::high_of(in[6]), ledom::low_of(in[7]), ledom::high_of(in[7]));

    // 7: a product of standard normal numbers.
    const uint32_t x[4] = {in[14], in[15], in[16], in[17]};
    float c[4] = {number(20), number(21), number(22), number(23)};
    ledom::multiply_add(c, x, in[18], in[19]);
    write(p, 7, c[0], c[1], c[2], c[3]);

    // 8: powers, of numbers from -140 to 20.
    write(p, 8, ledom::power_of_two(number(24)), ledom::power_of_two(number(25)), ledom::power_of_two(number(26)),
          ledom::power_of_two(number(27)));
    // 9: their edges.
    write(p, 9, ledom::power_of_two(-INFINITY), ledom::power_of_two(0.0f), ledom::power_of_two(-126.0f),
          ledom::power_of_two(-127.5f));

    // 10: lanes that share rows of a product.
    write(p, 10, ledom::sum_of_quad(number(20)), ledom::maximum_of_quad(number(21)), 0.0f, 0.0f);
    // 11: names of lanes.
    write(p, 11, static_cast<uint32_t>(lane), static_cast<uint32_t>(ledom::warp()), blockIdx.x, gridDim.x);
}

}  // namespace

extern "C" int ledom_wrappers(const uint32_t* in, uint32_t* out, int device, void* stream) {
    return ledom::launch(&wrappers, {1, 1, 1}, 32, 1024, Params{in, out, device, stream});
}

extern "C" int ledom_wrapper_sections() { return kSections; }
