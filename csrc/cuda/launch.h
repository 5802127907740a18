// How kernels are started. Kernels know their geometry, a Launcher starts them: the CUDA runtime's, or another one that
// is given the same grid, block, shared memory and parameter block (tests run the kernels' PTX with it).
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace llmfp4::cuda {

struct Launch {
    const char* name;      // of the kernel in PTX
    const void* function;  // its host function
    uint32_t grid[3];
    uint32_t block;    // threads, all along x
    uint32_t shared;   // bytes of dynamic shared memory
    uint32_t overlap;  // start while the kernel before is still running; this one waits for it (sm_90)
    int32_t device;
    void* stream;
};

// args point at the kernel's parameters. Returns 0 or an error code of the launcher.
using Launcher = int (*)(const Launch*, void** args);

// The launcher in use; the CUDA runtime's at first.
Launcher launcher();
// Puts another in its place (null: the CUDA runtime's); returns the one before.
Launcher set_launcher(Launcher);
// The CUDA runtime's name for an error code.
const char* error_text(int code);

// Where a call runs.
struct Queue {
    int device;
    bool overlap;  // the device can start a kernel before the one before it has ended
    void* stream;
};

// Starts `kernel(parameters)`. Throws std::runtime_error with the kernel's name and the error.
template <class Parameters>
inline void start(const char* name, void (*kernel)(Parameters), uint32_t x, uint32_t y, uint32_t z, uint32_t block,
                  uint32_t shared, bool overlap, const Queue& queue, Parameters parameters) {
    const Launch launch{name,         reinterpret_cast<const void*>(kernel),
                        {x, y, z},    block,
                        shared,       overlap && queue.overlap,
                        queue.device, queue.stream};
    void* args[] = {&parameters};
    if (const int code = launcher()(&launch, args))
        throw std::runtime_error("kernel " + std::string(name) + " (grid " + std::to_string(x) + " x " +
                                 std::to_string(y) + " x " + std::to_string(z) + ", " + std::to_string(block) +
                                 " threads, " + std::to_string(shared) +
                                 " bytes of shared memory) did not start: " + error_text(code));
}

// Throws std::invalid_argument unless the address is a multiple of `alignment`.
inline void require_aligned(const char* what, const void* address, uintptr_t alignment) {
    if (reinterpret_cast<uintptr_t>(address) % alignment)
        throw std::invalid_argument(std::string(what) + " lie at an address that is no multiple of " +
                                    std::to_string(alignment) + " bytes");
}

}  // namespace llmfp4::cuda
