// Happens-before races; see race.h. The scheme is FastTrack's, with sets of readers shared between words.
#include "race.h"

#include <cstring>

namespace ptx {

bool RaceChecker::ordered(const Agent& me, u32 other, u32 stamp) {
    const LaneClock& lane = *me.lane;
    const u32 clock = stamp & kClockMask;
    const u32 id = other - me.base;
    if (id >= me.span) return lane.known->foreign_at(other / me.span, other % me.span) >= clock;
    if (id == lane.id) return true;
    if (id >= me.threads && id < 5 * me.threads) {
        const u32 kind = id / me.threads;
        const u32 owner = kind == kWgmma ? lane.id / kLanes * kLanes : lane.id;  // engine of the warp, or of the lane
        if (id % me.threads == owner && lane.done[kind - 1] >= clock) return true;
    }
    return lane.known->at(id) >= clock;
}

namespace {

// Two strong accesses do not race if each is within the scope of the other.
bool both_strong(const Agent& me, u32 other, u32 stamp) {
    if (!(me.stamp & stamp & kStrong)) return false;
    const u32 scopes = me.stamp | stamp, mine = me.id - me.base, theirs = other - me.base;
    if (theirs >= me.span) return !(scopes & (kBlockScope | kClusterScope));
    return !(scopes & kBlockScope) || mine % me.threads / me.block == theirs % me.threads / me.block;
}

// A write of the generic proxy is seen by the async proxy behind a fence.proxy.async only.
bool proxied(const Agent& me, const Cell& cell) {
    const u32 id = cell.writer - me.base;
    if (id >= 2 * me.threads) return true;  // written by an asynchronous engine, or by another group
    return me.lane->proxied && me.lane->proxied->at(id) >= (cell.written & kClockMask);
}

}  // namespace

Conflict RaceChecker::unordered_reader(const Agent& me, const Cell& cell) {
    if (cell.read != kReadSet) {
        bool fine = ordered(me, cell.reader, cell.read) || both_strong(me, cell.reader, cell.read);
        return fine ? Conflict{} : Conflict{"read", cell.reader, cell.read_pc};
    }
    for (u32 at = cell.reader; at; at = readers_[at].next) {
        const Reader& r = readers_[at];
        if (!ordered(me, r.id, r.stamp) && !both_strong(me, r.id, r.stamp)) return {"read", r.id, r.pc};
    }
    return {};
}

RaceChecker::Transition& RaceChecker::transition(const Transition& key) {
    if (transition_count_ * 2 > transitions_.size()) {
        vector<Transition> old(transitions_.size() * 4);
        old.swap(transitions_);
        for (const Transition& t : old) {
            if (t.stamp) transition(t) = t;
        }
    }
    const u64 hash = (u64(key.set) << 32 | key.id) * 0x9e3779b97f4a7c15ull + key.stamp * 0xc2b2ae3d27d4eb4full;
    const size_t mask = transitions_.size() - 1;
    size_t at = (hash ^ hash >> 29) & mask;
    while (transitions_[at].stamp && !transitions_[at].same(key)) at = (at + 1) & mask;
    return transitions_[at];
}

u32 RaceChecker::add_to_set(const Agent& me, u32 set) {
    const Transition key{set, me.id, me.stamp, 0};
    if (key.same(last_)) return last_.result;
    Transition& known = transition(key);
    if (!known.stamp) {
        // keep those not ordered before me; a long tail is kept as it is
        u32 kept[32], count = 0, rest = set;
        bool present = false;
        while (rest && count < 32) {
            const Reader& r = readers_[rest];
            present |= r.id == me.id && r.stamp == me.stamp;
            if (!ordered(me, r.id, r.stamp)) kept[count++] = rest;
            rest = r.next;
        }
        u32 result = set;
        if (!present) {
            result = rest;
            while (count) {
                Reader copy = readers_[kept[--count]];
                copy.next = result;
                readers_.push_back(copy);
                result = u32(readers_.size()) - 1;
            }
            readers_.push_back({me.id, me.stamp, me.pc, result});
            result = u32(readers_.size()) - 1;
        }
        known = {set, me.id, me.stamp, result};
        ++transition_count_;
    }
    last_ = known;
    return last_.result;
}

void RaceChecker::add_reader(const Agent& me, Cell& cell) {
    if (cell.read == kReadSet) {
        cell.reader = add_to_set(me, cell.reader);
    } else if (!cell.read || cell.reader == me.id || ordered(me, cell.reader, cell.read)) {
        cell.reader = me.id;
        cell.read = me.stamp;
        cell.read_pc = me.pc;
    } else {
        Agent first = me;  // a set of one, to which I am added
        first.id = cell.reader;
        first.stamp = cell.read;
        first.pc = cell.read_pc;
        cell.reader = add_to_set(me, add_to_set(first, 0));
        cell.read = kReadSet;
    }
}

Conflict RaceChecker::word(const Agent& me, Cell& cell, Access kind, bool equal) {
    if (cell.written && cell.writer != me.self && !ordered(me, cell.writer, cell.written) &&
        !both_strong(me, cell.writer, cell.written)) {
        if (!equal || kind != Access::write) return {"write", cell.writer, cell.write_pc};
        ++benign;
    }
    if (me.async_proxy && cell.written && !proxied(me, cell)) {
        return {"proxy", cell.writer, cell.write_pc};
    }
    if (kind == Access::read) {
        if (cell.reader != me.id || cell.read != me.stamp) add_reader(me, cell);
        return {};
    }
    if (cell.read) {
        Conflict conflict = unordered_reader(me, cell);
        if (conflict.kind) return conflict;
    }
    cell = {me.id, me.stamp, 0, 0, me.pc, 0};
    return {};
}

Conflict RaceChecker::pending(const Agent& me, const Cell* cells, u64 words) {
    auto check = [&](const Cell& cell) -> Conflict {
        if (cell.written && !ordered(me, cell.writer, cell.written)) return {"write", cell.writer, cell.write_pc};
        return cell.read ? unordered_reader(me, cell) : Conflict{};
    };
    for (u64 k = 0; k < words; ++k) {
        if (k && !memcmp(&cells[k], &cells[k - 1], sizeof(Cell))) continue;
        const bool whole = cells[k].read != kSplit;
        for (u32 b = 0; b < (whole ? 1 : 4); ++b) {
            Conflict found = check(whole ? cells[k] : bytes_[cells[k].reader * 4 + b]);
            if (found.kind) return found;
        }
    }
    return {};
}

void RaceChecker::split(Cell& cell) {
    const Cell whole = cell;
    u32 at = u32(bytes_.size() / 4);
    if (free_.empty()) {
        bytes_.resize(bytes_.size() + 4);
    } else {
        at = free_.back();
        free_.pop_back();
    }
    for (u32 b = 0; b < 4; ++b) bytes_[at * 4 + b] = whole;
    cell.reader = at;
    cell.read = kSplit;
}

void RaceChecker::release(Cell* cells, u64 words) {
    for (u64 i = 0; i < words; ++i) {
        if (cells[i].read == kSplit) free_.push_back(cells[i].reader);
    }
}

Conflict RaceChecker::access(const Agent& me, Cell* cells, u64 offset, u32 bytes, Access kind, bool equal) {
    u64 first = offset / 4;
    if (bytes % 4 == 0) {
        Cell before{}, after{};  // of the last word: neighbours mostly share their history
        bool known = false;
        for (u64 i = first; i < first + bytes / 4; ++i) {
            Cell& cell = cells[i];
            if (known && !memcmp(&cell, &before, sizeof cell)) {
                cell = after;
                continue;
            }
            if (cell.read != kSplit) {
                before = cell;
                Conflict conflict = word(me, cell, kind, equal);
                if (conflict.kind) return conflict;
                after = cell;
                known = true;
                continue;
            }
            Cell* parts = &bytes_[cell.reader * 4];
            for (int b = 0; b < 4; ++b) {
                Conflict conflict = word(me, parts[b], kind, equal);
                if (conflict.kind) return conflict;
            }
            if (kind != Access::read) {  // whole again
                free_.push_back(cell.reader);
                cell = parts[0];
            }
        }
        return {};
    }
    Cell& cell = cells[first];
    if (cell.read != kSplit) split(cell);
    for (u32 b = offset % 4; b < offset % 4 + bytes; ++b) {
        Conflict conflict = word(me, bytes_[cell.reader * 4 + b], kind, equal);
        if (conflict.kind) return conflict;
    }
    return {};
}

}  // namespace ptx
