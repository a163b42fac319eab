// cp.async: copies of 4 to 16 bytes into shared memory that land when their group is waited for.
#include <algorithm>

#include "copy.h"

namespace ptx {
namespace {

void land(Warp& w, const AsyncCopy& copy) {
    memcpy(w.block->shared.data() + copy.offset, copy.data, copy.bytes);
    std::fill_n(w.block->shared_valid.begin() + i64(copy.offset / 4), copy.bytes / 4, u8(15));
}

void commit(Warp& w, int lane) {
    CopyGroups& groups = w.copy_groups(lane);
    groups.closed.push_back(std::move(groups.open));
    groups.open.clear();
    ++groups.issued;
}

void wait_for(Warp& w, int lane, u64 keep) {
    CopyGroups& groups = w.copy_groups(lane);
    while (groups.closed.size() > keep) {
        for (const AsyncCopy& copy : groups.closed.front()) land(w, copy);
        groups.closed.pop_front();
    }
    w.lanes[lane].done[kCpAsync - 1] = groups.issued - 1 - u32(groups.closed.size());
    ++w.lanes[lane].clock;
}

void run_commit(Warp& w, const Instr&, u32 m) {
    each_lane(m, [&](int l) { commit(w, l); });
}

void run_wait(Warp& w, const Instr& i, u32 m) {  // flag: wait_all
    ++w.block->group->grid->progress;
    each_lane(m, [&](int l) {
        if (i.flag) commit(w, l);
        wait_for(w, l, u64(i.immediate));
    });
}

// Bytes that really come from the source; the rest is zero.
void source_sizes(const Warp& w, const Instr& i, u32* sizes) {
    std::fill(sizes, sizes + kLanes, u32(i.bytes));
    if (!i.src[2].exists) return;
    if (i.src[2].width == 0) {
        const u32 ignored = predicate(w, i.src[2]);
        for (int l = 0; l < kLanes; ++l) sizes[l] = ignored >> l & 1 ? 0 : i.bytes;
        return;
    }
    u64 given[kLanes];
    lanes_any(w, i.src[2], given);
    for (int l = 0; l < kLanes; ++l) sizes[l] = u32(std::min<u64>(given[l], i.bytes));
}

void run_copy(Warp& w, const Instr& i, u32 m) {
    Grid& grid = *w.block->group->grid;
    u32 sizes[kLanes];
    u64 to[kLanes], from[kLanes], offsets[kLanes], bytes = 0;
    static thread_local vector<u64> sectors;
    sectors.clear();
    source_sizes(w, i, sizes);
    addresses(w, i, 0, m, to);
    Instr second = {};  // the address of the source
    second.src[0] = i.src[1];
    second.offset = i.immediate;
    addresses(w, second, 0, m, from);
    each_lane(m, [&](int l) {
        CopyGroups& groups = w.copy_groups(l);
        AsyncCopy copy{0, i.bytes, {}};
        if (sizes[l]) {
            const Place source = find_place(w, i, l, Space::global, from[l], sizes[l], "read", i.bytes);
            check_range(w, i, l, source, sizes[l], Access::read, recorder(w, l));
            memcpy(copy.data, source.host, sizes[l]);
            bytes += sizes[l];
            sectors.push_back(from[l] / 32);
        }
        const Place place = find_place(w, i, l, Space::shared, to[l], i.bytes, "write");
        offsets[l] = copy.offset = place.offset;
        const u32 actor = kCpAsync * grid.threads_per_group() + w.lanes[l].id;
        check_access(w, i, l, place, i.bytes, Access::write, false, {actor, groups.issued});
        memset(place.host, 0xff, i.bytes);  // until it lands
        std::fill_n(w.block->shared_valid.begin() + i64(place.offset / 4), i.bytes / 4, u8(0));
        groups.open.push_back(copy);
    });
    ++grid.progress;
    count_shared_waves(grid.stats, offsets, m, i.bytes, true);
    if (!sectors.empty()) count_sectors(grid, sectors, bytes, true, false);
}

void decode_small(Decoder& d, const Statement& st, Instr& i) {
    need_args(st, 3);
    d.address(st.args[0], i);
    const i64 offset = i.offset;
    d.address(st.args[1], i, 1);
    i.immediate = i.offset;
    i.offset = offset;
    i.bytes = u8(st.args[2].bits);
    if (i.bytes != 4 && i.bytes != 8 && i.bytes != 16) throw Unsupported("cp.async of this size: " + st.text);
    size_t rest = st.args.size() - (has(st, "L2::cache_hint") ? 1 : 0);
    if (rest > 3) i.src[2] = d.value(st.args[3], Type::u32);
    i.run = run_copy;
}

}  // namespace

// Everything the lane has issued lands now; what waits on the mbarrier learns of it.
void land_all(Warp& w, int lane) {
    commit(w, lane);
    CopyGroups& groups = w.copy_groups(lane);
    for (const auto& group : groups.closed) {
        for (const AsyncCopy& copy : group) land(w, copy);
    }
    for (auto& group : groups.closed) group.clear();
}

bool decode_copy(Decoder& d, const Statement& st, Instr& i) {
    if (st.op[0] != "cp" || st.op.size() < 3 || st.op[1] != "async") return false;
    const string& kind = st.op[2];
    if (kind == "bulk" || kind == "mbarrier" || kind == "reduce") return false;
    if (kind == "commit_group") {
        i.run = run_commit;
    } else if (kind == "wait_group" || kind == "wait_all") {
        i.flag = kind == "wait_all";
        i.immediate = i.flag ? 0 : i64(st.args.at(0).bits);
        i.run = run_wait;
    } else {
        decode_small(d, st, i);
    }
    return true;
}

}  // namespace ptx
