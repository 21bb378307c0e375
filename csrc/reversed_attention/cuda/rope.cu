// Rotary positions: fp32 and bf16, with and without wide accesses.
#include "reversed_attention/cuda/rope.h"

#include "reversed_attention/cuda/launch.h"

namespace {

constexpr int kWidth = ledom::kRopeWidth;

// May every access of kWidth elements of `bytes` each be made at once?
bool is_wide(const ledom_tensor& x, int bytes) {
    const int64_t strides = x.stride_batch | x.stride_seq | x.stride_head;
    return reinterpret_cast<uintptr_t>(x.data) % (kWidth * bytes) == 0 && strides % kWidth == 0;
}

template <typename T>
int launch_rope(const ledom_rope_params& p) {
    const uintptr_t tables = reinterpret_cast<uintptr_t>(p.cosines) | reinterpret_cast<uintptr_t>(p.sines);
    const bool are_sizes_wide = p.rotary_dim % (2 * kWidth) == 0 && p.head_dim % kWidth == 0 && tables % 16 == 0;
    const ledom::Grid grid = {static_cast<unsigned>(p.seq), static_cast<unsigned>(p.batch), 1};
    if (are_sizes_wide && is_wide(p.x, sizeof(T)) && is_wide(p.y, sizeof(T))) {
        return ledom::launch(&ledom::rope<T, kWidth>, grid, ledom::kRopeThreads, 0, p);
    }
    return ledom::launch(&ledom::rope<T, 1>, grid, ledom::kRopeThreads, 0, p);
}

}  // namespace

extern "C" int ledom_rope_cuda(const ledom_rope_params* p) {
    if (p == nullptr || p->struct_size != sizeof(ledom_rope_params) || p->version != LEDOM_ABI_VERSION) {
        return LEDOM_BAD_STRUCT;
    }
    if (p->batch < 1 || p->seq < 1 || p->heads < 1 || p->head_dim < 1) return LEDOM_BAD_SHAPE;
    if (p->rotary_dim < 0 || p->rotary_dim % 2 != 0 || p->rotary_dim > p->head_dim) return LEDOM_BAD_SHAPE;
    if (p->num_positions < p->seq) return LEDOM_BAD_SHAPE;  // no document is longer
    if (p->x.data == nullptr || p->y.data == nullptr || p->cosines == nullptr || p->sines == nullptr) {
        return LEDOM_NULL_POINTER;
    }
    if ((p->doc_first == nullptr) != (p->doc_last == nullptr)) return LEDOM_BAD_MASK;
    if (p->batch > ledom::kMaxGridY) return LEDOM_NOT_SUPPORTED;
    if (p->dtype == LEDOM_FLOAT32) return launch_rope<float>(*p);
    if (p->dtype == LEDOM_BFLOAT16) return launch_rope<ledom::Bf16>(*p);
    return LEDOM_BAD_TYPE;
}
