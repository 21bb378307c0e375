// Backward: three kernels for each head size, four for 192.
#include "reversed_attention/cuda/backward.h"
#include "reversed_attention/cuda/launch.h"

namespace {

using ledom::Gradient;

unsigned blocks_of(int seq, int rows) { return static_cast<unsigned>((seq + rows - 1) / rows); }

template <int kDim, Gradient kWhich>
int launch_keys(const ledom_attention_params& p) {
    const ledom::Grid grid = {blocks_of(p.seq, ledom::kBackwardRows), static_cast<unsigned>(p.kv_heads),
                              static_cast<unsigned>(p.batch)};
    return ledom::launch(&ledom::attention_backward_keys<kDim, kWhich>, grid, ledom::kBackwardThreads,
                         ledom::Backward<kDim>::kSharedBytes, p);
}

template <int kDim>
int launch_backward(const ledom_attention_params& p) {
    const unsigned heads = static_cast<unsigned>(p.heads), batch = static_cast<unsigned>(p.batch);
    int status = ledom::launch(&ledom::attention_delta<kDim>, {blocks_of(p.seq, ledom::kDeltaRows), heads, batch},
                               ledom::kDeltaThreads, 0, p);
    if (status != LEDOM_OK) return status;
    if constexpr (kDim <= 128) {
        status = launch_keys<kDim, Gradient::kBoth>(p);
    } else {
        status = launch_keys<kDim, Gradient::kValues>(p);
        if (status == LEDOM_OK) status = launch_keys<kDim, Gradient::kKeys>(p);
    }
    if (status != LEDOM_OK) return status;
    return ledom::launch(&ledom::attention_backward_queries<kDim>,
                         {blocks_of(p.seq, ledom::kBackwardRows), heads, batch}, ledom::kBackwardThreads,
                         ledom::Backward<kDim>::kSharedBytes, p);
}

}  // namespace

extern "C" int ledom_attention_backward_cuda(const ledom_attention_params* params) {
    const int status = ledom::check_attention(params, true);
    if (status != LEDOM_OK) return status;
    switch (params->head_dim) {
        case 64:
            return launch_backward<64>(*params);
        case 128:
            return launch_backward<128>(*params);
        case 192:
            return launch_backward<192>(*params);
        default:
            return LEDOM_NOT_SUPPORTED;
    }
}
