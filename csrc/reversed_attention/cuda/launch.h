// Checks what callers ask for, and starts kernels. The same source serves CUDA and the emulation.
#pragma once

#include "reversed_attention/params.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

namespace ledom {

struct Grid {
    unsigned x, y, z;
};

// Makes a device the current one, and the one before it again at the end.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        status_ = cudaGetDevice(&before_);
        if (status_ == cudaSuccess && before_ != device) status_ = cudaSetDevice(device);
    }
    ~DeviceGuard() {
        if (status_ == cudaSuccess) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    cudaError_t status() const { return status_; }

  private:
    int before_ = 0;
    cudaError_t status_;
};

// Starts a kernel on the stream of its parameters and does not wait for it.
template <typename Params>
int launch(void (*kernel)(Params), Grid grid, int threads, uint32_t shared_bytes, const Params& params) {
    const DeviceGuard guard(params.device);
    cudaError_t status = guard.status();
    if (status == cudaSuccess) {
        status =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    }
    if (status == cudaSuccess) {
        kernel<<<dim3(grid.x, grid.y, grid.z), threads, shared_bytes, static_cast<cudaStream_t>(params.stream)>>>(
            params);
        status = cudaGetLastError();
    }
    return status == cudaSuccess ? LEDOM_OK : LEDOM_CUDA_ERROR + static_cast<int>(status);
}

}  // namespace ledom

#else

#include "emulation/cuda.h"

namespace ledom {

using Grid = emulation::Index3;
constexpr int kLaunchFailure = 719;  // cudaErrorLaunchFailure; emulation::last_error() says more

template <typename Params>
int launch(void (*kernel)(Params), Grid grid, int threads, uint32_t shared_bytes, const Params& params) {
    struct Call {
        void (*kernel)(Params);
        const Params* params;
    } call = {kernel, &params};
    const auto run = [](const void* argument) {
        const Call* made = static_cast<const Call*>(argument);
        made->kernel(*made->params);
    };
    const bool is_done = emulation::run_grid(grid, static_cast<unsigned>(threads), shared_bytes, run, &call);
    return is_done ? LEDOM_OK : LEDOM_CUDA_ERROR + kLaunchFailure;
}

}  // namespace ledom

#endif

namespace ledom {

constexpr int kMaxGridY = 65535;  // of CUDA; also of its z

// Is every row of the tensor aligned to the 16 bytes that a copy moves?
inline bool is_aligned(const ledom_tensor& x) {
    const int64_t strides = x.stride_batch | x.stride_seq | x.stride_head;
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && strides % 8 == 0;
}

// What the CUDA kernels ask for. Documents lie in the GPU's memory: that they are sound is the caller's word.
inline int check_attention(const ledom_attention_params* p, bool is_backward) {
    if (p == nullptr || p->struct_size != sizeof(ledom_attention_params) || p->version != LEDOM_ABI_VERSION) {
        return LEDOM_BAD_STRUCT;
    }
    if (p->dtype != LEDOM_FLOAT32 && p->dtype != LEDOM_BFLOAT16) return LEDOM_BAD_TYPE;
    if (p->batch < 1 || p->seq < 1 || p->heads < 1 || p->kv_heads < 1 || p->head_dim < 1) return LEDOM_BAD_SHAPE;
    if (p->heads % p->kv_heads != 0) return LEDOM_BAD_SHAPE;
    if (p->left < 0 || p->right < 0 || p->left > p->seq || p->right > p->seq) return LEDOM_BAD_MASK;
    if ((p->doc_first == nullptr) != (p->doc_last == nullptr)) return LEDOM_BAD_MASK;
    const ledom_tensor* tensors[] = {&p->q, &p->k, &p->v, &p->o, &p->d_o, &p->d_q, &p->d_k, &p->d_v};
    bool are_all_aligned = true;
    for (int i = 0; i < (is_backward ? 8 : 4); ++i) {
        if (tensors[i]->data == nullptr) return LEDOM_NULL_POINTER;
        are_all_aligned = are_all_aligned && is_aligned(*tensors[i]);
    }
    if (p->lse == nullptr || (is_backward && p->delta == nullptr)) return LEDOM_NULL_POINTER;
    const bool is_served = p->dtype == LEDOM_BFLOAT16 && are_all_aligned && p->scale > 0.0f && p->heads <= kMaxGridY &&
                           p->batch <= kMaxGridY;
    return is_served ? LEDOM_OK : LEDOM_NOT_SUPPORTED;
}

}  // namespace ledom
