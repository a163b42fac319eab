// The end of a block; see ending.h.
#include "ending.h"

namespace ptx {
namespace {

bool matters(const Grid& grid) {
    return grid.options.check && (grid.program->has_async || grid.blocks_per_group > 1);
}

void check_warpgroups(Warp& w, const Instr& i, int lane) {
    const auto& warps = w.block->warps;
    for (size_t k = 0; k < warps.size(); ++k) {
        if (warps[k]->wgmmas == warps[k / 4 * 4]->wgmmas) continue;
        fail(w, i, lane, "divergence", "warps " + std::to_string(k / 4 * 4) + " and " + std::to_string(k) +
             " of a warpgroup have not executed the same wgmma");
    }
}

}  // namespace

// What a thread still has on its way by cp.async lands before the block ends; bulk copies and wgmma may not.
void note_exit(Warp& w, u32 mask) {
    const Grid& grid = *w.block->group->grid;
    if (!matters(grid)) return;
    const u32 threads = grid.threads_per_group();
    each_lane(mask, [&](int l) {
        w.block->ended.add(w.lanes[l], threads);
        w.block->ended.add_actor(kCpAsync * threads + w.lanes[l].id, kClockMask);
    });
}

void check_end(Warp& w, const Instr& i, int lane) {
    Block& block = *w.block;
    Group& group = *block.group;
    const Grid& grid = *group.grid;
    if (!matters(grid)) return;
    check_warpgroups(w, i, lane);
    LaneClock all = w.lanes[lane];
    all.known = block.ended.take();
    const u32 base = group.index * grid.ids_per_group();
    const Agent me{&all, grid.threads_per_group(), base, grid.ids_per_group(), grid.threads_per_block,
                   base + all.id, all.clock, i.pc, base + all.id, false};
    const Conflict c = group.races.pending(me, block.shared_cells.data(), block.shared_cells.size());
    if (!c.kind) return;
    fail(w, i, lane, "race", "the block ends while its shared memory is still " +
         string(c.kind[0] == 'w' ? "written by " : "read by ") + thread_name(grid, c.other) + " at " +
         place_of(*grid.program, c.other_pc));
}

}  // namespace ptx
