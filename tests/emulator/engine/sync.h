// Acquire and release through memory, and barriers.
#pragma once
#include "memory.h"

namespace ptx {

// A strong read hears what was released at its addresses; a strong write releases.
void acquire_from(Warp& w, const Instr& i, const Request& r);
void release_to(Warp& w, const Instr& i, const Request& r);

// All that a lane knows, its own past included.
KnownRef snapshot(const Warp& w, int lane);

// The lane learns what others knew.
void learn(Warp& w, int lane, const KnownRef& known, const KnownRef& proxied = {});

// Wake those who wait if nobody is missing any more; called when threads exit, too.
void settle_barriers(Block& block);

}  // namespace ptx
