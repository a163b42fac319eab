// Running a grid: which group, which warp, which lanes come next.
#include <algorithm>

#include "ending.h"
#include "fragments.h"
#include "mbarrier.h"
#include "setup.h"
#include "sync.h"

namespace ptx {
namespace {

constexpr u64 kFixedQuantum = 64, kGroupSlice = 1 << 17;

void leave(Warp& w, const Instr& i, u32 mask) {
    note_exit(w, mask);
    if (w.block->live_threads == u32(__builtin_popcount(mask))) check_end(w, i, __builtin_ctz(mask));
    w.live &= ~mask;
    w.block->live_threads -= u32(__builtin_popcount(mask));
    ++w.block->group->grid->progress;
    settle_barriers(*w.block);
}

// One instruction of the fragment; false if the warp cannot go on.
bool step(Warp& w, Grid& grid) {
    int f = pick_fragment(w);
    if (f < 0) {
        stuck(w);
        f = pick_fragment(w);
        if (f < 0) return false;
    }
    Fragment& here = w.fragments[f];
    const Instr& i = grid.program->code[here.pc];
    const u32 active = i.guard.exists ? here.mask & predicate(w, i.guard) : here.mask;
    ++grid.program->executed[i.pc];
    ++grid.issued;
    if (i.flow == Flow::plain) {
        if (!active) {
            ++here.pc;
        } else if (i.converge != Converge::none && !converged(w, f, i, active)) {
            --grid.program->executed[i.pc];
        } else {
            if (!w.written_at.empty()) watch_registers(w, i);
            i.run(w, i, active);
            Fragment& now = w.fragments[f];
            ++now.pc;
            if (w.at_barrier) {
                w.at_barrier = false;
                const u32 rest = w.blocked ? now.mask & ~w.blocked : 0;
                if (w.blocked) {
                    now.mask = w.blocked;
                    now.state = Fragment::blocked;
                    w.blocked = 0;
                }
                add_fragment(w, now.pc, rest);
                settle_barriers(*w.block);
            }
        }
    } else if (i.flow == Flow::exit) {
        const u32 rest = here.mask & ~active;
        if (rest) {
            here.mask = rest;
            ++here.pc;
        } else {
            remove_fragment(w, f);
        }
        if (active) leave(w, i, active);
    } else {
        branch(w, f, i, active);
    }
    if (w.count > 1) merge(w);
    return w.count > 0;
}

u64 quantum(Grid& grid) {
    switch (grid.options.order) {
    case 1: return 1 + grid.random() % 64;
    case 2: return 1 << 16;
    default: return kFixedQuantum;
    }
}

bool finished(const Group& group) {
    for (const auto& block : group.blocks) {
        if (block->live_threads) return false;
    }
    return true;
}

void over_budget(Grid& grid, Warp& w) {
    const Instr& i = grid.program->code[w.fragments[0].pc];
    fail(w, i, __builtin_ctz(w.fragments[0].mask), "budget", "more than " + std::to_string(grid.options.budget) +
         " warp instructions: an endless loop, or a budget too small");
}

// Runs the warps of the group in turn; true if any of them moved.
bool turn(Grid& grid, vector<Warp*>& warps) {
    if (grid.options.order) std::shuffle(warps.begin(), warps.end(), grid.random);
    bool moved = false;
    for (Warp* w : warps) {
        u64 left = quantum(grid);
        while (left-- && w->count) {
            const u64 before = grid.issued;
            if (!step(*w, grid)) {
                moved |= grid.issued != before;
                break;
            }
            moved |= grid.issued != before;
            if (w->yield) {
                w->yield = false;
                break;
            }
            if (grid.issued > grid.options.budget) over_budget(grid, *w);
        }
    }
    return moved;
}

[[noreturn]] void deadlock(Grid& grid, Group& group) {
    for (auto& block : group.blocks) {
        for (auto& w : block->warps) {
            if (!w->count) continue;
            const Fragment& at = w->fragments[0];
            const int pc = std::max(0, at.pc - (at.state == Fragment::blocked));
            const Instr& i = grid.program->code[pc];
            fail(*w, i, __builtin_ctz(at.mask), "deadlock", "nobody can go on; " +
                 (grid.spinning.empty() ? string("this lane waits here") : "the last wait was for " + grid.spinning));
        }
    }
    throw Violation("deadlock");
}

struct Resident {
    std::unique_ptr<Group> group;
    vector<Warp*> warps;
};

Resident admit(Grid& grid, u32 number) {
    Resident r;
    r.group = make_group(grid, number);
    for (auto& block : r.group->blocks) {
        for (auto& w : block->warps) r.warps.push_back(w.get());
    }
    return r;
}

}  // namespace

// Groups run one after another, as far as they can: a group that waits for another, or that runs for
// long, lets the next one in beside it.
void run_grid(Grid& grid) {
    const u32 groups = begin_launch(grid);
    vector<u32> order(groups);
    for (u32 g = 0; g < groups; ++g) order[g] = g;
    if (grid.options.order) std::shuffle(order.begin(), order.end(), grid.random);
    vector<Resident> resident;
    u32 next = 0;
    u64 idle_turns = 0;
    const size_t most = grid.options.order == 1 ? 4 : 1;
    size_t room = most;
    while (next < groups || !resident.empty()) {
        while (resident.size() < room && next < groups) resident.push_back(admit(grid, order[next++]));
        const u64 progress = grid.progress;
        bool moved = false;
        for (size_t r = 0; r < resident.size();) {
            Resident& now = resident[r];
            const u64 until = grid.issued + (resident.size() > 1 && most > 1 ? 1 : kGroupSlice);
            const u64 before = grid.progress;
            u64 still = 0;
            do {
                if (!now.group->late.empty()) deliver(*now.group, false);
                bool went = turn(grid, now.warps);
                moved |= went;
                still = grid.progress == before ? still + 1 : 0;
                if (!went || still > 64) break;
            } while (!finished(*now.group) && grid.issued < until);
            if (finished(*now.group)) {
                end_group(grid, *now.group);
                resident.erase(resident.begin() + r);
                room = most;
            } else {
                ++r;
            }
        }
        if (grid.progress != progress) {
            idle_turns = 0;
            continue;
        }
        bool late = false;
        for (Resident& r : resident) late |= deliver(*r.group, true);
        if (late) continue;
        // nothing has changed: let another group in, or give up
        if (next < groups) room = std::min<size_t>(room + 1, 1024);
        else if (!moved || (!grid.spinning.empty() && ++idle_turns > 200)) deadlock(grid, *resident[0].group);
    }
    end_launch(grid);
}

}  // namespace ptx
