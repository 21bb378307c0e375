// In place of the CUDA kernels where they are not built: the same names, which say so.
#include "reversed_attention/params.h"

extern "C" {

int ledom_attention_forward_cuda(const ledom_attention_params*) { return LEDOM_NOT_BUILT; }

int ledom_attention_forward_sm90a(const ledom_attention_params*) { return LEDOM_NOT_BUILT; }

int ledom_attention_backward_cuda(const ledom_attention_params*) { return LEDOM_NOT_BUILT; }

int ledom_rope_cuda(const ledom_rope_params*) { return LEDOM_NOT_BUILT; }

const ledom_cuda_variant* ledom_cuda_variants(int* count) {
    *count = 0;
    return nullptr;
}

void ledom_cuda_versions(int* runtime, int* driver) { *runtime = *driver = 0; }

const char* ledom_cuda_error_text(int) { return "built without CUDA"; }

}  // extern "C"
