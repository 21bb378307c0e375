// Kernels with one fault each: the emulation must name it.
#include "reversed_attention/cuda/device.h"
#include "reversed_attention/cuda/launch.h"

namespace {

struct Params {
    const uint16_t* data;
    int fault;
};

__global__ void faulty(const Params p) {
    LEDOM_SHARED_MEMORY(shared);
    const uint32_t arena = ledom::shared_address(shared);
    const int thread = static_cast<int>(threadIdx.x);
    switch (p.fault) {
        case 0:  // none
            ledom::copy_async_16(arena + 16 * thread, p.data + 8 * thread, true);
            ledom::commit_copies();
            ledom::wait_for_copies<0>();
            __syncthreads();
            break;
        case 1:  // one thread leaves before the barrier
            if (thread != 3) __syncthreads();
            break;
        case 2:  // two barriers in two branches
            if (thread < 32) {
                __syncthreads();
            } else {
                __syncthreads();
            }
            break;
        case 3:  // half of a warp at one product, half at another
            if (thread % 32 < 16) {
                __syncwarp();
            } else {
                ledom::maximum_of_quad(1.0f);
            }
            break;
        case 4:
            ledom::copy_async_16(arena + 8, p.data, true);
            break;
        case 5:
            ledom::copy_async_16(arena + 1024, p.data, true);
            break;
        case 6:
            ledom::copy_async_16(arena, p.data + 1, true);
            break;
        case 7: {
            uint32_t r[4];
            ledom::load_matrices(r, arena + 1024 - 16 + 16 * thread);
            break;
        }
        case 8:  // nobody waits for the copy
            ledom::copy_async_16(arena + 16 * thread, p.data, true);
            ledom::commit_copies();
            break;
        case 9:
            __shfl_xor_sync(0x0000ffffu, 1.0f, 1);
            break;
    }
}

}  // namespace

extern "C" int run_faulty(const uint16_t* data, int fault) {
    return ledom::launch(&faulty, {2, 1, 1}, 64, 1024, Params{data, fault});
}
