// cp.async.bulk: copies between global and shared memory by the bulk engine, plain and of tensor tiles.
//
// Data moves when the copy is issued; that it is asynchronous shows in what is checked. A copy into shared
// memory is a write that others see through its mbarrier; a copy out of it reads, and writes global
// memory, until its group is waited for. Both are of the async proxy.
#include <algorithm>

#include "bulk.h"

namespace ptx {
namespace {

enum Kind : u8 { kLoad, kStore, kToPeer };

void commit(Warp& w, const Instr&, u32 mask) {
    each_lane(mask, [&](int l) { ++w.copy_groups(l).bulk_issued; });
}

void wait(Warp& w, const Instr& i, u32 mask) {  // flag: of reads only
    ++w.block->group->grid->progress;
    each_lane(mask, [&](int l) {
        const u32 committed = w.copy_groups(l).bulk_issued - 1;
        const u32 done = committed > u32(i.immediate) ? committed - u32(i.immediate) : 0;
        LaneClock& lane = w.lanes[l];
        lane.done[kBulkRead - 1] = std::max(lane.done[kBulkRead - 1], done);
        if (!i.flag) lane.done[kBulkWrite - 1] = std::max(lane.done[kBulkWrite - 1], done);
        ++lane.clock;
    });
}

// Which blocks of the cluster receive a copy; without .multicast the one the address says.
u32 receivers(const Warp& w, const Instr& i, int lane) {
    if (!i.sat) return 0;
    u64 mask[kLanes];
    lanes_any(w, i.src[3], mask);
    return u32(mask[lane]);
}

u64 in_block(u64 at, int rank) { return (at & ((1u << kRankShift) - 1)) | u64(rank + 1) << kRankShift; }

void load(Warp& w, const Instr& i, int lane, const Tile* tile, u64 to, u64 from, u64 size, u64 barrier) {
    const u32 ranks = receivers(w, i, lane);
    const int blocks = int(w.block->group->blocks.size());
    for (int rank = 0; rank < (ranks ? blocks : 1); ++rank) {
        if (ranks && !(ranks >> rank & 1)) continue;
        const u64 target = ranks ? in_block(to, rank) : to;
        Mbarrier& m = mbarrier_at(w, i, lane, Space::shared, ranks ? in_block(barrier, rank) : barrier);
        need_published(w, i, lane, m);
        const Recorder as = completion(*w.block->group->grid, m);
        BulkCopy copy(w, i, lane, as, as);
        if (tile) size = copy.load_tile(*tile, target);
        else copy.plain(Space::shared, target, Space::global, from, size);
        complete_bytes(w, m, size);
    }
}

Recorder engine(const Warp& w, int lane, Actor kind, u32 group) {
    return {kind * w.block->group->grid->threads_per_group() + w.lanes[lane].id, group};
}

struct Values {
    u64 first[kLanes], second[kLanes], third[kLanes], size[kLanes];
};

void take(const Warp& w, const Instr& i, u32 mask, Values& v) {
    Instr at = {};  // three addresses with offsets of their own
    u64* to[] = {v.first, v.second, v.third};
    for (int k = 0; k < 3; ++k) {
        if (!i.src[k].exists) continue;
        at.src[0] = i.src[k];
        at.offset = i.targets[k];
        addresses(w, at, 0, mask, to[k]);
    }
    if (!i.list2.empty()) lanes_any(w, i.list2[0], v.size);
}

// src[0] destination, src[1] source, src[2] mbarrier; list2 the size.
void run_plain(Warp& w, const Instr& i, u32 mask) {
    Values v;
    take(w, i, mask, v);
    ++w.block->group->grid->progress;
    each_lane(mask, [&](int l) {
        if (v.size[l] % 16) fail(w, i, l, "misaligned", "a bulk copy of " + std::to_string(v.size[l]) + " bytes");
        if (i.op == kLoad) return load(w, i, l, nullptr, v.first[l], v.second[l], v.size[l], v.third[l]);
        const u32 group = w.copy_groups(l).bulk_issued;
        if (i.op == kToPeer) {
            Mbarrier& m = mbarrier_at(w, i, l, Space::shared, v.third[l]);
            need_published(w, i, l, m);
            const Recorder as = completion(*w.block->group->grid, m);
            BulkCopy(w, i, l, as, as).plain(Space::shared, v.first[l], Space::shared, v.second[l], v.size[l]);
            return complete_bytes(w, m, v.size[l]);
        }
        BulkCopy copy(w, i, l, engine(w, l, kBulkRead, group), engine(w, l, kBulkWrite, group));
        copy.plain(Space::global, v.first[l], Space::shared, v.second[l], v.size[l]);
    });
}

// src[0] the shared side, src[1] the tensor map, src[2] mbarrier; list the coordinates.
void run_tensor(Warp& w, const Instr& i, u32 mask) {
    Values v;
    take(w, i, mask, v);
    ++w.block->group->grid->progress;
    vector<vector<u64>> coordinates(i.list.size(), vector<u64>(kLanes));
    for (size_t k = 0; k < i.list.size(); ++k) lanes_any(w, i.list[k], coordinates[k].data());
    each_lane(mask, [&](int l) {
        Tile tile{read_tensor_map(w, i, l, v.second[l]), {}};
        if (tile.map.rank() != int(i.list.size())) {
            fail(w, i, l, "tensor map", "it has " + std::to_string(tile.map.rank()) + " dimensions");
        }
        for (size_t k = 0; k < i.list.size(); ++k) tile.at[k] = i32(u32(coordinates[k][l]));
        if (i.op == kLoad) return load(w, i, l, &tile, v.first[l], 0, 0, v.third[l]);
        const u32 group = w.copy_groups(l).bulk_issued;
        BulkCopy copy(w, i, l, engine(w, l, kBulkRead, group), engine(w, l, kBulkWrite, group));
        copy.store_tile(tile, v.first[l]);
    });
}

void place(Decoder& d, const Arg& arg, Instr& i, int slot) {
    d.address(arg, i, slot);
    i.targets[slot] = int(i.offset);
}

void coordinates(Decoder& d, const Arg& arg, Instr& i) {
    if (arg.parts.size() != 2) throw Unsupported("a tensor map needs coordinates");
    i.list = d.values(arg.parts[1], Type::s32);
}

bool decode_tensor(Decoder& d, const Statement& st, Instr& i) {
    for (const char* mode : {"im2col", "im2col_no_offs", "tile::gather4", "tile::scatter4", "im2col::w"}) {
        if (has(st, mode)) throw Unsupported("this mode of the tensor copy is not modelled: " + st.text);
    }
    const bool to_global = i.op == kStore;
    need_args(st, to_global ? 2 : 3);
    place(d, st.args[to_global ? 1 : 0], i, 0);
    place(d, st.args[to_global ? 0 : 1], i, 1);
    coordinates(d, st.args[to_global ? 0 : 1], i);
    if (!to_global) place(d, st.args[2], i, 2);
    if (i.sat) i.src[3] = d.value(st.args.at(3), Type::b16);
    i.run = run_tensor;
    return true;
}

}  // namespace

// {cp|cp.reduce}.async.bulk{.tensor.nd}.destination.source...
bool decode_bulk(Decoder& d, const Statement& st, Instr& i) {
    if (st.op[0] != "cp" || !has(st, "bulk")) return false;
    if (has(st, "commit_group")) {
        i.run = commit;
        return true;
    }
    if (has(st, "wait_group")) {
        i.flag = has(st, "read");
        i.immediate = i64(st.args.at(0).bits);
        i.run = wait;
        return true;
    }
    if (has(st, "prefetch")) {
        i.run = [](Warp&, const Instr&, u32) {};
        return true;
    }
    d.uses_async();
    i.targets.assign(3, 0);
    i.sat = has(st, "multicast::cluster");
    i.flag = has(st, "reduce");
    i.type = type_at(st, 0);
    const size_t global = size_t(std::find(st.op.begin(), st.op.end(), "global") - st.op.begin());
    size_t shared = 0;
    while (shared < st.op.size() && st.op[shared].rfind("shared", 0) != 0) ++shared;
    i.op = global == st.op.size() ? kToPeer : global < shared ? kStore : kLoad;
    if (i.flag) {
        i.bytes = reduction_of(st);
        if (i.op != kStore) throw Unsupported("this bulk reduction is not modelled: " + st.text);
    }
    if (has(st, "tensor")) return decode_tensor(d, st, i);
    need_args(st, i.op == kStore ? 3 : 4);
    place(d, st.args[0], i, 0);
    place(d, st.args[1], i, 1);
    i.list2 = {d.value(st.args[2], Type::u32)};
    if (i.op != kStore) place(d, st.args[3], i, 2);
    if (i.sat) i.src[3] = d.value(st.args.at(4), Type::b16);
    i.run = run_plain;
    return true;
}

}  // namespace ptx
