// mbarriers: phases of arrivals and of bytes that asynchronous copies have promised.
#pragma once
#include "memory.h"

namespace ptx {

// The mbarrier at an address, or a violation.
Mbarrier& mbarrier_at(Warp& w, const Instr& i, int lane, Space space, u64 at, Place* place = nullptr);

// What completes on it in the present phase bears this id and clock.
Recorder completion(const Grid& grid, const Mbarrier& m);

// Bytes of a copy have arrived.
void complete_bytes(Warp& w, Mbarrier& m, u64 bytes);

}  // namespace ptx
