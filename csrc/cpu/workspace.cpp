#include "workspace.h"

#include <cstdlib>
#include <new>

namespace llmfp4::cpu {
namespace {

struct Scratch {
    void* memory[slots] = {};
    size_t size[slots] = {};
    ~Scratch() {
        for (void* m : memory) std::free(m);
    }
};

}  // namespace

void* workspace(int slot, size_t bytes) {
    thread_local Scratch scratch;
    if (scratch.size[slot] < bytes) {
        std::free(scratch.memory[slot]);
        const size_t rounded = (bytes + 4095) / 4096 * 4096;
        scratch.memory[slot] = std::aligned_alloc(64, rounded);
        scratch.size[slot] = scratch.memory[slot] ? rounded : 0;
        if (!scratch.memory[slot]) throw std::bad_alloc();
    }
    return scratch.memory[slot];
}

}  // namespace llmfp4::cpu
