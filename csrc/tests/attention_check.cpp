// The CPU kernels against a plain double-precision loop, on heap blocks of exactly the size that they need: built with
// the address and undefined-behaviour sanitizers by tests/numerics/test_sanitizers.py. Prints the worst error.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "reversed_attention/mask.h"
#include "reversed_attention/params.h"

namespace {

struct Case {
    int batch, seq, heads, kv_heads, dim, left, right;
    bool has_documents;
};

float random_value() { return static_cast<float>(rand()) / static_cast<float>(RAND_MAX) * 2.0f - 1.0f; }

// One tensor in a block of its own, [batch][seq][heads][dim].
struct Block {
    std::vector<float> data;
    ledom_tensor tensor;
    Block(int batch, int seq, int heads, int dim, bool is_filled) : data(static_cast<size_t>(batch) * seq * heads * dim) {
        if (is_filled) {
            for (float& value : data) value = random_value();
        }
        const int64_t row = static_cast<int64_t>(heads) * dim;
        tensor = {data.data(), row * seq, row, dim};
    }
    float at(int b, int i, int h, int d) const {
        return data[b * tensor.stride_batch + i * tensor.stride_seq + h * tensor.stride_head + d];
    }
};

// The largest difference of o, d_q, d_k and d_v from the plain loop.
double worst_error(const Case& c, const ledom_attention_params& p, const Block& q, const Block& k, const Block& v,
                   const Block& d_o, const Block& o, const Block& d_q, const Block& d_k, const Block& d_v) {
    double worst = 0.0;
    const int group = c.heads / c.kv_heads;
    std::vector<double> dk(d_k.data.size()), dv(d_v.data.size());
    for (int b = 0; b < c.batch; ++b) {
        const int32_t* first = p.doc_first ? p.doc_first + b * c.seq : nullptr;
        const int32_t* last = p.doc_last ? p.doc_last + b * c.seq : nullptr;
        const ledom::Mask mask = {c.seq, c.left, c.right, first, last};
        for (int h = 0; h < c.heads; ++h) {
            for (int i = 0; i < c.seq; ++i) {
                const ledom::Interval keys = ledom::attended(mask, i);
                std::vector<double> weight(c.seq), d_weight(c.seq), out(c.dim), dq(c.dim);
                double sum = 0.0, delta = 0.0;
                for (int j = keys.lo; j <= keys.hi; ++j) {
                    double score = 0.0;
                    for (int d = 0; d < c.dim; ++d) score += double(q.at(b, i, h, d)) * k.at(b, j, h / group, d);
                    weight[j] = exp(score * p.scale);
                    sum += weight[j];
                }
                for (int j = keys.lo; j <= keys.hi; ++j) {
                    weight[j] /= sum;
                    for (int d = 0; d < c.dim; ++d) {
                        out[d] += weight[j] * v.at(b, j, h / group, d);
                        d_weight[j] += double(d_o.at(b, i, h, d)) * v.at(b, j, h / group, d);
                    }
                    delta += weight[j] * d_weight[j];
                }
                for (int j = keys.lo; j <= keys.hi; ++j) {
                    const double d_score = weight[j] * (d_weight[j] - delta) * p.scale;
                    const size_t at = ((static_cast<size_t>(b) * c.seq + j) * c.kv_heads + h / group) * c.dim;
                    for (int d = 0; d < c.dim; ++d) {
                        dq[d] += d_score * k.at(b, j, h / group, d);
                        dk[at + d] += d_score * q.at(b, i, h, d);
                        dv[at + d] += weight[j] * d_o.at(b, i, h, d);
                    }
                }
                for (int d = 0; d < c.dim; ++d) {
                    worst = fmax(worst, fabs(out[d] - o.at(b, i, h, d)));
                    worst = fmax(worst, fabs(dq[d] - d_q.at(b, i, h, d)));
                }
            }
        }
    }
    for (size_t i = 0; i < dk.size(); ++i) worst = fmax(worst, fabs(dk[i] - d_k.data[i]));
    for (size_t i = 0; i < dv.size(); ++i) worst = fmax(worst, fabs(dv[i] - d_v.data[i]));
    return worst;
}

double run(const Case& c) {
    Block q(c.batch, c.seq, c.heads, c.dim, true), d_o(c.batch, c.seq, c.heads, c.dim, true);
    Block k(c.batch, c.seq, c.kv_heads, c.dim, true), v(c.batch, c.seq, c.kv_heads, c.dim, true);
    Block o(c.batch, c.seq, c.heads, c.dim, false), d_q(c.batch, c.seq, c.heads, c.dim, false);
    Block d_k(c.batch, c.seq, c.kv_heads, c.dim, false), d_v(c.batch, c.seq, c.kv_heads, c.dim, false);
    std::vector<float> lse(static_cast<size_t>(c.batch) * c.heads * c.seq), delta(lse.size());
    std::vector<int32_t> first(static_cast<size_t>(c.batch) * c.seq), last(first.size());
    const int length = c.seq / 3 + 1;  // of a document; the last token of each sequence is padding
    for (size_t at = 0; at < first.size(); ++at) {
        const int i = static_cast<int>(at) % c.seq, begin = i / length * length;
        const bool is_padding = i == c.seq - 1;
        last[at] = is_padding ? c.seq - 1 : (begin + length < c.seq ? begin + length : c.seq - 1) - 1;
        first[at] = is_padding ? c.seq : begin;
    }
    ledom_attention_params p = {};
    p.struct_size = sizeof p;
    p.version = LEDOM_ABI_VERSION;
    p.dtype = LEDOM_FLOAT32;
    p.batch = c.batch;
    p.seq = c.seq;
    p.heads = c.heads;
    p.kv_heads = c.kv_heads;
    p.head_dim = c.dim;
    p.left = c.left < c.seq ? c.left : c.seq;
    p.right = c.right < c.seq ? c.right : c.seq;
    p.doc_first = c.has_documents ? first.data() : nullptr;
    p.doc_last = c.has_documents ? last.data() : nullptr;
    p.scale = 1.0f / sqrtf(static_cast<float>(c.dim));
    p.q = q.tensor;
    p.k = k.tensor;
    p.v = v.tensor;
    p.o = o.tensor;
    p.d_o = d_o.tensor;
    p.d_q = d_q.tensor;
    p.d_k = d_k.tensor;
    p.d_v = d_v.tensor;
    p.lse = lse.data();
    p.delta = delta.data();
    p.num_threads = c.batch > 1 ? 2 : 7;  // the latter cuts heads into pieces
    int status = ledom_attention_forward_cpu(&p, "");
    if (status == LEDOM_OK) status = ledom_attention_backward_cpu(&p, "");
    if (status != LEDOM_OK) {
        printf("status %d: %s\n", status, ledom_status_text(status));
        exit(1);
    }
    return worst_error(c, p, q, k, v, d_o, o, d_q, d_k, d_v);
}

}  // namespace

int main() {
    const int all = 1 << 20;
    double worst = 0.0;
    for (const int seq : {1, 7, 97, 130, 205}) {
        for (const bool has_documents : {false, true}) {
            for (const int dim : {5, 64}) {
                worst = fmax(worst, run({2, seq, 4, 2, dim, 0, all, has_documents}));
                worst = fmax(worst, run({1, seq, 2, 2, dim, all, 0, has_documents}));
                worst = fmax(worst, run({1, seq, 3, 1, dim, 0, 30, has_documents}));
            }
        }
    }
    printf("worst error %.3e\n", worst);
    return worst < 1e-5 ? 0 : 1;
}
