// megatron_ledom.data._records: what is read of corpora without Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <string_view>
#include <vector>

#include "records/jsonl.h"

namespace py = pybind11;

namespace {

// Counts up where `read_texts` changes what it takes or gives.
constexpr int kInterface = 1;

// The texts of whole lines: a list for every key, with a text (bytes, UTF-8) or None for every line; and (number, begin,
// end) of each line that is None there, in bytes of the block, without its newline.
py::tuple read_texts(const py::bytes& block, const std::vector<std::string>& keys) {
    const std::string_view bytes = block;
    ledom::TextReader reader(bytes.size());
    std::vector<py::list> columns(keys.size());
    std::vector<py::bytes> texts(keys.size());
    py::list odd;
    size_t number = 0;
    for (size_t begin = 0, next; begin < bytes.size(); begin = next, ++number) {
        const size_t newline = bytes.find('\n', begin), end = newline == bytes.npos ? bytes.size() : newline;
        next = newline == bytes.npos ? end : end + 1;
        bool is_read = true;
        for (size_t key = 0; is_read && key < keys.size(); ++key) {
            const auto text = reader.read(bytes.substr(begin, end - begin), keys[key]);
            is_read = text.has_value();
            if (is_read) texts[key] = py::bytes(text->data(), text->size());
        }
        for (size_t key = 0; key < keys.size(); ++key) {
            if (is_read) {
                columns[key].append(std::move(texts[key]));
            } else {
                columns[key].append(py::none());
            }
        }
        if (!is_read) odd.append(py::make_tuple(number, begin, end));
    }
    py::list all;
    for (py::list& column : columns) all.append(column);
    return py::make_tuple(all, odd);
}

}  // namespace

PYBIND11_MODULE(_records, m) {
    m.doc() = "What is read of corpora without Python.";
    m.attr("INTERFACE") = kInterface;
    m.def("read_texts", &read_texts);
}
