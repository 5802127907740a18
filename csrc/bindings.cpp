// The pybind11 module: argument passing and nothing else. Tensors come as addresses; Python keeps them alive.

#include <algorithm>
#include <numeric>
#include <vector>

#include "core/half.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "linear.h"

namespace py = pybind11;
using namespace llmfp4;

void bind_few_rows(py::module_& m);
void bind_cuda(py::module_& m);   // only where CMake found a CUDA compiler
void bind_sm120(py::module_& m);  // and where 120a is among its architectures

namespace {

const cpu::Kernels& kernel_named(const std::string& name) {
    const auto table = cpu::kernels();
    for (int i = 0; i < table.count; ++i)
        if (name == table.rows[i].name) {
            if (table.rows[i].supported()) return table.rows[i];
            throw py::value_error("this CPU lacks what kernel '" + name + "' needs: " + table.rows[i].needs);
        }
    throw py::value_error("no CPU kernel is called '" + name + "'");
}

std::vector<py::dict> list_kernels() {
    std::vector<py::dict> rows;
    const auto table = cpu::kernels();
    for (int i = 0; i < table.count; ++i) {
        py::dict row;
        row["name"] = table.rows[i].name;
        row["needs"] = table.rows[i].needs;
        row["supported"] = table.rows[i].supported();
        row["w4a4_from_m"] = table.rows[i].w4a4_from_m;
        row["w4a16_from_m"] = table.rows[i].w4a16_from_m;
        rows.push_back(row);
    }
    return rows;
}

// Operations/s of an instruction set's products in a unit, with `threads` threads at once.
double peak(const std::string& isa, const std::string& unit, int threads, double seconds) {
    const auto& kernel = kernel_named(isa);
    const std::vector<std::string> units{"int8", "bf16", "fp32"};
    const auto at = std::find(units.begin(), units.end(), unit);
    if (at == units.end()) throw py::value_error("unknown unit '" + unit + "': expected int8, bf16 or fp32");
    std::vector<double> rates(threads);
    py::gil_scoped_release release;
    cpu::parallel_ranges(threads, threads, [&](long begin, long end) {
        for (long i = begin; i < end; ++i) rates[i] = kernel.peak(cpu::Unit(at - units.begin()), seconds);
    });
    return std::accumulate(rates.begin(), rates.end(), 0.0);
}

std::vector<float> element_values(ElementFields e) {
    std::vector<float> values;
    for (int code = 0; code < 2 * element_of(e).sign_code(); ++code) values.push_back(element_of(e).value(code));
    return values;
}

std::vector<float> scale_values(const std::string& name) {
    std::vector<float> values;
    for (int byte = 0; byte < 256; ++byte) values.push_back(decode_scale(scale_kind_of(name), uint8_t(byte)));
    return values;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    py::enum_<cpu::Dtype>(m, "Dtype")
        .value("float32", cpu::Dtype::f32)
        .value("bfloat16", cpu::Dtype::bf16)
        .value("float16", cpu::Dtype::f16);
    py::class_<cpu::Kernels>(m, "Kernel").def_readonly("name", &cpu::Kernels::name);
    py::class_<Linear>(m, "Linear")
        .def(py::init<int, int, ElementFields, uintptr_t, uintptr_t, uintptr_t, const std::string&, uintptr_t, int,
                      uintptr_t, uintptr_t>(),
             py::arg("n"), py::arg("k"), py::arg("element"), py::arg("codes"), py::arg("row_scale"),
             py::arg("bias") = 0, py::arg("scale") = "none", py::arg("group_scale") = 0, py::arg("group_size") = 0,
             py::arg("shift") = 0, py::arg("x_factor") = 0)
        .def("quantize_activations", &Linear::quantize_activations, py::arg("element"), py::arg("x_scale"))
        .def("quantize_dynamically", &Linear::quantize_dynamically, py::arg("element"), py::arg("group_size"))
        .def_property_readonly("smoothed", &Linear::smoothed)
        .def("run", [](const Linear& linear, const cpu::Kernels& kernel, uintptr_t x, size_t ldx, uintptr_t y, int m,
                       cpu::Dtype dtype, int threads) {
            py::gil_scoped_release release;
            linear.run(kernel, {pointer<void>(x), pointer<void>(y), m, ldx, dtype, threads});
        });
    bind_few_rows(m);
    m.def("kernels", &list_kernels);
    m.def("kernel", &kernel_named, py::return_value_policy::reference);
    m.def("team", &cpu::team_kind);
    m.def("wake_microseconds", &cpu::wake_microseconds);
    m.def("set_wake_microseconds", &cpu::set_wake_microseconds, py::arg("microseconds"));
    m.def("peak", &peak, py::arg("isa"), py::arg("unit"), py::arg("threads"), py::arg("seconds"));
    m.def("element_values", &element_values);
    m.def("scale_values", &scale_values);
    m.def("tiled_bytes", [](int n, int k) { return TileLayout{n, k}.bytes(); });
    m.def("tile_position", [](int n, int k, size_t in, size_t ik) {
        return std::make_pair(TileLayout{n, k}.byte_of(in, ik), TileLayout::nibble_of(ik));
    });
    m.def("shuffle", [](uintptr_t rows, uintptr_t tiles, int n, int k) {
        py::gil_scoped_release release;
        shuffle(pointer<uint8_t>(rows), pointer<uint8_t>(tiles), {n, k});
    });
    m.def("unshuffle", [](uintptr_t tiles, uintptr_t rows, int n, int k) {
        py::gil_scoped_release release;
        unshuffle(pointer<uint8_t>(tiles), pointer<uint8_t>(rows), {n, k});
    });
    m.def("shuffle_scales", [](uintptr_t rows, uintptr_t tiles, int n, int k, int groups) {
        shuffle_scales(pointer<uint8_t>(rows), pointer<uint8_t>(tiles), {n, k}, groups);
    });
#ifdef LLMFP4_CUDA
    bind_cuda(m);
#if LLMFP4_SM120
    bind_sm120(m);
#endif
    m.attr("cuda_compiler") = LLMFP4_CUDA;
    m.attr("cuda_architectures") = std::vector<std::string>{LLMFP4_CUDA_ARCHITECTURES};
#else
    m.attr("cuda_architectures") = std::vector<std::string>{};
#endif
    m.attr("compiler") = __VERSION__;
}
