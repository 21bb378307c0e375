// The C interface of the row-wise kernels: what stands between the matrix products of a layer. The rules are those of
// reversed_attention/params.h: raw pointers, sizes, no torch. Rows are contiguous and follow each other without gaps.
#pragma once

#include "reversed_attention/params.h"

#ifdef __cplusplus
extern "C" {
#endif

// y = silu(gate) * up, where a row of x is [gate, up].
typedef struct ledom_swiglu_params {
    uint32_t struct_size;
    uint32_t version;
    int32_t dtype;  // of all tensors
    int32_t num_threads;
    int64_t rows;
    int64_t width;    // F
    const void* x;    // [rows, 2 * F]
    void* y;          // [rows, F]: written by forward
    const void* d_y;  // [rows, F]: backward reads x and d_y
    void* d_x;        // [rows, 2 * F]: written by backward
} ledom_swiglu_params;

// y = x / sqrt(mean of x^2 + eps) * weight.
typedef struct ledom_rms_norm_params {
    uint32_t struct_size;
    uint32_t version;
    int32_t dtype;  // of all tensors but `scale`
    int32_t num_threads;
    int64_t rows;
    int64_t width;  // H
    float eps;
    const void* x;       // [rows, H]
    const void* weight;  // [H]
    void* y;             // [rows, H]: written by forward
    float* scale;        // [rows], 1 / sqrt(mean of x^2 + eps): written by forward, read by backward
    const void* d_y;     // [rows, H]: backward reads x, weight, scale and d_y
    void* d_x;           // [rows, H]: written by backward
    void* d_weight;      // [H]: the same
} ledom_rms_norm_params;

// Cross entropy over a part of the vocabulary. Forward leaves what the ranks that hold the other parts must know;
// backward takes what all of them have agreed on.
typedef struct ledom_cross_entropy_params {
    uint32_t struct_size;
    uint32_t version;
    int32_t dtype;  // of logits and d_logits
    int32_t num_threads;
    int64_t rows;
    int64_t width;           // of this part of the vocabulary
    int64_t first;           // the id of its first entry
    const void* logits;      // [rows, width]
    const int64_t* targets;  // [rows], ids; one outside this part has predicted logit 0 here
    float* maximum;          // [rows]: written by forward
    float* sum;              // [rows], of exp(logit - maximum): the same
    float* predicted;        // [rows], the target's logit: the same
    const float* lse;        // [rows], log of the sum of exp(logit) over the whole vocabulary: read by backward
    const float* d_loss;     // [rows]: the same
    void* d_logits;          // [rows, width]: written by backward; may be `logits`
} ledom_cross_entropy_params;

// `path` as in reversed_attention/params.h. Results do not depend on the number of threads.
int ledom_swiglu_cpu(const ledom_swiglu_params* params, int is_backward, const char* path);
int ledom_rms_norm_cpu(const ledom_rms_norm_params* params, int is_backward, const char* path);
int ledom_cross_entropy_cpu(const ledom_cross_entropy_params* params, int is_backward, const char* path);

#ifdef __cplusplus
}
#endif
