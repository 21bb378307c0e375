// The CUDA kernels of this build, and what the CUDA runtime says.
#include <cuda_runtime_api.h>

#include "reversed_attention/params.h"

extern "C" {

const ledom_cuda_variant* ledom_cuda_variants(int* count) {
    static const ledom_cuda_variant all[] = {
        // Its machine code runs on no other GPU. It has a forward pass only: both give the same logarithms.
        {"sm90a", 90, 90, &ledom_attention_forward_sm90a, &ledom_attention_backward_cuda},
        {"sm80", 80, 129, &ledom_attention_forward_cuda, &ledom_attention_backward_cuda},
    };
    *count = static_cast<int>(sizeof all / sizeof all[0]);
    return all;
}

void ledom_cuda_versions(int* runtime, int* driver) {
    *runtime = CUDART_VERSION;
    if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
}

const char* ledom_cuda_error_text(int status) {
    return cudaGetErrorString(static_cast<cudaError_t>(status - LEDOM_CUDA_ERROR));
}

}  // extern "C"
