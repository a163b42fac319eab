// Counting what memory sees: 32-byte sectors of global memory, waves through the banks of shared memory.
#include <algorithm>

#include "l2.h"
#include "memory.h"

namespace ptx {

// A warp's access goes in phases of 128 bytes; within one, words of the same bank go one after another.
void count_shared_waves(Stats& stats, const u64* offsets, u32 mask, u32 bytes, bool store) {
    const int lanes = bytes <= 4 ? 32 : bytes == 8 ? 16 : bytes == 16 ? 8 : 4;
    u64 waves = 0, ideal = 0;
    for (int first = 0; first < kLanes; first += lanes) {
        const u32 phase = mask & (lanes == 32 ? kAll : ((1u << lanes) - 1) << first);
        if (!phase) continue;
        u64 words[32][32];
        u8 depth[32] = {};
        u32 most = 1;
        each_lane(phase, [&](int l) {
            for (u64 word = offsets[l] / 4; word <= (offsets[l] + bytes - 1) / 4; ++word) {
                const u32 bank = word % 32;
                u64* seen = words[bank];
                if (std::find(seen, seen + depth[bank], word) != seen + depth[bank]) continue;
                seen[depth[bank]++] = word;
                most = std::max<u32>(most, depth[bank]);
            }
        });
        waves += most;
        ++ideal;
    }
    (store ? stats.shared_store_waves : stats.shared_load_waves) += waves;
    (store ? stats.shared_store_ideal : stats.shared_load_ideal) += ideal;
}

void count_sectors(Grid& grid, vector<u64>& sectors, u64 bytes, bool load, bool store) {
    if (!std::is_sorted(sectors.begin(), sectors.end())) std::sort(sectors.begin(), sectors.end());
    sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
    Stats& stats = grid.stats;
    if (load) {
        stats.load_bytes += bytes;
        stats.load_sectors += sectors.size();
    }
    if (store) {
        stats.store_bytes += bytes;
        stats.store_sectors += sectors.size();
    }
    if (grid.l2) {
        for (u64 sector : sectors) grid.l2->access(sector, store);
    }
}

void count_traffic(Warp& w, const Request& r) {
    Grid& grid = *w.block->group->grid;
    const Space space = r.place[__builtin_ctz(r.mask)].space;
    const bool load = r.kind != Access::write, store = r.kind != Access::read;
    if (space == Space::global) {
        static thread_local vector<u64> sectors;
        sectors.clear();
        u64 last = ~0ull, bytes = 0;
        each_lane(r.mask, [&](int l) {
            if (r.place[l].space != Space::global) return;
            bytes += r.bytes;
            for (u64 s = r.at[l] / 32; s <= (r.at[l] + r.bytes - 1) / 32; ++s) {
                if (s != last) sectors.push_back(s);
                last = s;
            }
        });
        count_sectors(grid, sectors, bytes, load, store);
    } else if (space == Space::shared) {
        u64 offsets[kLanes];
        each_lane(r.mask, [&](int l) { offsets[l] = r.place[l].offset; });
        count_shared_waves(grid.stats, offsets, r.mask, r.bytes, store);
    }
}

}  // namespace ptx
