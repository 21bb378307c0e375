// Forward for sm_90a: the tensor maps of its copies, and one kernel for each head size.
#include "reversed_attention/cuda/forward_sm90a.h"
#include "reversed_attention/cuda/launch.h"

namespace {

using ledom::TensorMap;

constexpr int64_t kCacheBytes = 32 << 20;  // of the keys and values that are read at about the same time

#if defined(__CUDACC__)

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, without linking the driver. Null where it has none.
Encode encoder() {
    static const Encode found = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result;
        const cudaError_t status =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
        if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) function = nullptr;
        return reinterpret_cast<Encode>(function);
    }();
    return found;
}

// A box is `rows` tokens of one head, 64 columns of them.
int make_map(TensorMap* map, const ledom_tensor& x, const ledom_attention_params& p, int heads, int rows) {
    if (encoder() == nullptr) return LEDOM_NOT_SUPPORTED;
    const auto size = [](int n) { return static_cast<cuuint64_t>(n); };
    const auto bytes = [](int64_t stride, int count) { return static_cast<cuuint64_t>(count == 1 ? 16 : stride * 2); };
    const cuuint64_t sizes[4] = {size(p.head_dim), size(p.seq), size(heads), size(p.batch)};
    const cuuint64_t strides[3] = {bytes(x.stride_seq, p.seq), bytes(x.stride_head, heads),
                                   bytes(x.stride_batch, p.batch)};
    const cuuint32_t box[4] = {ledom::kPanelColumns, static_cast<cuuint32_t>(rows), 1, 1}, steps[4] = {1, 1, 1, 1};
    const CUresult status =
        encoder()(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, x.data, sizes, strides, box, steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return status == CUDA_SUCCESS ? LEDOM_OK : LEDOM_NOT_SUPPORTED;
}

// Code for sm_90a runs on compute capability 9.0 and on no other.
int check_device(int device) {
    int major = 0, minor = 0;
    cudaError_t status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (status != cudaSuccess) return LEDOM_CUDA_ERROR + static_cast<int>(status);
    return major == 9 && minor == 0 ? LEDOM_OK : LEDOM_NOT_SUPPORTED;
}

#else

int make_map(TensorMap* map, const ledom_tensor& x, const ledom_attention_params& p, int heads, int rows) {
    *map = {static_cast<uint16_t*>(x.data),
            {p.head_dim, p.seq, heads, p.batch},
            {1, x.stride_seq, x.stride_head, x.stride_batch},
            {ledom::kPanelColumns, rows}};
    return LEDOM_OK;
}

int check_device(int) { return LEDOM_OK; }

#endif

template <int kDim, int kKeys, int kGroups>
int launch_forward(const ledom_attention_params& p) {
    using F = ledom::ForwardSm90a<kDim, kKeys, kGroups>;
    ledom::ForwardSm90aParams params = {};
    int status = check_device(p.device);
    if (status == LEDOM_OK) status = make_map(&params.q, p.q, p, p.heads, F::kRows);
    if (status == LEDOM_OK) status = make_map(&params.k, p.k, p, p.kv_heads, F::kKeys);
    if (status == LEDOM_OK) status = make_map(&params.v, p.v, p, p.kv_heads, F::kKeys);
    if (status == LEDOM_OK) status = make_map(&params.o, p.o, p, p.heads, ledom::kWarpRows);
    if (status != LEDOM_OK) return status;
    params.p = p;
    params.blocks = (p.seq + F::kRows - 1) / F::kRows;
    const int64_t kv_heads = kCacheBytes / (int64_t{4} * p.seq * kDim);
    const int64_t heads = (kv_heads < 1 ? 1 : kv_heads) * (p.heads / p.kv_heads), all = int64_t{p.heads} * p.batch;
    if (all * params.blocks > INT32_MAX) return LEDOM_NOT_SUPPORTED;
    params.section = static_cast<int32_t>(heads < all ? heads : all);
    params.device = p.device;
    params.stream = p.stream;
    return ledom::launch(&ledom::attention_forward_sm90a<kDim, kKeys, kGroups>,
                         {static_cast<unsigned>(all * params.blocks), 1, 1}, F::kThreads, F::kSharedBytes, params);
}

}  // namespace

extern "C" int ledom_attention_forward_sm90a(const ledom_attention_params* params) {
    const int status = ledom::check_attention(params, false);
    if (status != LEDOM_OK) return status;
    switch (params->head_dim) {
        case 64:
            return launch_forward<64, 128, 3>(*params);
        case 128:
            // Long walks gain by long tiles, documents by tiles that fit them: seen on an H200.
            return params->doc_first == nullptr ? launch_forward<128, 176, 2>(*params)
                                                : launch_forward<128, 128, 2>(*params);
        case 192:
            return launch_forward<192, 96, 2>(*params);
        default:
            return LEDOM_NOT_SUPPORTED;
    }
}
