// What cuda.sm120 adds to the pybind11 module: argument passing and nothing else.
#include "bindings.h"
#include "cuda/linear_sm120.h"

namespace py = pybind11;
using namespace llmfp4;

namespace {

cuda::XGroups groups_called(const std::string& name) {
    if (name == "none") return cuda::XGroups::none;
    if (name == "blocks") return cuda::XGroups::blocks;
    if (name == "integers") return cuda::XGroups::integers;
    throw std::invalid_argument("activation groups are called '" + name + "', expected none, blocks or integers");
}

// One weight on a GPU and what its activations look like, E2M1 both. Holds addresses, not tensors.
class CudaBlockScaled {
public:
    CudaBlockScaled(int n, int k, int padded_k, uintptr_t codes, const std::string& scale, uintptr_t group_scale,
                    uintptr_t row_scale, uintptr_t bias, const std::string& x_groups, float x_scale, uintptr_t shift,
                    uintptr_t x_factor, uintptr_t channel)
        : b_{{n, k, E2M1, pointer<void>(codes), pointer<float>(row_scale), pointer<float>(bias), scale_kind_of(scale),
              pointer<void>(group_scale), 0},
             {E2M1, x_scale, 0, pointer<uint8_t>(shift), pointer<float>(x_factor)},
             groups_called(x_groups),
             padded_k,
             pointer<int32_t>(channel)} {
        cuda::require_aligned("codes", b_.weight.codes, 16);
        cuda::require_aligned("group scales", b_.weight.group_scale, 16);
        cuda::require_aligned("input factors", b_.x.x_factor, 16);
    }

    // The arguments of CudaLinear's: one kernel, whatever it is called, for every dtype.
    cuda::Plan plan(const std::string&, int m, int, int multiprocessors) const {
        return cuda::plan_gemm_sm120(b_, m, multiprocessors);
    }
    void run(const std::string&, const cuda::Plan& plan, uintptr_t x, uintptr_t y, int m, int dtype,
             uintptr_t workspace, uintptr_t arrived, int device, bool overlap, uintptr_t stream, uintptr_t residual,
             bool gated) const {
        if (residual || gated) throw std::invalid_argument("cuda.sm120 adds no residual and has no SwiGLU");
        const cuda::Call call{pointer<void>(x),
                              pointer<void>(y),
                              nullptr,
                              false,
                              m,
                              cuda::Dtype(dtype),
                              pointer<char>(workspace),
                              pointer<unsigned>(arrived),
                              {device, overlap, pointer<void>(stream)}};
        cuda::require_aligned("activations", call.x, dtype == 0 ? 4 : 2);
        cuda::require_aligned("outputs", call.y, dtype == 0 ? 4 : 2);
        cuda::require_aligned("workspace bytes", call.workspace, 16);
        py::gil_scoped_release release;
        cuda::gemm_sm120(b_, plan, call);
    }

private:
    cuda::BlockScaled b_;
};

}  // namespace

void bind_sm120(py::module_& m) {
    py::class_<CudaBlockScaled>(m, "CudaBlockScaled")
        .def(py::init<int, int, int, uintptr_t, const std::string&, uintptr_t, uintptr_t, uintptr_t, const std::string&,
                      float, uintptr_t, uintptr_t, uintptr_t>(),
             py::arg("n"), py::arg("k"), py::arg("padded_k"), py::arg("codes"), py::arg("scale"),
             py::arg("group_scale"), py::arg("row_scale"), py::arg("bias") = 0, py::arg("x_groups") = "none",
             py::arg("x_scale") = 0, py::arg("shift") = 0, py::arg("x_factor") = 0, py::arg("channel") = 0)
        .def("plan", &CudaBlockScaled::plan)
        .def("run", &CudaBlockScaled::run);
}
