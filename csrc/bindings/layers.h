// The part of the extension that holds the row-wise kernels of csrc/layers.
#pragma once

#include <pybind11/pybind11.h>

void add_layers(pybind11::module_& m);
