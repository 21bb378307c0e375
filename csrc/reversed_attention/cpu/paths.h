// The CPU kernels, once for each instruction set; `dispatch.cpp` picks one. Arguments have been checked.
#pragma once

#include "reversed_attention/params.h"

namespace ledom {
int attention_portable(const ledom_attention_params& params, bool is_backward);
int attention_avx2(const ledom_attention_params& params, bool is_backward);
int attention_avx512(const ledom_attention_params& params, bool is_backward);
}  // namespace ledom
