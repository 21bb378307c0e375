// Rotary positions, counted from a document's end or its beginning. Memory sets the pace: plain loops, no special flags.
#include <cstring>

#include "reversed_attention/cpu/pack.h"
#include "reversed_attention/mask.h"

namespace {

// Pairs (a, b) that lie kStep elements apart. Input and output may be the same memory, but not shifted.
template <int kStep, typename T>
LEDOM_INLINE void turn_pairs(int half, const T* a, const T* b, T* to_a, T* to_b, const float* cosines,
                             const float* sines, float sign) {
#pragma omp simd
    for (int d = 0; d < half; ++d) {
        const float first = to_float(a[d * kStep]), second = to_float(b[d * kStep]);
        const float cosine = cosines[d], sine = sines[d] * sign;
        from_float(first * cosine - second * sine, to_a + d * kStep);
        from_float(second * cosine + first * sine, to_b + d * kStep);
    }
}

// One token of one head: y = x turned; `sign` is -1 to turn back.
template <typename T>
void turn_token(const ledom_rope_params& p, const T* x, T* y, const float* cosines, const float* sines, float sign) {
    const int half = p.rotary_dim / 2;
    if (p.interleaved) {
        turn_pairs<2>(half, x, x + 1, y, y + 1, cosines, sines, sign);
    } else {
        turn_pairs<1>(half, x, x + half, y, y + half, cosines, sines, sign);
    }
    if (x != y) memcpy(y + p.rotary_dim, x + p.rotary_dim, sizeof(T) * (p.head_dim - p.rotary_dim));
}

template <typename T>
int turn(const ledom_rope_params& p) {
    const int half = p.rotary_dim / 2;
    const int64_t tokens = static_cast<int64_t>(p.batch) * p.seq;
    const float sign = p.inverse ? -1.0f : 1.0f;
    int status = LEDOM_OK;
#pragma omp parallel for schedule(static) num_threads(p.num_threads > 0 ? p.num_threads : 1)
    for (int64_t token = 0; token < tokens; ++token) {
        const int batch = static_cast<int>(token / p.seq), i = static_cast<int>(token % p.seq);
        const int64_t row = static_cast<int64_t>(batch) * p.seq;
        const ledom::Mask mask = {p.seq, p.seq, p.seq, p.doc_first ? p.doc_first + row : nullptr,
                                  p.doc_last ? p.doc_last + row : nullptr};
        const int32_t at = ledom::position(mask, i, p.from_end != 0);
        if (at >= p.num_positions) {
#pragma omp atomic write
            status = LEDOM_BAD_SHAPE;
            continue;
        }
        const float *cosines = p.cosines + static_cast<ptrdiff_t>(at) * half;
        const float *sines = p.sines + static_cast<ptrdiff_t>(at) * half;
        for (int head = 0; head < p.heads; ++head) {
            turn_token(p, head_of<T>(p.x, batch, head)[i], head_of<T>(p.y, batch, head)[i], cosines, sines, sign);
        }
    }
    return status;
}

}  // namespace

extern "C" int ledom_rope_cpu(const ledom_rope_params* p) {
    if (p == nullptr || p->struct_size != sizeof(ledom_rope_params) || p->version != LEDOM_ABI_VERSION) {
        return LEDOM_BAD_STRUCT;
    }
    if (p->batch < 1 || p->seq < 1 || p->heads < 1 || p->head_dim < 1) return LEDOM_BAD_SHAPE;
    if (p->rotary_dim < 0 || p->rotary_dim % 2 != 0 || p->rotary_dim > p->head_dim) return LEDOM_BAD_SHAPE;
    if (p->x.data == nullptr || p->y.data == nullptr || p->cosines == nullptr || p->sines == nullptr) {
        return LEDOM_NULL_POINTER;
    }
    if ((p->doc_first == nullptr) != (p->doc_last == nullptr)) return LEDOM_BAD_MASK;
    if (p->dtype == LEDOM_FLOAT32) return turn<float>(*p);
    if (p->dtype == LEDOM_BFLOAT16) return turn<Bfloat16>(*p);
    return LEDOM_BAD_TYPE;
}
