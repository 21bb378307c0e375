// megatron_ledom.ops._kernels: the C interface for Python. Pointers come as integers, so that neither torch nor numpy
// is needed here; megatron_ledom/ops/kernels.py fills them in. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/layers.h"
#include "reversed_attention/mask.h"
#include "reversed_attention/params.h"

// What setup.py says of the CUDA kernels: the compiler, and the SHA-256 of their sources and flags.
#if !defined(LEDOM_CUDA_COMPILER)
#define LEDOM_CUDA_COMPILER ""
#define LEDOM_CUDA_SOURCE_HASH ""
#endif

namespace py = pybind11;

namespace {

// data, stride of the batch, of the sequence, of the heads.
using Tensor = std::array<int64_t, 4>;

ledom_tensor tensor_of(const Tensor& t) { return {reinterpret_cast<void*>(t[0]), t[1], t[2], t[3]}; }

template <typename T>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(address);
}

void raise_unless_ok(int status) {
    if (status == LEDOM_OUT_OF_MEMORY) throw std::bad_alloc();
    if (status >= LEDOM_CUDA_ERROR) {
        throw std::runtime_error("CUDA error " + std::to_string(status - LEDOM_CUDA_ERROR) + ": " +
                                 ledom_cuda_error_text(status));
    }
    if (status != LEDOM_OK) throw std::invalid_argument(ledom_status_text(status));
}

// batch, seq, heads, kv_heads, head_dim
using Sizes = std::array<int32_t, 5>;

struct Call {
    int dtype;
    Sizes sizes;
    std::array<int32_t, 2> reach;
    std::array<int64_t, 2> documents;
    float scale;
    int num_threads;  // CPU
    int device;       // CUDA
    int64_t stream;   // CUDA
};

ledom_attention_params params_of(const Call& call) {
    ledom_attention_params p = {};
    p.struct_size = sizeof p;
    p.version = LEDOM_ABI_VERSION;
    p.dtype = call.dtype;
    p.batch = call.sizes[0];
    p.seq = call.sizes[1];
    p.heads = call.sizes[2];
    p.kv_heads = call.sizes[3];
    p.head_dim = call.sizes[4];
    p.left = call.reach[0];
    p.right = call.reach[1];
    p.doc_first = pointer<int32_t>(call.documents[0]);
    p.doc_last = pointer<int32_t>(call.documents[1]);
    p.scale = call.scale;
    p.num_threads = call.num_threads;
    p.device = call.device;
    p.stream = pointer<void>(call.stream);
    return p;
}

template <typename Kernel>
void run(const Kernel& kernel, const ledom_attention_params& params) {
    int status;
    {
        const py::gil_scoped_release release;
        status = kernel(&params);
    }
    raise_unless_ok(status);
}

const ledom_cuda_variant* find_variant(const std::string& name) {
    int count;
    const ledom_cuda_variant* all = ledom_cuda_variants(&count);
    for (int i = 0; i < count; ++i) {
        if (name == all[i].name) return &all[i];
    }
    return nullptr;
}

// `path` is one of the CPU's, or a CUDA variant.
void forward(const Call& call, const std::vector<Tensor>& qkvo, int64_t lse, const std::string& path) {
    ledom_attention_params p = params_of(call);
    p.q = tensor_of(qkvo.at(0));
    p.k = tensor_of(qkvo.at(1));
    p.v = tensor_of(qkvo.at(2));
    p.o = tensor_of(qkvo.at(3));
    p.lse = pointer<float>(lse);
    if (const ledom_cuda_variant* variant = find_variant(path)) return run(variant->forward, p);
    run([&](const ledom_attention_params* q) { return ledom_attention_forward_cpu(q, path.c_str()); }, p);
}

void backward(const Call& call, const std::vector<Tensor>& qkvo, int64_t lse, const std::vector<Tensor>& gradients,
              int64_t delta, const std::string& path) {
    ledom_attention_params p = params_of(call);
    p.q = tensor_of(qkvo.at(0));
    p.k = tensor_of(qkvo.at(1));
    p.v = tensor_of(qkvo.at(2));
    p.o = tensor_of(qkvo.at(3));
    p.lse = pointer<float>(lse);
    p.d_o = tensor_of(gradients.at(0));
    p.d_q = tensor_of(gradients.at(1));
    p.d_k = tensor_of(gradients.at(2));
    p.d_v = tensor_of(gradients.at(3));
    p.delta = pointer<float>(delta);
    if (const ledom_cuda_variant* variant = find_variant(path)) return run(variant->backward, p);
    run([&](const ledom_attention_params* q) { return ledom_attention_backward_cpu(q, path.c_str()); }, p);
}

