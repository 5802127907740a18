// The CUDA part of the pybind11 module: argument passing and nothing else.
#include "bindings.h"
#include "cuda/linear.h"

namespace py = pybind11;
using namespace llmfp4;

namespace {

// One weight on a GPU and what its activations look like. Holds addresses, not tensors.
class CudaLinear {
public:
    CudaLinear(int n, int k, ElementFields element, uintptr_t codes, uintptr_t row_scale, uintptr_t bias,
               const std::string& scale, uintptr_t group_scale, int group_size)
        : w_{n,
             k,
             element_of(element),
             pointer<void>(codes),
             pointer<float>(row_scale),
             pointer<float>(bias),
             scale_kind_of(scale),
             pointer<void>(group_scale),
             group_size} {
        cuda::require_aligned("codes", w_.codes, 16);
        cuda::require_aligned("group scales", w_.group_scale, 16);
    }

    // Activations become integers of `element`, at x_scale or (0) at scales of their own.
    void quantize_activations(ElementFields element, float x_scale, int group_size, uintptr_t shift,
                              uintptr_t x_factor) {
        a_ = {element_of(element), x_scale, group_size, pointer<uint8_t>(shift), pointer<float>(x_factor)};
        cuda::require_aligned("shifts", a_.shift, 16);
        cuda::require_aligned("input factors", a_.x_factor, 16);
    }

    // Activations stay floats, times x_factor [padded k]. `shift` is given where that is 2^-shift and nothing else.
    void scale_activations(uintptr_t x_factor, uintptr_t shift) {
        a_.x_factor = pointer<float>(x_factor), a_.shift = pointer<uint8_t>(shift);
        cuda::require_aligned("shifts", a_.shift, 16);
    }

    // tile and splits: cuda::Forced's.
    cuda::Plan plan(const std::string& kernel, int m, int dtype, int multiprocessors, int tile, int splits) const {
        return cuda::family_named(kernel).plan(w_, a_, m, cuda::Dtype(dtype), multiprocessors, {tile, splits});
    }

    // x [m, k] → y [m, n] or, gated, [m, n / 2]; residual as y, or 0. Contiguous, of dtype 0 (fp32), 1 (bf16) or 2
    // (fp16).
    void run(const std::string& kernel, const cuda::Plan& plan, uintptr_t x, uintptr_t y, int m, int dtype,
             uintptr_t workspace, uintptr_t arrived, int device, bool overlap, uintptr_t stream, uintptr_t residual,
             bool gated) const {
        if (gated && w_.n % 16)
            throw std::invalid_argument("gates and ups come in eights, n is " + std::to_string(w_.n));
        const cuda::Call call{pointer<void>(x),
                              pointer<void>(y),
                              pointer<void>(residual),
                              gated,
                              m,
                              cuda::Dtype(dtype),
                              pointer<char>(workspace),
                              pointer<unsigned>(arrived),
                              {device, overlap, pointer<void>(stream)}};
        cuda::require_aligned("activations", call.x, plan.direct ? 16 : dtype == 0 ? 4 : 2);
        cuda::require_aligned("outputs", call.y, dtype == 0 ? 4 : 2);
        cuda::require_aligned("residuals", call.residual, dtype == 0 ? 4 : 2);
        cuda::require_aligned("workspace bytes", call.workspace, 16);
        py::gil_scoped_release release;
        cuda::family_named(kernel).run(w_, a_, plan, call);
    }

private:
    cuda::Weight w_;
    cuda::Activations a_{};
};

// How blocks would share a product of `rows` rows of operands, integers or not, with a weight that need not exist.
cuda::Plan division(const std::string& kernel, int n, int k, const std::string& scale, int rows, bool integers,
                    int multiprocessors, int tile, int splits) {
    cuda::Weight weight{};
    weight.n = n, weight.k = k, weight.scale_kind = scale_kind_of(scale);
    cuda::Plan plan{};
    plan.forced = {tile, splits}, plan.exact = integers;
    cuda::family_named(kernel).divide(weight, rows, multiprocessors, plan);
    return plan;
}

}  // namespace

void bind_cuda(py::module_& m) {
    py::class_<cuda::Plan>(m, "CudaPlan")
        .def_property_readonly("bytes", &cuda::Plan::bytes)
        .def_property_readonly("parts",  // of the workspace, in bytes, in order
                               [](const cuda::Plan& plan) {
                                   return std::vector<size_t>{plan.x_bytes, plan.scale_bytes, plan.partial_bytes};
                               })
        .def_readonly("direct", &cuda::Plan::direct)
        .def_readonly("counters", &cuda::Plan::counters)
        .def_readonly("tile", &cuda::Plan::tile)
        .def_property_readonly("tiles",  // that may be forced
                               [](const cuda::Plan& plan) { return std::make_tuple(plan.first_tile, plan.last_tile); })
        .def_property_readonly("tile_size",  // outputs and rows of operands
                               [](const cuda::Plan& plan) {
                                   return std::to_string(plan.tile_outs) + "x" + std::to_string(plan.tile_rows);
                               })
        .def_readonly("splits", &cuda::Plan::splits)
        .def_readonly("whole", &cuda::Plan::whole)
        .def_readonly("sharers", &cuda::Plan::sharers)
        .def_readonly("most_splits", &cuda::Plan::most_splits);
    m.def("cuda_division", division, py::arg("kernel"), py::arg("n"), py::arg("k"), py::arg("scale"), py::arg("rows"),
          py::arg("integers"), py::arg("multiprocessors"), py::arg("tile") = -1, py::arg("splits") = 0);
    py::class_<CudaLinear>(m, "CudaLinear")
        .def(py::init<int, int, ElementFields, uintptr_t, uintptr_t, uintptr_t, const std::string&, uintptr_t, int>(),
             py::arg("n"), py::arg("k"), py::arg("element"), py::arg("codes"), py::arg("row_scale"),
             py::arg("bias") = 0, py::arg("scale") = "none", py::arg("group_scale") = 0, py::arg("group_size") = 0)
        .def("quantize_activations", &CudaLinear::quantize_activations, py::arg("element"), py::arg("x_scale"),
             py::arg("group_size") = 0, py::arg("shift") = 0, py::arg("x_factor") = 0)
        .def("scale_activations", &CudaLinear::scale_activations, py::arg("x_factor"), py::arg("shift") = 0)
        .def("plan", &CudaLinear::plan, py::arg("kernel"), py::arg("m"), py::arg("dtype"), py::arg("multiprocessors"),
             py::arg("tile") = -1, py::arg("splits") = 0)
        .def("run", &CudaLinear::run);
    // A cuda::Launcher by address, 0 for the CUDA runtime's; returns the address of the one before.
    m.def("set_cuda_launcher", [](uintptr_t launcher) {
        return reinterpret_cast<uintptr_t>(cuda::set_launcher(reinterpret_cast<cuda::Launcher>(launcher)));
    });
    m.def("unit_bytes", [](int n, int k) { return UnitLayout{n, k}.bytes(); });
    m.def("unit_place", [](int n, int k, size_t in, size_t ik) {
        const CodePlace at = UnitLayout{n, k}.place(in, ik);
        return std::make_tuple(at.word, at.magnitude, at.sign);
    });
}
