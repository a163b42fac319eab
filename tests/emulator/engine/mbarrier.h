// mbarriers: phases of arrivals and of bytes that asynchronous copies have promised.
#pragma once
#include "memory.h"

namespace ptx {

// The mbarrier at an address, or a violation.
Mbarrier& mbarrier_at(Warp& w, const Instr& i, int lane, Space space, u64 at, Place* place = nullptr);

// A violation unless bulk copies of this lane can see that it has been initialised.
void need_published(Warp& w, const Instr& i, int lane, const Mbarrier& m);

// What completes on it in the present phase bears this id and clock.
Recorder completion(const Grid& grid, const Mbarrier& m);

// Bytes of a copy arrive: at once, in random order later.
void complete_bytes(Warp& w, Mbarrier& m, u64 bytes);

// Bytes that were late arrive, some of them or all; false if there were none.
bool deliver(Group& group, bool all);

}  // namespace ptx
