// What other families need of cp.async.
#pragma once
#include "memory.h"

namespace ptx {

void land_all(Warp& w, int lane);  // for cp.async.mbarrier.arrive

}  // namespace ptx
