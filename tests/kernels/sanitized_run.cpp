// Runs the kernels once, on buffers that are exactly as long as they must be, for the sanitizers:
//
//     sanitized_run HEAD_DIM SEQ                  as it should be
//     sanitized_run HEAD_DIM SEQ FILE LINE        without the synchronisation at that line
//     sanitized_run HEAD_DIM SEQ short            with a buffer of keys that lacks its last 16 bytes
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "reversed_attention/params.h"

extern "C" {
void ledom_emulation_configure(int order, int completion, uint64_t seed, int workers, const char* file, int line);
const char* ledom_emulation_error();
}

namespace {

constexpr int kHeads = 2, kLazy = 1, kRandom = 2;

// [1, seq, heads, dim] bf16, of about -1 .. 1.
struct Tensor {
    std::vector<uint16_t> data;
    ledom_tensor view;

    Tensor(int seq, int heads, int dim, uint32_t seed, int missing = 0) : data(seq * heads * dim - missing) {
        for (uint16_t& element : data) {
            seed = seed * 1664525u + 1013904223u;
            element = static_cast<uint16_t>(0x3e00 + (seed >> 24) + (seed >> 16 & 1) * 0x8000);
        }
        view = {data.data(), 0, heads * dim, dim};
    }
};

int report(const char* what, int status) {
    if (status != LEDOM_OK) printf("%s: status %d, %s\n", what, status, ledom_emulation_error());
    return status != LEDOM_OK;
}

}  // namespace

int main(int count, char** words) {
    if (count < 3 || count > 5) return 2;
    const int dim = atoi(words[1]), seq = atoi(words[2]);
    ledom_emulation_configure(kRandom, kLazy, 1, 2, count == 5 ? words[3] : nullptr, count == 5 ? atoi(words[4]) : 0);
    const bool is_short = count == 4 && strcmp(words[3], "short") == 0;
    Tensor q(seq, kHeads, dim, 1), k(seq, 1, dim, 2, is_short ? 8 : 0), v(seq, 1, dim, 3), o(seq, kHeads, dim, 4);
    std::vector<int32_t> first(seq), last(seq);  // two documents
    for (int i = 0; i < seq; ++i) {
        first[i] = i < seq / 3 ? 0 : seq / 3;
        last[i] = i < seq / 3 ? seq / 3 - 1 : seq - 1;
    }
    Tensor d_o(seq, kHeads, dim, 5), d_q(seq, kHeads, dim, 6), d_k(seq, 1, dim, 7), d_v(seq, 1, dim, 8);
    std::vector<float> lse(kHeads * seq), delta(kHeads * seq);
    ledom_attention_params p = {};
    p.struct_size = sizeof p;
    p.version = LEDOM_ABI_VERSION;
    p.dtype = LEDOM_BFLOAT16;
    p.batch = 1;
    p.seq = seq;
    p.heads = kHeads;
    p.kv_heads = 1;
    p.head_dim = dim;
    p.right = seq;
    p.doc_first = first.data();
    p.doc_last = last.data();
    p.scale = 0.1f;
    p.q = q.view;
    p.k = k.view;
    p.v = v.view;
    p.o = o.view;
    p.d_o = d_o.view;
    p.d_q = d_q.view;
    p.d_k = d_k.view;
    p.d_v = d_v.view;
    p.lse = lse.data();
    p.delta = delta.data();
    return report("forward", ledom_attention_forward_cuda(&p)) ||
           report("backward", ledom_attention_backward_cuda(&p)) ||
           report("forward for sm_90a", ledom_attention_forward_sm90a(&p));
}
