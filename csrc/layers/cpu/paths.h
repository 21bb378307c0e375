// The row-wise kernels, once for each instruction set; `dispatch.cpp` picks one. Arguments have been checked.
#pragma once

#include "layers/params.h"

#define LEDOM_DECLARE(path)                                                     \
    int swiglu_##path(const ledom_swiglu_params& params, bool is_backward);     \
    int rms_norm_##path(const ledom_rms_norm_params& params, bool is_backward); \
    int cross_entropy_##path(const ledom_cross_entropy_params& params, bool is_backward);

namespace ledom {
LEDOM_DECLARE(portable)
LEDOM_DECLARE(avx2)
LEDOM_DECLARE(avx512)
}  // namespace ledom

#undef LEDOM_DECLARE
