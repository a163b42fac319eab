// Addresses to places; bounds, alignment, initialised bytes, races. See memory.h.
#include "memory.h"

#include <algorithm>

namespace ptx {

void addresses(const Warp& w, const Instr& i, int slot, u32 mask, u64* at) {
    const Operand& base = i.src[slot];
    if (base.width == 8) {
        const u64* p = lanes_in<u64>(w, base);
        each_lane(mask, [&](int l) { at[l] = p[l] + u64(i.offset); });
    } else {
        const u32* p = lanes_in<u32>(w, base);
        each_lane(mask, [&](int l) { at[l] = u32(p[l] + u32(i.offset)); });
    }
}

namespace {

const Tensor* tensor_at(const Grid& grid, u64 at, u32 bytes) {
    const vector<Tensor>& list = grid.tensors;
    static thread_local size_t hint = 0;
    if (hint < list.size() && at >= list[hint].lo && at + bytes <= list[hint].hi) return &list[hint];
    auto next = std::upper_bound(list.begin(), list.end(), at, [](u64 a, const Tensor& t) { return a < t.lo; });
    while (next != list.begin()) {
        --next;
        if (at + bytes <= next->hi) {
            hint = size_t(next - list.begin());
            return &*next;
        }
        if (grid.regions[next->region].hi <= at) break;
    }
    return nullptr;
}

string hex(u64 value) {
    char text[32];
    snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
    return text;
}

// "x[12] (byte 48 of 64)", or how far beside the nearest tensor.
string tensor_name(const Grid& grid, u64 at) {
    const Tensor* best = nullptr;
    u64 distance = ~0ull;
    for (const Tensor& t : grid.tensors) {
        u64 away = at < t.lo ? t.lo - at : at >= t.hi ? at - t.hi + 1 : 0;
        if (away < distance) {
            distance = away;
            best = &t;
        }
    }
    if (!best || distance > (1ull << 40)) return "address " + hex(at);
    i64 byte = i64(at - best->lo);
    const i64 size = best->element, index = byte / size - (byte < 0 && byte % size);
    return best->name + "[" + std::to_string(index) + "], byte " + std::to_string(byte) + " of " +
           std::to_string(best->hi - best->lo);
}

string shared_name(const Program& program, const Options& options, u64 offset) {
    if (program.has_dynamic && offset >= program.dynamic_offset()) {
        u64 byte = offset - program.dynamic_offset();
        return "dynamic shared memory, byte " + std::to_string(byte) + " of " + std::to_string(options.dynamic_shared);
    }
    for (auto s = program.shared.rbegin(); s != program.shared.rend(); ++s) {
        if (offset >= s->offset) {
            return "shared " + s->name + ", byte " + std::to_string(offset - s->offset) + " of " +
                   std::to_string(s->bytes);
        }
    }
    return "shared address " + hex(offset);
}

bool in_shared(const Program& program, const Options& options, u64 offset, u32 bytes) {
    u64 dynamic = program.dynamic_offset();
    if (program.has_dynamic && offset >= dynamic) return offset + bytes <= dynamic + options.dynamic_shared;
    for (const SharedSymbol& s : program.shared) {
        if (offset >= s.offset && offset + bytes <= s.offset + s.bytes) return true;
    }
    return false;
}

string wrong(const char* what, u32 bytes, const string& where) {
    return string(what) + " of " + std::to_string(bytes) + " bytes at " + where;
}

Place shared_place(Warp& w, const Instr& i, int lane, u64 at, u32 bytes, const char* what) {
    const u64 rank = at >> kRankShift, offset = at & ((1u << kRankShift) - 1);
    Group& group = *w.block->group;
    const Grid& grid = *group.grid;
    if (rank > group.blocks.size()) {
        fail(w, i, lane, "out of bounds", "there is no block " + std::to_string(rank - 1) + " in the cluster");
    }
    Block* owner = rank ? group.blocks[rank - 1].get() : w.block;
    if (!owner->live_threads) {
        fail(w, i, lane, "out of bounds", "block " + std::to_string(rank - 1) + " of the cluster has ended");
    }
    if (!in_shared(*grid.program, grid.options, offset, bytes)) {
        fail(w, i, lane, "out of bounds", wrong(what, bytes, shared_name(*grid.program, grid.options, offset)));
    }
    return {Space::shared, owner->shared.data() + offset, offset, &owner->shadow, owner};
}

// A generic address is one of a space's window, or of global memory.
void resolve_window(Space& space, u64& at) {
    if (space == Space::param) {
        at += kParamWindow;
    } else if (space != Space::generic) {
        return;
    }
    space = Space::generic;
    if (at - kSharedWindow < kWindow) {
        space = Space::shared;
        at -= kSharedWindow;
    } else if (at - kLocalWindow < kWindow) {
        space = Space::local;
        at -= kLocalWindow;
    } else if (at - kParamWindow < kWindow) {
        space = Space::param;
        at -= kParamWindow;
    }
}

}  // namespace

string address_name(const Warp& w, const Place& p, u64 at) {
    const Grid& grid = *w.block->group->grid;
    if (p.space == Space::shared) return shared_name(*grid.program, grid.options, p.offset);
    return tensor_name(grid, at);
}

Place find_place(Warp& w, const Instr& i, int lane, Space space, u64 at, u32 bytes, const char* what, u32 align) {
    Grid& grid = *w.block->group->grid;
    resolve_window(space, at);
    if (at & ((align ? align : bytes) - 1)) fail(w, i, lane, "misaligned", wrong(what, bytes, hex(at)));
    if (space == Space::shared) return shared_place(w, i, lane, at, bytes, what);
    if (space == Space::local) {
        const u64 size = grid.program->local_bytes;
        if (at + bytes > size || at > size) {
            const string where = "local memory, byte " + std::to_string(i64(at)) + " of " + std::to_string(size);
            fail(w, i, lane, "out of bounds", wrong(what, bytes, where));
        }
        return {Space::local, w.local.data() + u64(lane) * size + at, at, nullptr, nullptr};
    }
    if (space == Space::param) {
        if (at + bytes > grid.params.size()) {
            fail(w, i, lane, "out of bounds", wrong(what, bytes, "the parameters, byte " + std::to_string(at)));
        }
        return {Space::param, grid.params.data() + at, at, nullptr, nullptr};
    }
    const Tensor* tensor = tensor_at(grid, at, bytes);
    if (!tensor) fail(w, i, lane, "out of bounds", wrong(what, bytes, tensor_name(grid, at)));
    const Region& region = grid.regions[tensor->region];
    return {Space::global, reinterpret_cast<u8*>(at), at - region.lo, &region.shadow, nullptr};
}

void open_request(Warp& w, const Instr& i, Request& r) {
    const char* what = r.kind == Access::read ? "read" : r.kind == Access::write ? "write" : "atomic";
    const Grid& grid = *w.block->group->grid;
    // most lanes lie in the tensor of the lane before
    const Tensor* tensor = nullptr;
    each_lane(r.mask, [&](int l) {
        const u64 at = r.at[l];
        if (tensor && at >= tensor->lo && at + r.bytes <= tensor->hi && !(at & (r.bytes - 1))) {
            const Region& region = grid.regions[tensor->region];
            r.place[l] = {Space::global, reinterpret_cast<u8*>(at), at - region.lo, &region.shadow, nullptr};
            return;
        }
        r.place[l] = find_place(w, i, l, r.space, at, r.bytes, what);
        tensor = r.place[l].space == Space::global ? tensor_at(grid, at, r.bytes) : nullptr;
    });
    count_traffic(w, r);
}

u32 strength(const Request& r) {
    if (!r.strong) return 0;
    return kStrong | (r.scope == Scope::cta ? kBlockScope : r.scope == Scope::cluster ? kClusterScope : 0);
}

Recorder recorder(const Warp& w, int lane) { return {w.lanes[lane].id, w.lanes[lane].clock}; }

namespace {

void race(Warp& w, const Instr& i, int lane, const Place& p, u32 bytes, Access kind, const Conflict& c) {
    const Grid& grid = *w.block->group->grid;
    const string mine = kind == Access::read ? "read" : kind == Access::write ? "write" : "atomic access";
    const string name = address_name(w, p, u64(p.host));
    if (c.kind[0] == 'p') {
        fail(w, i, lane, "missing fence.proxy.async", "the asynchronous " + mine + " of " + name + ", which " +
             thread_name(grid, c.other) + " wrote at " + place_of(*grid.program, c.other_pc));
    }
    const u32 kind_of = (c.other % grid.ids_per_group()) / grid.threads_per_group();
    const bool async = kind_of != kThread;
    const string verb = c.kind[0] == 'w' ? (async ? " is still being written by " : " was written by ")
                                         : (async ? " is still being read by " : " was read by ");
    fail(w, i, lane, "race", mine + " of " + std::to_string(bytes) + " bytes at " + name + ", which" + verb +
         thread_name(grid, c.other) + " at " + place_of(*grid.program, c.other_pc) + " with nothing to order them");
}

void uninitialised(Warp& w, const Instr& i, int lane, const Place& p, u32 bytes) {
    fail(w, i, lane, "uninitialised read", std::to_string(bytes) + " bytes at " + address_name(w, p, u64(p.host)) +
         ", which nobody has written");
}

}  // namespace

void check_access(Warp& w, const Instr& i, int lane, const Place& p, u32 bytes, Access kind, bool equal,
                  const Recorder& as, bool async_proxy) {
    Group& group = *w.block->group;
    Grid& grid = *group.grid;
    if (!p.shadow || !grid.options.check) return;
    const u32 first = u32(p.offset / 4), words = u32((p.offset % 4 + bytes + 3) / 4);
    const u8 nibble = bytes >= 4 ? 15 : u8(((1u << bytes) - 1) << p.offset % 4);
    if (u8* touched = p.shadow->touched) {
        const u8 mark = kind == Access::read ? nibble : kind == Access::write ? u8(nibble << 4) : u8(nibble * 17);
        for (u32 k = first; k < first + words; ++k) touched[k] |= mark;
    }
    const u32 base = group.index * grid.ids_per_group();
    const LaneClock& knows = as.knows ? *as.knows : w.lanes[lane];
    const Agent me{&knows, grid.threads_per_group(), base, grid.ids_per_group(), grid.threads_per_block,
                   base + as.id, as.stamp, i.pc, base + knows.id,
                   async_proxy && (kind == Access::read || grid.options.strict)};
    RaceChecker& races = p.space == Space::shared ? group.races : grid.races;
    Conflict conflict = races.access(me, p.shadow->cells, p.offset, bytes, kind, equal);
    if (conflict.kind) race(w, i, lane, p, bytes, kind, conflict);
    if (u8* valid = p.shadow->valid) {
        for (u32 k = first; k < first + words; ++k) {
            if (kind != Access::write && (valid[k] & nibble) != nibble) uninitialised(w, i, lane, p, bytes);
            if (kind != Access::read) valid[k] |= nibble;
        }
    }
}

void check_range(Warp& w, const Instr& i, int lane, const Place& p, u64 bytes, Access kind, const Recorder& as,
                 bool async_proxy, bool equal) {
    Place part = p;
    while (bytes) {
        const u64 to_word = part.offset % 4 ? 4 - part.offset % 4 : bytes < 4 ? 4 : bytes / 4 * 4;
        const u32 step = u32(std::min({bytes, to_word, u64(1) << 20}));
        check_access(w, i, lane, part, step, kind, equal, as, async_proxy);
        part.offset += step;
        part.host += step;
        bytes -= step;
    }
}

void check_request(Warp& w, const Instr& i, Request& r, u32 equal) {
    const u32 flags = strength(r);
    each_lane(r.mask, [&](int l) {
        if (!r.place[l].shadow) return;
        Recorder as = recorder(w, l);
        as.stamp |= flags;
        check_access(w, i, l, r.place[l], r.bytes, r.kind, equal >> l & 1, as);
    });
}

}  // namespace ptx
