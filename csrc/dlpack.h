// The part of DLPack's C exchange API that reads a tensor (dlpack.h, version 1.2 and later): a framework's tensor type
// has it as `__dlpack_c_exchange_api__`, a capsule called "dlpack_exchange_api".
#pragma once
#include <cstdint>

namespace llmfp4::dlpack {

constexpr uint32_t major_version = 1;
constexpr int32_t cpu_device = 1;
constexpr uint8_t float_code = 2, bfloat_code = 4;

struct Device {
    int32_t type, id;
};

struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    const int64_t* shape;
    const int64_t* strides;  // in elements; null: contiguous
    uint64_t byte_offset;
};

using Read = int (*)(void* py_object, Tensor* out);  // without ownership; -1 with a Python exception

struct Api {
    uint32_t major, minor;
    const Api* previous;
    void* allocate;
    void* own;
    void* give_back;
    Read read;  // may be null
    void* stream;
};

}  // namespace llmfp4::dlpack
