// Joins of what threads know; see clocks.h.
#include "clocks.h"

#include <algorithm>

namespace ptx {

void Known::merge_foreign(u32 from, const KnownRef& known) {
    if (from == group) {
        merge(*known.get());
        return;
    }
    auto at = std::lower_bound(foreign.begin(), foreign.end(), from,
                               [](const auto& entry, u32 g) { return entry.first < g; });
    if (at == foreign.end() || at->first != from) {
        foreign.insert(at, {from, known});
    } else if (!(at->second == known)) {
        auto* both = new Known();
        both->group = from;
        both->own = at->second->own;
        both->merge(*known.get());
        at->second = KnownRef(both);
    }
}

void Known::merge(const Known& other) {
    if (other.group == group) {
        if (own.size() < other.own.size()) own.resize(other.own.size(), 0);
        for (size_t i = 0; i < other.own.size(); ++i) own[i] = std::max(own[i], other.own[i]);
    } else {
        auto* flat = new Known();  // without its own foreign knowledge, which is merged below
        flat->group = other.group;
        flat->own = other.own;
        merge_foreign(other.group, KnownRef(flat));
    }
    for (const auto& [from, known] : other.foreign) merge_foreign(from, known);
}

u32 Known::foreign_at(u32 from, u32 id) const {
    auto at = std::lower_bound(foreign.begin(), foreign.end(), from,
                               [](const auto& entry, u32 g) { return entry.first < g; });
    return at == foreign.end() || at->first != from ? 0 : at->second->at(id);
}

Known& Joiner::joined() {
    if (!joined_) {
        joined_ = KnownRef(new Known());
        joined_->group = group_;
    }
    return *joined_.get();
}

void Joiner::add(const KnownRef& known) {
    if (!known || std::find(merged_.begin(), merged_.end(), known) != merged_.end()) return;
    joined().merge(*known.get());
    if (merged_.size() == 8) merged_.erase(merged_.begin());
    merged_.push_back(known);
}

void Joiner::add(const LaneClock& lane, u32 threads) {
    add(lane.known);
    Known& all = joined();
    all.set(lane.id, lane.clock);
    for (u32 kind = 0; kind < 4; ++kind) {
        const u32 owner = kind + 1 == kWgmma ? lane.id / kLanes * kLanes : lane.id;
        if (lane.done[kind]) all.set((kind + 1) * threads + owner, lane.done[kind]);
    }
}

void Joiner::add_actor(u32 id, u32 clock) { joined().set(id, clock); }

KnownRef Joiner::take() {
    merged_.clear();
    joined();
    return std::move(joined_);
}

}  // namespace ptx
