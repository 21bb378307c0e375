// The C interface of the kernels: raw pointers, sizes, strides, a stream. No torch, no exceptions, no C++ types.
//
// Every function returns LEDOM_OK or a status; `ledom_status_text` says what it means. A caller fills `struct_size`
// with sizeof of its own struct and `version` with LEDOM_ABI_VERSION: another layout is refused and never guessed at.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LEDOM_ABI_VERSION 2u

enum ledom_status {
    LEDOM_OK = 0,
    LEDOM_BAD_STRUCT = 1,       // struct_size or version are not those of this library
    LEDOM_BAD_SHAPE = 2,        // a size below 1, or heads that kv_heads does not divide
    LEDOM_BAD_TYPE = 3,         // a dtype that is none of enum ledom_dtype
    LEDOM_NULL_POINTER = 4,     // a tensor that this pass needs is missing
    LEDOM_BAD_MASK = 5,         // left or right negative, or only one of doc_first and doc_last
    LEDOM_OUT_OF_MEMORY = 6,    // no room for scratch
    LEDOM_NOT_BUILT = 7,        // this library was built without the path
    LEDOM_NOT_SUPPORTED = 8,    // the path has no kernel for this shape, dtype or device
    LEDOM_CUDA_ERROR = 1000,    // plus the cudaError_t
};

enum ledom_dtype { LEDOM_FLOAT32 = 0, LEDOM_BFLOAT16 = 1 };

// A tensor [batch, seq, heads, head_dim] whose last axis is contiguous; strides count elements.
typedef struct ledom_tensor {
    void* data;
    int64_t stride_batch;
    int64_t stride_seq;
    int64_t stride_head;
} ledom_tensor;

typedef struct ledom_attention_params {
    uint32_t struct_size;
    uint32_t version;
    int32_t dtype;  // of q, k, v, o and their gradients; sums are fp32
    int32_t batch;
    int32_t seq;
    int32_t heads;     // of q
    int32_t kv_heads;  // of k and v; query head h reads key head h / (heads / kv_heads)
    int32_t head_dim;
    int32_t left;   // mask.h
    int32_t right;
    const int32_t* doc_first;  // [batch, seq], or both null
    const int32_t* doc_last;
    float scale;  // of the scores, before the softmax

    // Forward reads q, k, v and writes o and lse. Backward reads q, k, v, o, lse, d_o and writes d_q, d_k, d_v.
    ledom_tensor q;
    ledom_tensor k;
    ledom_tensor v;
    ledom_tensor o;
    ledom_tensor d_o;
    ledom_tensor d_q;
    ledom_tensor d_k;
    ledom_tensor d_v;
    float* lse;    // [batch, heads, seq], natural logarithm; -inf for a row that attends nothing, whose o is 0
    float* delta;  // [batch, heads, seq], scratch of backward: row sums of o * d_o

    int32_t num_threads;  // CPU; 0: OpenMP's own number
    int32_t device;       // CUDA
    void* stream;         // CUDA: a cudaStream_t
} ledom_attention_params;

// Rotary positions: pairs of elements turned by the angle of the token's position, which is counted within its
// document. Elements beyond `rotary_dim` are copied.
typedef struct ledom_rope_params {
    uint32_t struct_size;
    uint32_t version;
    int32_t dtype;  // of x and y
    int32_t batch;
    int32_t seq;
    int32_t heads;
    int32_t head_dim;
    int32_t rotary_dim;   // even, at most head_dim
    int32_t interleaved;  // 0: element d pairs with d + rotary_dim / 2; 1: element 2d with 2d + 1
    int32_t from_end;     // 1: the last token of a document is at position 0; 0: the first one
    int32_t inverse;      // 1: turned back, which is also the gradient
    int32_t num_positions;
    const int32_t* doc_first;  // [batch, seq], or both null
    const int32_t* doc_last;
    const float* cosines;  // [num_positions, rotary_dim / 2], num_positions >= the longest document
    const float* sines;
    ledom_tensor x;
    ledom_tensor y;  // may be x

    int32_t num_threads;
    int32_t device;
    void* stream;
} ledom_rope_params;

const char* ledom_status_text(int status);

// The instruction sets that this build and this processor have in common, best first: "avx512,avx2,portable".
const char* ledom_cpu_paths(void);

// `path` names one of them; null or "" takes the best.
int ledom_attention_forward_cpu(const ledom_attention_params* params, const char* path);
int ledom_attention_backward_cpu(const ledom_attention_params* params, const char* path);
int ledom_rope_cpu(const ledom_rope_params* params);

// For bf16, head_dim 64, 128 or 192, a positive scale and rows aligned to 16 bytes; all pointers are the GPU's. They
// start work on `stream` of `device` and do not wait for it. Documents are not checked.
int ledom_attention_forward_cuda(const ledom_attention_params* params);
int ledom_attention_backward_cuda(const ledom_attention_params* params);

#ifdef __cplusplus
}
#endif
