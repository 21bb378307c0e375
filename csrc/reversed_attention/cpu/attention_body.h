// The entry of the CPU kernels for one instruction set. Included once by each of attention_*.cpp, which names it:
// LEDOM_PATH is its function, and LEDOM_SPECIALISED whether head sizes 64, 128 and 192 get kernels of their own.
#include <omp.h>

#include "common/cpu/memory.h"
#include "reversed_attention/cpu/attention_backward.h"
#include "reversed_attention/cpu/paths.h"

namespace {

ledom::Mask mask_of(const ledom_attention_params& p, int batch) {
    const ptrdiff_t row = static_cast<ptrdiff_t>(batch) * p.seq;
    return {p.seq, p.left, p.right, p.doc_first ? p.doc_first + row : nullptr, p.doc_last ? p.doc_last + row : nullptr};
}

int threads_of(const ledom_attention_params& p) { return p.num_threads > 0 ? p.num_threads : omp_get_max_threads(); }

template <typename T, int kDim>
int forward(const ledom_attention_params& p) {
    const int padded = padded_dim(p.head_dim), block = kForwardPanels * kPanel;
    const int64_t blocks = (p.seq + block - 1) / block, units = static_cast<int64_t>(p.batch) * p.heads * blocks;
    int status = LEDOM_OK;
#pragma omp parallel num_threads(threads_of(p))
    {
        const Memory memory(ForwardScratch::floats(padded));
        if (memory.get() == nullptr) {
#pragma omp atomic write
            status = LEDOM_OUT_OF_MEMORY;
        }
        const ForwardScratch scratch(memory.get(), padded);
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < units; ++unit) {
            if (memory.get() == nullptr) continue;
            const int batch = static_cast<int>(unit / (p.heads * blocks));
            const int head = static_cast<int>(unit / blocks % p.heads);
            const int begin = static_cast<int>(unit % blocks) * block;
            forward_block<T, kDim>(p, mask_of(p, batch), batch, head, begin, scratch);
        }
    }
    return status;
}

// Into how many pieces each head's queries and keys are cut, apart: 0 where whole heads keep the threads busier. Cutting
// costs 7 / 5 of the work. The number of threads decides, and no result depends on it.
int pieces_of(const ledom_attention_params& p) {
    const int64_t heads = static_cast<int64_t>(p.batch) * p.heads, threads = threads_of(p);
    if (7 * heads >= 5 * threads) return 0;
    const int64_t wanted = (4 * threads + heads - 1) / heads, blocks = (p.seq + kBlock - 1) / kBlock;
    return static_cast<int>(wanted < blocks ? wanted : blocks);  // several a thread: their work differs
}

template <typename T, int kDim>
int backward(const ledom_attention_params& p) {
    const int padded = padded_dim(p.head_dim), group = p.heads / p.kv_heads, pieces = pieces_of(p);
    const int64_t heads = static_cast<int64_t>(p.batch) * p.heads, units = pieces ? 2 * pieces : 1;
    const ptrdiff_t half = static_cast<ptrdiff_t>(KeyGradients::rows(p.seq)) * padded;
    // A key head that one unit computes needs no memory beyond its thread's.
    const bool is_shared = group > 1 || pieces;
    const Memory parts(is_shared ? 2 * half * heads : 0);
    if (is_shared && parts.get() == nullptr) return LEDOM_OUT_OF_MEMORY;
    constexpr int kRows = 256;
    const int chunks = (p.seq + kRows - 1) / kRows;
    int status = LEDOM_OK;
#pragma omp parallel num_threads(threads_of(p))
    {
        const Memory memory(BackwardScratch::floats(p.seq, padded) + (is_shared ? 0 : 2 * half));
        if (memory.get() == nullptr) {
#pragma omp atomic write
            status = LEDOM_OUT_OF_MEMORY;
        }
        const BackwardScratch scratch(memory.get(), p.seq, padded);
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < heads * units; ++unit) {
            if (memory.get() == nullptr) continue;
            const int64_t at = unit / units;
            const int batch = static_cast<int>(at / p.heads), head = static_cast<int>(at % p.heads);
            const ledom::Mask mask = mask_of(p, batch);
            const Part part = part_of(mask, pieces, static_cast<int>(unit % units));
            float* own = is_shared ? parts.get() + 2 * half * at : memory.get() + BackwardScratch::floats(p.seq, padded);
            backward_head<T, kDim>(p, mask, batch, head, part, scratch, {own, own + half});
            if (is_shared) continue;
            add_up(own, 0, 1, {0, p.seq}, p.head_dim, padded, p.scale, head_of<T>(p.d_k, batch, head));
            add_up(own + half, 0, 1, {0, p.seq}, p.head_dim, padded, 1.0f, head_of<T>(p.d_v, batch, head));
        }
        const int64_t sums = is_shared ? static_cast<int64_t>(p.batch) * p.kv_heads * chunks : 0;
#pragma omp for schedule(static, 1)
        for (int64_t sum = 0; sum < sums; ++sum) {
            const int64_t unit = sum / chunks;
            const int batch = static_cast<int>(unit / p.kv_heads), head = static_cast<int>(unit % p.kv_heads);
            const int begin = static_cast<int>(sum % chunks) * kRows;
            const Range rows = {begin, begin + kRows < p.seq ? begin + kRows : p.seq};
            const float* own = parts.get() + 2 * half * group * unit;
            add_up(own, 2 * half, group, rows, p.head_dim, padded, p.scale, head_of<T>(p.d_k, batch, head));
            add_up(own + half, 2 * half, group, rows, p.head_dim, padded, 1.0f, head_of<T>(p.d_v, batch, head));
        }
    }
    return status;
}

template <typename T>
int run(const ledom_attention_params& p, bool is_backward) {
    switch (p.head_dim) {
#if LEDOM_SPECIALISED
        case 64:
            return is_backward ? backward<T, 64>(p) : forward<T, 64>(p);
        case 128:
            return is_backward ? backward<T, 128>(p) : forward<T, 128>(p);
        case 192:
            return is_backward ? backward<T, 192>(p) : forward<T, 192>(p);
#endif
        default:
            return is_backward ? backward<T, 0>(p) : forward<T, 0>(p);
    }
}

}  // namespace

namespace ledom {
int LEDOM_PATH(const ledom_attention_params& params, bool is_backward) {
    if (params.dtype == LEDOM_FLOAT32) return run<float>(params, is_backward);
    return run<Bfloat16>(params, is_backward);
}
}  // namespace ledom
