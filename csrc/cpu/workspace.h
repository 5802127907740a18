// Scratch memory that grows and is kept per calling thread: a decode step must not allocate.
#pragma once
#include <cstddef>

namespace llmfp4::cpu {

// At least `bytes`, aligned to 64, valid until the same thread asks for the same slot again.
void* workspace(int slot, size_t bytes);

enum WorkspaceSlot : int { slot_rows, slot_sums, slot_panel, slot_accumulators, slots };

}  // namespace llmfp4::cpu
