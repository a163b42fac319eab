// Fences, acquire and release through memory.
#include "sync.h"

#include <algorithm>

namespace ptx {

KnownRef snapshot(const Warp& w, int lane) {
    const Group& group = *w.block->group;
    Joiner joiner(group.index);
    joiner.add(w.lanes[lane], group.grid->threads_per_group());
    return joiner.take();
}

void learn(Warp& w, int lane, const KnownRef& known, const KnownRef& proxied) {
    LaneClock& clock = w.lanes[lane];
    auto merged = [&](const KnownRef& mine, const KnownRef& theirs) {
        Joiner joiner(w.block->group->index);
        joiner.add(mine);
        joiner.add(theirs);
        return joiner.take();
    };
    if (known && !(known == clock.known)) clock.known = merged(clock.known, known);
    if (proxied && !(proxied == clock.proxied)) {
        clock.proxied = clock.proxied ? merged(clock.proxied, proxied) : proxied;
    }
    ++clock.clock;
}

namespace {

enum Level : int { kBlockLevel, kClusterLevel, kDeviceLevel };

Level level_of(Scope scope) {
    return scope == Scope::cta ? kBlockLevel : scope == Scope::cluster ? kClusterLevel : kDeviceLevel;
}

std::map<u64, SyncVariable>& variables(Warp& w, const Place& p) {
    return p.space == Space::shared ? p.owner->syncs : w.block->group->grid->syncs;
}

void hear(Warp& w, int lane, const SyncVariable& v, Order order, Scope scope) {
    LaneClock& clock = w.lanes[lane];
    const Level mine = level_of(scope);
    for (int level : {kBlockLevel, kClusterLevel, kDeviceLevel}) {
        const bool same_block = v.block[level] == w.block->linear;
        const bool same_cluster = v.group[level] == w.block->group->index;
        const int least = same_block ? kBlockLevel : same_cluster ? kClusterLevel : kDeviceLevel;
        const bool reaches = std::min<int>(level, mine) >= least;
        if (!v.released[level] || !reaches) continue;
        if (order == Order::acquire || order == Order::acq_rel) {
            learn(w, lane, v.released[level]);
        } else {
            Joiner joiner(w.block->group->index);
            joiner.add(clock.heard[level]);
            joiner.add(v.released[level]);
            clock.heard[level] = joiner.take();
        }
    }
}

void release(Warp& w, int lane, std::map<u64, SyncVariable>& table, u64 key, const Instr& i, bool update) {
    LaneClock& clock = w.lanes[lane];
    const Level level = level_of(i.scope);
    const bool own = i.order == Order::release || i.order == Order::acq_rel;
    const KnownRef what = own ? snapshot(w, lane) : clock.fenced[level];
    if (own) ++clock.clock;
    auto at = table.find(key);
    if (!what) {
        if (at != table.end() && !update) table.erase(at);  // a plain value in its place carries nothing
        return;
    }
    SyncVariable& v = at == table.end() ? table[key] : at->second;
    if (!update) v = {};
    const u32 group = w.block->group->index;
    const bool others = level == kBlockLevel ? v.block[level] != w.block->linear : v.group[level] != group;
    if (level != kDeviceLevel && others) v.released[level] = {};
    Joiner joiner(w.block->group->index);
    joiner.add(v.released[level]);
    joiner.add(what);
    v.released[level] = joiner.take();
    v.block[level] = w.block->linear;
    v.group[level] = group;
}

template <class F>
void each_place(Warp& w, const Request& r, F f) {
    each_lane(r.mask, [&](int l) {
        const Place& p = r.place[l];
        if (p.shadow) f(l, variables(w, p), p.space == Space::shared ? p.offset : u64(p.host));
    });
}

}  // namespace

void acquire_from(Warp& w, const Instr& i, const Request& r) {
    if (!w.block->group->grid->options.check) return;
    each_place(w, r, [&](int l, std::map<u64, SyncVariable>& table, u64 key) {
        auto at = table.find(key);
        if (at != table.end()) hear(w, l, at->second, i.order, i.scope);
    });
}

void release_to(Warp& w, const Instr& i, const Request& r) {
    if (!w.block->group->grid->options.check) return;
    each_place(w, r, [&](int l, std::map<u64, SyncVariable>& table, u64 key) {
        release(w, l, table, key, i, r.kind == Access::update);
    });
}

namespace {

void fence(Warp& w, const Instr& i, u32 m) {
    if (!w.block->group->grid->options.check) return;
    each_lane(m, [&](int l) {
        LaneClock& clock = w.lanes[l];
        const Level level = level_of(i.scope);
        for (int k = 0; k <= level; ++k) {
            if (clock.heard[k]) learn(w, l, clock.heard[k]);
            clock.heard[k] = {};
        }
        const KnownRef now = snapshot(w, l);
        for (int k = 0; k <= level; ++k) clock.fenced[k] = now;
        ++clock.clock;
    });
}

// Lanes of a warp share the result: what another lane fenced still has to be ordered before a use of it.
void fence_proxy(Warp& w, const Instr&, u32 m) {
    const Group& group = *w.block->group;
    Joiner joiner(group.index);
    each_lane(m, [&](int l) {
        joiner.add(w.lanes[l].proxied);
        joiner.add(w.lanes[l], group.grid->threads_per_group());
    });
    const KnownRef now = joiner.take();
    each_lane(m, [&](int l) {
        w.lanes[l].proxied = now;
        ++w.lanes[l].clock;
    });
}

void fence_tensormap(Warp& w, const Instr&, u32 m) {
    each_lane(m, [&](int l) { w.lanes[l].mapped = snapshot(w, l); });
}

// The mbarriers these lanes have initialised become visible to bulk copies and to the cluster.
void fence_mbarriers(Warp& w, const Instr&, u32 m) {
    each_lane(m, [&](int l) {
        for (auto& [at, barrier] : w.block->mbarriers) barrier.published |= barrier.creator == w.lanes[l].id;
    });
}

void nothing(Warp&, const Instr&, u32) {}

void pause(Warp& w, const Instr&, u32) { w.yield = true; }

}  // namespace

bool decode_barrier(Decoder& d, const Statement& st, Instr& i);

bool decode_sync(Decoder& d, const Statement& st, Instr& i) {
    const string& base = st.op[0];
    if (base == "bar" || base == "barrier") return decode_barrier(d, st, i);
    if (base == "membar" || base == "fence") {
        i.scope = scope_of(st, Scope::sys);
        i.run = has(st, "proxy") ? (has(st, "async") || has(st, "async::generic") ? fence_proxy : nothing) : fence;
        for (size_t k = 1; k < st.op.size(); ++k) {
            if (st.op[k].rfind("async", 0) == 0) i.run = fence_proxy;
            if (st.op[k].rfind("tensormap", 0) == 0 && has(st, "acquire")) i.run = fence_tensormap;
            if (st.op[k].rfind("mbarrier_init", 0) == 0) i.run = fence_mbarriers;
        }
        return true;
    }
    // Hints, and what only concerns the machine's resources.
    for (const char* hint : {"prefetch", "prefetchu", "discard", "applypriority", "griddepcontrol", "setmaxnreg",
                             "pmevent"}) {
        if (base == hint) i.run = nothing;
    }
    if (base == "setmaxnreg") i.converge = Converge::live;
    if (base == "nanosleep") i.run = pause;
    return i.run != nullptr;
}

}  // namespace ptx
