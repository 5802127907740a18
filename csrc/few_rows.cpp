// Calls of few rows without Python between x and the kernel: a token's product of 16 x 32 takes 1.7 us, the same steps
// in Python took 3.0.
#include <array>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>

#include "dlpack.h"
#include "linear.h"

namespace py = pybind11;

namespace llmfp4 {
namespace {

// `call`, a function of x [..., k]: y [..., n] for the numbers of rows and dtypes that were added, and None for
// whatever else x may be. Nothing but a plain torch.Tensor is looked into.
class FewRows {
public:
    FewRows(py::object linear, py::object memory, py::object tensor_type, py::object thread_count, dlpack::Read read)
        : linear_object_(linear),
          memory_(memory),
          linear_(linear.cast<const Linear&>()),
          tensor_type_(tensor_type),
          thread_count_(thread_count),
          is_neg_(tensor_type.attr("is_neg")),
          new_empty_(tensor_type.attr("new_empty")),
          n_(linear_.at().n),
          read_(read) {}

    void add(const cpu::Kernels& kernel, int m, cpu::Dtype dtype) {
        if (m < 1 || m > most_rows)
            throw py::value_error("1 to " + std::to_string(most_rows) + " rows, not " + std::to_string(m));
        kernels_[int(dtype)][m] = &kernel;
    }

    static constexpr int most_rows = 16;

    // A new reference, or null with an exception set.
    PyObject* operator()(PyObject* x) const {
        dlpack::Tensor in, out;
        cpu::Dtype dtype;
        const int m = reads(x, in) && dtype_of(in, dtype) ? rows_of(in) : 0;
        if (!m || !kernels_[int(dtype)][m] || in.ndim > most_dims) Py_RETURN_NONE;
        // The one thing about a tensor's memory that DLPack does not tell.
        const auto negated = py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_neg_.ptr(), x));
        if (!negated) return nullptr;
        if (negated.ptr() != Py_False) Py_RETURN_NONE;
        py::object y = empty_like(x, in);
        if (!y) return nullptr;
        if (!reads(y.ptr(), out) || values_of(out) != int64_t(m) * linear_.at().n || out.dtype.code != in.dtype.code ||
            out.dtype.bits != in.dtype.bits)
            Py_RETURN_NONE;  // somebody watches torch's functions and answered himself
        const auto threads = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(thread_count_.ptr()));
        if (!threads) return nullptr;
        const cpu::Call call{in.data, out.data, m, size_t(linear_.at().k), dtype, int(PyLong_AsLong(threads.ptr()))};
        if (PyErr_Occurred()) return nullptr;
        std::optional<py::gil_scoped_release> release;
        if (double(m) * linear_.at().n * linear_.at().k > 1 << 20) release.emplace();  // some 10 us of one thread
        linear_.run(*kernels_[int(dtype)][m], call);
        release.reset();
        return y.release().ptr();
    }

