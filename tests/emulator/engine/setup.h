// Making blocks and warps, and accounts at the end of a launch.
#pragma once
#include "machine.h"

namespace ptx {

u32 begin_launch(Grid& grid);                      // number of groups
std::unique_ptr<Group> make_group(Grid& grid, u32 index);
void end_group(Grid& grid, Group& group);
void end_launch(Grid& grid);

// In programs with wgmma: registers in flight must not be touched, and writes are noted for wgmma.fence.
void watch_registers(Warp& w, const Instr& i);

}  // namespace ptx
