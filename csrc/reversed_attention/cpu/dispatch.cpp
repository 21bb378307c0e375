// Checks what callers ask for and picks the kernels that this processor can run. Compiled without special flags.
#include <cstring>
#include <string>

#include "common/cpu/features.h"
#include "reversed_attention/cpu/paths.h"

namespace {

using Kernel = int (*)(const ledom_attention_params&, bool);

struct Path {
    const char* name;
    Kernel kernel;
    bool is_supported;
};

// Best first.
const Path* paths(int* count) {
    static const Path all[] = {
#if defined(LEDOM_X86_PATHS)
        {"avx512", ledom::attention_avx512, ledom::has_avx512()},
        {"avx2", ledom::attention_avx2, ledom::has_avx2()},
#endif
        {"portable", ledom::attention_portable, true},
    };
    *count = static_cast<int>(sizeof all / sizeof all[0]);
    return all;
}

bool is_missing(const ledom_tensor& tensor) { return tensor.data == nullptr; }

bool are_documents_sound(const ledom_attention_params& p) {
    for (int64_t row = 0; row < p.batch; ++row) {
        int32_t first = 0, last = -1;
        for (int64_t i = row * p.seq; i < (row + 1) * p.seq; ++i) {
            const int32_t a = p.doc_first[i], b = p.doc_last[i];
            if (a < first || b < last || b >= p.seq || a > b + 1) return false;
            first = a;
            last = b;
        }
    }
    return true;
}

int check(const ledom_attention_params* p, bool is_backward) {
    if (p == nullptr || p->struct_size != sizeof(ledom_attention_params) || p->version != LEDOM_ABI_VERSION) {
        return LEDOM_BAD_STRUCT;
    }
    if (p->dtype != LEDOM_FLOAT32 && p->dtype != LEDOM_BFLOAT16) return LEDOM_BAD_TYPE;
    if (p->batch < 1 || p->seq < 1 || p->heads < 1 || p->kv_heads < 1 || p->head_dim < 1) return LEDOM_BAD_SHAPE;
    if (p->heads % p->kv_heads != 0) return LEDOM_BAD_SHAPE;
    if (is_missing(p->q) || is_missing(p->k) || is_missing(p->v) || is_missing(p->o)) return LEDOM_NULL_POINTER;
    if (p->lse == nullptr) return LEDOM_NULL_POINTER;
    if (is_backward && (is_missing(p->d_o) || is_missing(p->d_q) || is_missing(p->d_k) || is_missing(p->d_v))) {
        return LEDOM_NULL_POINTER;
    }
    if (is_backward && p->delta == nullptr) return LEDOM_NULL_POINTER;
    if (p->left < 0 || p->right < 0 || p->left > p->seq || p->right > p->seq) return LEDOM_BAD_MASK;
    if ((p->doc_first == nullptr) != (p->doc_last == nullptr)) return LEDOM_BAD_MASK;
    if (p->doc_first != nullptr && !are_documents_sound(*p)) return LEDOM_BAD_MASK;
    return LEDOM_OK;
}

int run(const ledom_attention_params* params, const char* path, bool is_backward) {
    const int status = check(params, is_backward);
    if (status != LEDOM_OK) return status;
    int count;
    const Path* all = paths(&count);
    for (int i = 0; i < count; ++i) {
        const bool is_asked = path == nullptr || *path == '\0' || strcmp(path, all[i].name) == 0;
        if (is_asked && all[i].is_supported) return all[i].kernel(*params, is_backward);
    }
    return LEDOM_NOT_BUILT;
}

}  // namespace

extern "C" {

const char* ledom_status_text(int status) {
    switch (status) {
        case LEDOM_OK:
            return "done";
        case LEDOM_BAD_STRUCT:
            return "parameters of another version of this library";
        case LEDOM_BAD_SHAPE:
            return "a size below 1, or heads that the key heads do not divide";
        case LEDOM_BAD_TYPE:
            return "a dtype other than float32 and bfloat16";
        case LEDOM_NULL_POINTER:
            return "a tensor is missing";
        case LEDOM_BAD_MASK:
            return "a mask whose reaches are negative or longer than the sequence, or whose documents step back";
        case LEDOM_OUT_OF_MEMORY:
            return "no memory for scratch";
        case LEDOM_NOT_BUILT:
            return "this build, or this processor, has no such path";
        case LEDOM_NOT_SUPPORTED:
            return "the path has no kernel for this shape, dtype or device";
        default:
            return "an unknown status";
    }
}

const char* ledom_cpu_paths(void) {
    static const std::string names = [] {
        std::string joined;
        int count;
        const Path* all = paths(&count);
        for (int i = 0; i < count; ++i) {
            if (all[i].is_supported) joined += (joined.empty() ? "" : ",") + std::string(all[i].name);
        }
        return joined;
    }();
    return names.c_str();
}

int ledom_attention_forward_cpu(const ledom_attention_params* params, const char* path) {
    return run(params, path, false);
}

int ledom_attention_backward_cpu(const ledom_attention_params* params, const char* path) {
    return run(params, path, true);
}

}  // extern "C"