private:
    static constexpr int most_dims = 8;

    // Whether it is a plain tensor in this process's memory, without gaps.
    bool reads(PyObject* object, dlpack::Tensor& t) const {
        if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != tensor_type_.ptr()) return false;
        if (read_(object, &t)) {
            PyErr_Clear();
            return false;
        }
        t.data = static_cast<char*>(t.data) + t.byte_offset;
        int64_t stride = 1;
        for (int i = t.ndim - 1; t.strides && i >= 0; stride *= t.shape[i--])
            if (t.shape[i] != 1 && t.strides[i] != stride) return false;
        return t.device.type == dlpack::cpu_device && t.data && t.dtype.lanes == 1;
    }

    static int64_t values_of(const dlpack::Tensor& t) {
        return std::accumulate(t.shape, t.shape + t.ndim, int64_t(1), std::multiplies<int64_t>());
    }

    static bool dtype_of(const dlpack::Tensor& t, cpu::Dtype& dtype) {
        const bool bf16 = t.dtype.code == dlpack::bfloat_code && t.dtype.bits == 16;
        const bool fp = t.dtype.code == dlpack::float_code && (t.dtype.bits == 32 || t.dtype.bits == 16);
        dtype = bf16 ? cpu::Dtype::bf16 : t.dtype.bits == 16 ? cpu::Dtype::f16 : cpu::Dtype::f32;
        return bf16 || fp;
    }

    // 0 if x is not [..., k] of 1 to most_rows rows.
    int rows_of(const dlpack::Tensor& x) const {
        if (x.ndim < 1 || x.shape[x.ndim - 1] != linear_.at().k) return 0;
        int64_t m = 1;
        for (int i = 0; i < x.ndim - 1; ++i) {
            m *= x.shape[i];
            if (m < 1 || m > most_rows) return 0;
        }
        return int(m);
    }

    py::object empty_like(PyObject* x, const dlpack::Tensor& in) const {
        std::array<py::object, most_dims> sizes;
        PyObject* arguments[1 + most_dims] = {x};
        for (int i = 0; i < in.ndim; ++i) {
            sizes[i] =
                i + 1 < in.ndim ? py::reinterpret_steal<py::object>(PyLong_FromLongLong(in.shape[i])) : py::object(n_);
            arguments[1 + i] = sizes[i].ptr();
        }
        return py::reinterpret_steal<py::object>(
            PyObject_Vectorcall(new_empty_.ptr(), arguments, 1 + in.ndim, nullptr));
    }

    py::object linear_object_, memory_;
    const Linear& linear_;
    py::object tensor_type_, thread_count_, is_neg_, new_empty_;
    py::int_ n_;
    dlpack::Read read_;
    const cpu::Kernels* kernels_[3][most_rows + 1] = {};
};

// Null where the type has no such API.
dlpack::Read reader_of(const py::object& tensor_type) {
    const py::object capsule = py::getattr(tensor_type, "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
    auto* api = static_cast<const dlpack::Api*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (api && api->major != dlpack::major_version) api = api->previous;
    return api ? api->read : nullptr;
}

// memory: what keeps the addresses in `linear` valid. tensor_type: torch.Tensor. thread_count: torch.get_num_threads.
// None for a torch without DLPack's C API.
py::object few_rows(py::object linear, py::object memory, py::object tensor_type, py::object thread_count) {
    const dlpack::Read read = reader_of(tensor_type);
    if (!read) return py::none();
    return py::cast(std::make_unique<FewRows>(linear, memory, tensor_type, thread_count, read));
}

constexpr const char* capsule_name = "llmfp4_kernels.few_rows";

PyObject* call_few_rows(PyObject* capsule, PyObject* x) {
    try {
        return (*static_cast<const FewRows*>(PyCapsule_GetPointer(capsule, capsule_name)))(x);
    } catch (py::error_already_set& error) { error.restore(); } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) { PyErr_SetString(PyExc_RuntimeError, error.what()); }
    return nullptr;
}

// pybind11's own functions take 0.3 us longer to be called.
PyMethodDef method{"few_rows", call_few_rows, METH_O, "x [..., k] -> y [..., n], or None"};

py::object function_of(py::object few_rows) {
    PyObject* capsule = PyCapsule_New(few_rows.cast<FewRows*>(), capsule_name,
                                      [](PyObject* c) { Py_DECREF(static_cast<PyObject*>(PyCapsule_GetContext(c))); });
    if (!capsule) throw py::error_already_set();
    const auto held = py::reinterpret_steal<py::object>(capsule);
    PyCapsule_SetContext(capsule, few_rows.inc_ref().ptr());
    return py::reinterpret_steal<py::object>(PyCFunction_New(&method, capsule));
}

}  // namespace
}  // namespace llmfp4

void bind_few_rows(py::module_& m) {
    using llmfp4::FewRows;
    py::class_<FewRows>(m, "FewRows")
        .def("add", &FewRows::add, py::arg("kernel"), py::arg("m"), py::arg("dtype"))
        .def_property_readonly_static("most", [](py::object) { return FewRows::most_rows; })
        .def_property_readonly("call", &llmfp4::function_of);
    m.def("few_rows", &llmfp4::few_rows, py::arg("linear"), py::arg("memory"), py::arg("tensor_type"),
          py::arg("thread_count"));
}
