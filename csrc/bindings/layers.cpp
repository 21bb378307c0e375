// The row-wise kernels for Python. Pointers come as integers; megatron_ledom/ops fills them in.
#include "bindings/layers.h"

#include <array>
#include <stdexcept>
#include <string>

#include <pybind11/stl.h>

#include "layers/params.h"

namespace py = pybind11;

namespace {

// dtype, number of threads, rows, width
using Shape = std::array<int64_t, 4>;

template <typename Params>
Params params_of(const Shape& shape) {
    Params p = {};
    p.struct_size = sizeof p;
    p.version = LEDOM_ABI_VERSION;
    p.dtype = static_cast<int32_t>(shape[0]);
    p.num_threads = static_cast<int32_t>(shape[1]);
    p.rows = shape[2];
    p.width = shape[3];
    return p;
}

template <typename T = void>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(address);
}

template <typename Params>
void call(int (*kernel)(const Params*, int, const char*), const Params& p, bool is_backward, const std::string& path) {
    int status;
    {
        const py::gil_scoped_release release;
        status = kernel(&p, is_backward, path.c_str());
    }
    if (status == LEDOM_OUT_OF_MEMORY) throw std::bad_alloc();
    if (status != LEDOM_OK) throw std::invalid_argument(ledom_status_text(status));
}

void swiglu_forward(const Shape& shape, int64_t x, int64_t y, const std::string& path) {
    auto p = params_of<ledom_swiglu_params>(shape);
    p.x = pointer(x);
    p.y = pointer(y);
    call(&ledom_swiglu_cpu, p, false, path);
}

void swiglu_backward(const Shape& shape, int64_t x, int64_t d_y, int64_t d_x, const std::string& path) {
    auto p = params_of<ledom_swiglu_params>(shape);
    p.x = pointer(x);
    p.d_y = pointer(d_y);
    p.d_x = pointer(d_x);
    call(&ledom_swiglu_cpu, p, true, path);
}

void rms_norm_forward(const Shape& shape, float eps, int64_t x, int64_t weight, int64_t y, int64_t scale,
                      const std::string& path) {
    auto p = params_of<ledom_rms_norm_params>(shape);
    p.eps = eps;
    p.x = pointer(x);
    p.weight = pointer(weight);
    p.y = pointer(y);
    p.scale = pointer<float>(scale);
    call(&ledom_rms_norm_cpu, p, false, path);
}

// x, weight, scale, d_y; d_x, d_weight
void rms_norm_backward(const Shape& shape, std::array<int64_t, 4> inputs, std::array<int64_t, 2> outputs,
                       const std::string& path) {
    auto p = params_of<ledom_rms_norm_params>(shape);
    p.x = pointer(inputs[0]);
    p.weight = pointer(inputs[1]);
    p.scale = pointer<float>(inputs[2]);
    p.d_y = pointer(inputs[3]);
    p.d_x = pointer(outputs[0]);
    p.d_weight = pointer(outputs[1]);
    call(&ledom_rms_norm_cpu, p, true, path);
}

// maximum, sum, predicted
void cross_entropy_forward(const Shape& shape, int64_t first, int64_t logits, int64_t targets,
                           std::array<int64_t, 3> outputs, const std::string& path) {
    auto p = params_of<ledom_cross_entropy_params>(shape);
    p.first = first;
    p.logits = pointer(logits);
    p.targets = pointer<int64_t>(targets);
    p.maximum = pointer<float>(outputs[0]);
    p.sum = pointer<float>(outputs[1]);
    p.predicted = pointer<float>(outputs[2]);
    call(&ledom_cross_entropy_cpu, p, false, path);
}

// logits, targets, lse, d_loss
void cross_entropy_backward(const Shape& shape, int64_t first, std::array<int64_t, 4> inputs, int64_t d_logits,
                            const std::string& path) {
    auto p = params_of<ledom_cross_entropy_params>(shape);
    p.first = first;
    p.logits = pointer(inputs[0]);
    p.targets = pointer<int64_t>(inputs[1]);
    p.lse = pointer<float>(inputs[2]);
    p.d_loss = pointer<float>(inputs[3]);
    p.d_logits = pointer(d_logits);
    call(&ledom_cross_entropy_cpu, p, true, path);
}

}  // namespace

void add_layers(py::module_& m) {
    m.def("swiglu_forward_cpu", &swiglu_forward);
    m.def("swiglu_backward_cpu", &swiglu_backward);
    m.def("rms_norm_forward_cpu", &rms_norm_forward);
    m.def("rms_norm_backward_cpu", &rms_norm_backward);
    m.def("cross_entropy_forward_cpu", &cross_entropy_forward);
    m.def("cross_entropy_backward_cpu", &cross_entropy_backward);
}
