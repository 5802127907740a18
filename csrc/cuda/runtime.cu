// The CUDA runtime's launcher.
#include <cuda_runtime.h>

#include "launch.h"

namespace llmfp4::cuda {

static int launch_on_device(const Launch* launch, void** args) {
    constexpr uint32_t always_allowed = 47 << 10;  // of 48 KB, which what kernels declare themselves counts towards
    if (const auto code = cudaSetDevice(launch->device)) return code;
    if (launch->shared > always_allowed)
        if (const auto code = cudaFuncSetAttribute(launch->function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   int(launch->shared)))
            return code;
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(launch->grid[0], launch->grid[1], launch->grid[2]);
    config.blockDim = dim3(launch->block);
    config.dynamicSmemBytes = launch->shared;
    config.stream = static_cast<cudaStream_t>(launch->stream);
    config.attrs = &overlap;
    config.numAttrs = launch->overlap ? 1 : 0;
    return cudaLaunchKernelExC(&config, launch->function, args);
}

static Launcher current = launch_on_device;

Launcher launcher() { return current; }

Launcher set_launcher(Launcher next) {
    const Launcher before = current;
    current = next ? next : launch_on_device;
    return before;
}

const char* error_text(int code) { return cudaGetErrorString(cudaError_t(code)); }

}  // namespace llmfp4::cuda
