// How arguments from Python are read, in both parts of the module.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>

#include "core/element.h"
#include "core/scale.h"

namespace llmfp4 {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using ElementFields = std::tuple<int, int, int, int>;  // formats.py's Element.fields

inline Element element_of(ElementFields e) { return {std::get<0>(e), std::get<1>(e), std::get<2>(e), std::get<3>(e)}; }

inline ScaleKind scale_kind_of(const std::string& name) {
    if (name == "none") return ScaleKind::none;
    if (name == "e8m0") return ScaleKind::e8m0;
    if (name == "e4m3") return ScaleKind::e4m3;
    throw pybind11::value_error("unknown group scale kind '" + name + "'");
}

}  // namespace llmfp4
