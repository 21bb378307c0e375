// The row-wise kernels against plain loops in double: for the sanitizers, so every tensor is its own block of memory of
// exactly its size. Prints the worst error, relative to the largest value.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "layers/params.h"

namespace {

using Values = std::vector<double>;

// fp32 or bf16 numbers; `values` are what is stored.
struct Tensor {
    std::vector<float> wide;
    std::vector<uint16_t> narrow;
    bool is_narrow;

    Tensor(size_t size, int dtype, bool is_random) : is_narrow(dtype == LEDOM_BFLOAT16) {
        if (is_narrow) narrow.resize(size);
        if (!is_narrow) wide.resize(size);
        for (size_t i = 0; is_random && i < size; ++i) {
            const float value = 4.0f * static_cast<float>(rand()) / static_cast<float>(RAND_MAX) - 2.0f;
            uint32_t bits;
            memcpy(&bits, &value, sizeof bits);
            if (is_narrow) narrow[i] = static_cast<uint16_t>(bits >> 16);
            if (!is_narrow) wide[i] = value;
        }
    }
    void* data() { return is_narrow ? static_cast<void*>(narrow.data()) : wide.data(); }
    Values values() const {
        if (!is_narrow) return Values(wide.begin(), wide.end());
        Values result;
        for (const uint16_t half : narrow) {
            const uint32_t bits = static_cast<uint32_t>(half) << 16;
            float value;
            memcpy(&value, &bits, sizeof value);
            result.push_back(value);
        }
        return result;
    }
};

double worst[2] = {0.0, 0.0};  // of fp32 and of bf16

void compare(const Values& found, const Values& exact, int dtype) {
    double error = 0.0, largest = 0.5;
    for (size_t i = 0; i < found.size(); ++i) {
        error = fmax(error, fabs(found[i] - exact[i]));
        largest = fmax(largest, fabs(exact[i]));
    }
    worst[dtype] = fmax(worst[dtype], error / largest);
}

void expect(int status) {
    if (status == LEDOM_OK) return;
    printf("status %d: %s\n", status, ledom_status_text(status));
    exit(1);
}

template <typename Params>
Params start(int dtype, int64_t rows, int64_t width) {
    Params p = {};
    p.struct_size = sizeof p;
    p.version = LEDOM_ABI_VERSION;
    p.dtype = dtype;
    p.num_threads = 2;
    p.rows = rows;
    p.width = width;
    return p;
}

void check_swiglu(int dtype, int64_t rows, int64_t width) {
    Tensor x(2 * rows * width, dtype, true), y(rows * width, dtype, false), d_y(rows * width, dtype, true);
    Tensor d_x(2 * rows * width, dtype, false);
    auto p = start<ledom_swiglu_params>(dtype, rows, width);
    p.x = x.data(), p.y = y.data(), p.d_y = d_y.data(), p.d_x = d_x.data();
    expect(ledom_swiglu_cpu(&p, 0, ""));
    expect(ledom_swiglu_cpu(&p, 1, ""));
    const Values from = x.values(), d = d_y.values();
    Values out, gradient(from.size());
    for (int64_t i = 0; i < rows * width; ++i) {
        const int64_t at = i / width * 2 * width + i % width;
        const double gate = from[at], up = from[at + width], part = 1 / (1 + exp(-gate));
        out.push_back(gate * part * up);
        gradient[at] = d[i] * up * part * (1 + gate * (1 - part));
        gradient[at + width] = d[i] * gate * part;
    }
    compare(y.values(), out, dtype);
    compare(d_x.values(), gradient, dtype);
}

void check_rms_norm(int dtype, int64_t rows, int64_t width) {
    Tensor x(rows * width, dtype, true), weight(width, dtype, true), y(rows * width, dtype, false);
    Tensor d_y(rows * width, dtype, true), d_x(rows * width, dtype, false), d_weight(width, dtype, false);
    std::vector<float> scale(rows);
    auto p = start<ledom_rms_norm_params>(dtype, rows, width);
    p.eps = 1e-5f;
    p.x = x.data(), p.weight = weight.data(), p.y = y.data(), p.scale = scale.data();
    p.d_y = d_y.data(), p.d_x = d_x.data(), p.d_weight = d_weight.data();
    expect(ledom_rms_norm_cpu(&p, 0, ""));
    expect(ledom_rms_norm_cpu(&p, 1, ""));
    const Values from = x.values(), w = weight.values(), d = d_y.values();
    Values out(from.size()), gradient(from.size()), of_weight(width);
    for (int64_t row = 0; row < rows; ++row) {
        double squares = 0.0, product = 0.0;
        for (int64_t i = row * width; i < (row + 1) * width; ++i) squares += from[i] * from[i];
        const double factor = 1 / sqrt(squares / width + p.eps);
        for (int64_t i = 0; i < width; ++i) product += d[row * width + i] * w[i] * from[row * width + i] * factor;
        for (int64_t i = 0; i < width; ++i) {
            const int64_t at = row * width + i;
            out[at] = from[at] * factor * w[i];
            gradient[at] = (d[at] * w[i] - from[at] * factor * product / width) * factor;
            of_weight[i] += d[at] * from[at] * factor;
        }
    }
    compare(y.values(), out, dtype);
    compare(d_x.values(), gradient, dtype);
    compare(d_weight.values(), of_weight, dtype);
}

void check_cross_entropy(int dtype, int64_t rows, int64_t width) {
    Tensor logits(rows * width, dtype, true);
    std::vector<int64_t> targets(rows);
    std::vector<float> maximum(rows), sum(rows), predicted(rows), lse(rows), d_loss(rows);
    auto p = start<ledom_cross_entropy_params>(dtype, rows, width);
    p.first = 3;
    for (int64_t row = 0; row < rows; ++row) targets[row] = rand() % (width + 6);  // some are another rank's
    p.logits = logits.data(), p.targets = targets.data();
    p.maximum = maximum.data(), p.sum = sum.data(), p.predicted = predicted.data();
    expect(ledom_cross_entropy_cpu(&p, 0, ""));
    const Values from = logits.values();
    Values exact(rows), found(rows), gradient(from.size());
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = targets[row] - p.first;
        const bool is_here = at >= 0 && at < width;
        double total = 0.0;
        for (int64_t i = 0; i < width; ++i) total += exp(from[row * width + i]);
        exact[row] = log(total) - (is_here ? from[row * width + at] : 0.0);
        lse[row] = maximum[row] + logf(sum[row]);
        found[row] = static_cast<double>(lse[row]) - predicted[row];
        d_loss[row] = 0.5f + static_cast<float>(row % 3);
        for (int64_t i = 0; i < width; ++i) {
            const double weight = exp(from[row * width + i]) / total - (is_here && i == at ? 1.0 : 0.0);
            gradient[row * width + i] = weight * d_loss[row];
        }
    }
    p.lse = lse.data(), p.d_loss = d_loss.data(), p.d_logits = logits.data();
    expect(ledom_cross_entropy_cpu(&p, 1, ""));
    compare(found, exact, LEDOM_FLOAT32);
    compare(logits.values(), gradient, dtype);
}

}  // namespace

int main() {
    for (const int dtype : {LEDOM_FLOAT32, LEDOM_BFLOAT16}) {
        for (const int64_t rows : {1, 2, 33, 70}) {
            for (const int64_t width : {1, 3, 15, 16, 17, 64, 131, 1030}) {
                check_swiglu(dtype, rows, width);
                check_rms_norm(dtype, rows, width);
                check_cross_entropy(dtype, rows, width);
            }
        }
    }
    printf("worst error %.3e, bf16 %.3e\n", worst[0], worst[1]);
    return worst[0] < 1e-5 && worst[1] < 1e-2 ? 0 : 1;
}
