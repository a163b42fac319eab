// What must be over when the last thread of a block exits.
#pragma once
#include "memory.h"

namespace ptx {

void note_exit(Warp& w, u32 mask);

// A violation if asynchronous work or another block of the cluster may still use the block's shared
// memory, or if the warps of a warpgroup have not executed the same wgmma.
void check_end(Warp& w, const Instr& i, int lane);

}  // namespace ptx
