// The entries of the row-wise kernels for one instruction set. Included once by each of layers_*.cpp, which says how
// LEDOM_PATH(name) spells its functions.
#include "layers/cpu/cross_entropy.h"
#include "layers/cpu/paths.h"
#include "layers/cpu/rms_norm.h"
#include "layers/cpu/swiglu.h"

namespace ledom {

int LEDOM_PATH(swiglu)(const ledom_swiglu_params& params, bool is_backward) {
    if (params.dtype == LEDOM_FLOAT32) return swiglu<float>(params, is_backward);
    return swiglu<Bfloat16>(params, is_backward);
}

int LEDOM_PATH(rms_norm)(const ledom_rms_norm_params& params, bool is_backward) {
    if (params.dtype == LEDOM_FLOAT32) return rms_norm<float>(params, is_backward);
    return rms_norm<Bfloat16>(params, is_backward);
}

int LEDOM_PATH(cross_entropy)(const ledom_cross_entropy_params& params, bool is_backward) {
    if (params.dtype == LEDOM_FLOAT32) return cross_entropy<float>(params, is_backward);
    return cross_entropy<Bfloat16>(params, is_backward);
}

}  // namespace ledom
