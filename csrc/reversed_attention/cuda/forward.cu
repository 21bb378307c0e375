// Forward: one kernel for each head size.
#include "reversed_attention/cuda/forward.h"
#include "reversed_attention/cuda/launch.h"

namespace {

template <int kDim>
int launch_forward(const ledom_attention_params& p) {
    using F = ledom::Forward<kDim>;
    const ledom::Grid grid = {static_cast<unsigned>((p.seq + F::kRows - 1) / F::kRows), static_cast<unsigned>(p.heads),
                              static_cast<unsigned>(p.batch)};
    return ledom::launch(&ledom::attention_forward<kDim>, grid, F::kThreads, F::kSharedBytes, p);
}

}  // namespace

extern "C" int ledom_attention_forward_cuda(const ledom_attention_params* params) {
    const int status = ledom::check_attention(params, false);
    if (status != LEDOM_OK) return status;
    switch (params->head_dim) {
        case 64:
            return launch_forward<64>(*params);
        case 128:
            return launch_forward<128>(*params);
        case 192:
            return launch_forward<192>(*params);
        default:
            return LEDOM_NOT_SUPPORTED;
    }
}