void rope(const Call& call, const Tensor& x, const Tensor& y, int rotary_dim, bool interleaved, bool from_end,
          bool inverse, std::array<int64_t, 2> tables, int num_positions, bool is_cuda) {
    ledom_rope_params p = {};
    p.struct_size = sizeof p;
    p.version = LEDOM_ABI_VERSION;
    p.dtype = call.dtype;
    p.batch = call.sizes[0];
    p.seq = call.sizes[1];
    p.heads = call.sizes[2];
    p.head_dim = call.sizes[4];
    p.rotary_dim = rotary_dim;
    p.interleaved = interleaved;
    p.from_end = from_end;
    p.inverse = inverse;
    p.num_positions = num_positions;
    p.doc_first = pointer<int32_t>(call.documents[0]);
    p.doc_last = pointer<int32_t>(call.documents[1]);
    p.cosines = pointer<float>(tables[0]);
    p.sines = pointer<float>(tables[1]);
    p.x = tensor_of(x);
    p.y = tensor_of(y);
    p.num_threads = call.num_threads;
    p.device = call.device;
    p.stream = pointer<void>(call.stream);
    int status;
    {
        const py::gil_scoped_release release;
        status = is_cuda ? ledom_rope_cuda(&p) : ledom_rope_cpu(&p);
    }
    raise_unless_ok(status);
}

// name, least and most capability
std::vector<std::tuple<std::string, int, int>> cuda_variants() {
    int count;
    const ledom_cuda_variant* all = ledom_cuda_variants(&count);
    std::vector<std::tuple<std::string, int, int>> found;
    for (int i = 0; i < count; ++i) found.emplace_back(all[i].name, all[i].least_capability, all[i].most_capability);
    return found;
}

// of the runtime, of the driver
std::array<int, 2> cuda_versions() {
    int runtime, driver;
    ledom_cuda_versions(&runtime, &driver);
    return {runtime, driver};
}

// For tests: what mask.h says, in numbers that Python can compare with its own definition.
ledom::Mask mask_of(int32_t seq, std::array<int32_t, 2> reach, const std::vector<int32_t>& first,
                    const std::vector<int32_t>& last) {
    return {seq, reach[0], reach[1], first.empty() ? nullptr : first.data(), last.empty() ? nullptr : last.data()};
}

std::vector<std::array<int32_t, 2>> attended(int32_t seq, std::array<int32_t, 2> reach,
                                             const std::vector<int32_t>& first, const std::vector<int32_t>& last,
                                             bool is_transposed) {
    const ledom::Mask given = mask_of(seq, reach, first, last);
    const ledom::Mask mask = is_transposed ? ledom::transposed(given) : given;
    std::vector<std::array<int32_t, 2>> result;
    for (int32_t i = 0; i < seq; ++i) {
        const ledom::Interval keys = ledom::attended(mask, i);
        result.push_back({keys.lo, keys.hi});
    }
    return result;
}

// first tile, last tile, and whether each of them is full, for the rows begin .. end - 1
py::tuple tiles(int32_t seq, std::array<int32_t, 2> reach, const std::vector<int32_t>& first,
                const std::vector<int32_t>& last, std::array<int32_t, 2> rows, int32_t size) {
    const ledom::Mask mask = mask_of(seq, reach, first, last);
    const ledom::Interval found = ledom::tiles_of(ledom::attended_by_rows(mask, rows[0], rows[1]), size);
    std::vector<bool> full;
    for (int32_t t = found.lo; t <= found.hi; ++t) {
        full.push_back(ledom::is_full(mask, rows[0], rows[1], {t * size, t * size + size - 1}));
    }
    return py::make_tuple(found.lo, found.hi, full);
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
    m.doc() = "The kernels of csrc/, without torch.";
    py::class_<Call>(m, "Call")
        .def(py::init<int, Sizes, std::array<int32_t, 2>, std::array<int64_t, 2>, float, int, int, int64_t>());
    m.def("abi_version", [] { return LEDOM_ABI_VERSION; });
    m.def("cpu_paths", [] { return std::string(ledom_cpu_paths()); });
    m.def("compiler", [] { return std::string(__VERSION__); });
    m.def("cuda_variants", &cuda_variants);
    m.def("cuda_versions", &cuda_versions);
    m.def("cuda_compiler", [] { return std::string(LEDOM_CUDA_COMPILER); });
    m.def("cuda_source_hash", [] { return std::string(LEDOM_CUDA_SOURCE_HASH); });
    m.def("attention_forward", &forward);
    m.def("attention_backward", &backward);
    m.def("rope", &rope);
    m.def("attended", &attended);
    m.def("tiles", &tiles);
    add_layers(m);
}
