// Checks what callers ask for and picks the kernels that this processor can run. Compiled without special flags.
#include <omp.h>

#include <cstring>

#include "common/cpu/features.h"
#include "layers/cpu/paths.h"

namespace {

template <typename Params>
using Kernel = int (*)(const Params&, bool);

// The same kernel for each instruction set; those that this build lacks are null.
template <typename Params>
struct Kernels {
    Kernel<Params> avx512;
    Kernel<Params> avx2;
    Kernel<Params> portable;
};

template <typename Params>
int check(const Params* p) {
    if (p == nullptr || p->struct_size != sizeof(Params) || p->version != LEDOM_ABI_VERSION) return LEDOM_BAD_STRUCT;
    if (p->dtype != LEDOM_FLOAT32 && p->dtype != LEDOM_BFLOAT16) return LEDOM_BAD_TYPE;
    return p->rows < 1 || p->width < 1 ? LEDOM_BAD_SHAPE : LEDOM_OK;
}

// The best kernel, or the one asked for.
template <typename Params>
int run(Params params, bool is_backward, const char* path, const Kernels<Params>& kernels) {
    if (params.num_threads < 1) params.num_threads = omp_get_max_threads();
    const auto is_asked = [path](const char* name) { return path == nullptr || !*path || strcmp(path, name) == 0; };
#if defined(LEDOM_X86_PATHS)
    if (ledom::has_avx512() && is_asked("avx512")) return kernels.avx512(params, is_backward);
    if (ledom::has_avx2() && is_asked("avx2")) return kernels.avx2(params, is_backward);
#endif
    return is_asked("portable") ? kernels.portable(params, is_backward) : static_cast<int>(LEDOM_NOT_BUILT);
}

#if defined(LEDOM_X86_PATHS)
#define LEDOM_KERNELS(name) {ledom::name##_avx512, ledom::name##_avx2, ledom::name##_portable}
#else
#define LEDOM_KERNELS(name) {nullptr, nullptr, ledom::name##_portable}
#endif

template <typename... Pointers>
bool is_any_null(Pointers... pointers) {
    return ((pointers == nullptr) || ...);
}

}  // namespace

extern "C" {

int ledom_swiglu_cpu(const ledom_swiglu_params* p, int is_backward, const char* path) {
    if (const int status = check(p)) return status;
    if (p->x == nullptr || (is_backward ? is_any_null(p->d_y, p->d_x) : p->y == nullptr)) return LEDOM_NULL_POINTER;
    return run(*p, is_backward != 0, path, Kernels<ledom_swiglu_params> LEDOM_KERNELS(swiglu));
}

int ledom_rms_norm_cpu(const ledom_rms_norm_params* p, int is_backward, const char* path) {
    if (const int status = check(p)) return status;
    if (is_any_null(p->x, p->weight, p->scale)) return LEDOM_NULL_POINTER;
    if (is_backward ? is_any_null(p->d_y, p->d_x, p->d_weight) : p->y == nullptr) return LEDOM_NULL_POINTER;
    return run(*p, is_backward != 0, path, Kernels<ledom_rms_norm_params> LEDOM_KERNELS(rms_norm));
}

int ledom_cross_entropy_cpu(const ledom_cross_entropy_params* p, int is_backward, const char* path) {
    if (const int status = check(p)) return status;
    if (is_any_null(p->logits, p->targets)) return LEDOM_NULL_POINTER;
    if (is_backward ? is_any_null(p->lse, p->d_loss, p->d_logits) : is_any_null(p->maximum, p->sum, p->predicted)) {
        return LEDOM_NULL_POINTER;
    }
    return run(*p, is_backward != 0, path, Kernels<ledom_cross_entropy_params> LEDOM_KERNELS(cross_entropy));
}

}  // extern "C"
