// Divergence and convergence of the lanes of a warp; see fragments.h.
#include "fragments.h"

namespace ptx {

void remove_fragment(Warp& w, int f) { w.fragments[f] = w.fragments[--w.count]; }

void add_fragment(Warp& w, int pc, u32 mask) {
    if (mask) w.fragments[w.count++] = {pc, mask, Fragment::ready};
}

void merge(Warp& w) {
    for (int a = 0; a < w.count; ++a) {
        for (int b = w.count - 1; b > a; --b) {
            Fragment &x = w.fragments[a], &y = w.fragments[b];
            if (x.pc != y.pc || x.state == Fragment::blocked || y.state == Fragment::blocked) continue;
            x.mask |= y.mask;
            x.state = Fragment::ready;
            remove_fragment(w, b);
        }
    }
    if (w.count == 1) w.apart = 0;
}

int pick_fragment(Warp& w) {
    if (w.count == 1) return w.fragments[0].state == Fragment::ready ? 0 : -1;
    ++w.divergent_steps;
    const bool ahead = (++w.apart & 4095) > 3968;
    const vector<Instr>& code = w.block->group->grid->program->code;
    int best = -1;
    for (int f = 0; f < w.count; ++f) {
        if (w.fragments[f].state != Fragment::ready) continue;
        if (best < 0 || (code[w.fragments[f].pc].rank < code[w.fragments[best].pc].rank) != ahead) best = f;
    }
    return best;
}

namespace {

u32 wanted_lanes(Warp& w, const Instr& i, u32 active) {
    switch (i.converge) {
    case Converge::none: return 0;
    case Converge::live: return w.live;
    case Converge::all: return kAll;
    case Converge::mask: break;
    }
    return lanes_in<u32>(w, i.member_mask)[__builtin_ctz(active)] & w.live;
}

void divergence(Warp& w, const Instr& i, u32 here, u32 wanted) {
    u32 missing = wanted & ~here;
    string where = "have exited";
    for (int f = 0; f < w.count; ++f) {
        const Fragment& other = w.fragments[f];
        if (other.mask & missing) where = "are at " + place_of(*w.block->group->grid->program, other.pc);
    }
    char text[64];
    snprintf(text, sizeof text, "lanes 0x%08x are here and lanes 0x%08x ", here, missing);
    fail(w, i, __builtin_ctz(here), "divergence", text + where);
}

}  // namespace

void branch(Warp& w, int f, const Instr& i, u32 taken) {
    Fragment& here = w.fragments[f];
    if (i.flow == Flow::table) {
        const u32* index = lanes_in<u32>(w, i.src[0]);
        const u32 mask = here.mask;
        here.mask &= ~taken;
        here.pc += 1;
        if (!here.mask) remove_fragment(w, f);
        each_lane(taken & mask, [&](int l) {
            if (index[l] >= i.targets.size()) {
                fail(w, i, l, "out of bounds", "branch table has no entry " + std::to_string(index[l]));
            }
            add_fragment(w, i.targets[index[l]], 1u << l);
            if (w.count > 24) merge(w);
        });
        return;
    }
    if (taken == here.mask) {
        here.pc = i.target;
    } else {
        here.pc += 1;
        here.mask &= ~taken;
        add_fragment(w, i.target, taken);
    }
}

bool converged(Warp& w, int f, const Instr& i, u32 active) {
    const u32 wanted = wanted_lanes(w, i, active);
    if ((wanted & ~active) == 0) return true;
    Fragment& here = w.fragments[f];
    const u32 rest = here.mask & ~active;
    if (wanted & ~w.live) divergence(w, i, active, wanted);
    here.mask = active;
    here.state = Fragment::converging;
    add_fragment(w, here.pc + 1, rest);
    return false;
}

void stuck(Warp& w) {
    for (int f = 0; f < w.count; ++f) {
        Fragment& waiting = w.fragments[f];
        if (waiting.state != Fragment::converging) continue;
        const Instr& i = w.block->group->grid->program->code[waiting.pc];
        const u32 wanted = wanted_lanes(w, i, waiting.mask);
        if (wanted & ~waiting.mask) {
            bool blocked = false;  // lanes at a barrier of the block may still come
            for (int o = 0; o < w.count; ++o) {
                blocked |= w.fragments[o].state == Fragment::blocked && (w.fragments[o].mask & wanted);
            }
            if (!blocked || i.converge == Converge::live) divergence(w, i, waiting.mask, wanted);
        } else {
            waiting.state = Fragment::ready;
        }
    }
}

}  // namespace ptx
