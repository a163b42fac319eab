// Blocks and warps come and go; special registers; the accounts of a launch.
#include "setup.h"

#include <algorithm>

#include "l2.h"

namespace ptx {
namespace {

u64 special_value(const Grid& grid, const Block& block, const Warp& w, const string& name, int lane) {
    const Options& o = grid.options;
    const u32 thread = u32(w.index) * kLanes + lane;
    const u32 tid[3] = {thread % o.block[0], thread / o.block[0] % o.block[1], thread / (o.block[0] * o.block[1])};
    const u32 clusters = o.cluster[0] * o.cluster[1] * o.cluster[2];
    const int axis = name.back() == 'x' ? 0 : name.back() == 'y' ? 1 : name.back() == 'z' ? 2 : -1;
    const string base = axis >= 0 ? name.substr(0, name.size() - 2) : name;
    if (axis >= 0) {
        if (base == "%tid") return tid[axis];
        if (base == "%ntid") return o.block[axis];
        if (base == "%ctaid") return block.index[axis];
        if (base == "%nctaid") return o.grid[axis];
        if (base == "%clusterid") return block.index[axis] / o.cluster[axis];
        if (base == "%nclusterid") return o.grid[axis] / o.cluster[axis];
        if (base == "%cluster_ctaid") return block.index[axis] % o.cluster[axis];
        if (base == "%cluster_nctaid") return o.cluster[axis];
    }
    if (name == "%laneid") return u64(lane);
    if (name == "%warpid") return u64(w.index);
    if (name == "%nwarpid") return grid.warps_per_block;
    if (name == "%lanemask_eq") return 1u << lane;
    if (name == "%lanemask_lt") return (1u << lane) - 1;
    if (name == "%lanemask_le") return (1ull << (lane + 1)) - 1;
    if (name == "%lanemask_gt") return ~((1ull << (lane + 1)) - 1) & kAll;
    if (name == "%lanemask_ge") return ~((1u << lane) - 1) & kAll;
    if (name == "%dynamic_smem_size") return o.dynamic_shared;
    if (name == "%total_smem_size" || name == "%aggr_smem_size") return block.shared.size();
    if (name == "%cluster_ctarank") return block.rank;
    if (name == "%cluster_nctarank") return clusters;
    if (name == "%is_explicit_cluster") return clusters > 1;
    if (name == "%smid") return block.linear % 132;
    if (name == "%nsmid") return 132;
    if (name == "%gridid") return 1;
    throw Unsupported("special register " + name);
}

std::unique_ptr<Warp> make_warp(Grid& grid, Block& block, u32 index) {
    auto w = std::make_unique<Warp>();
    Program& program = *grid.program;
    w->block = &block;
    w->index = int(index);
    w->registers.resize(program.register_bytes + 128, 0xcd);  // what is never written is conspicuous
    u64 base = (u64(w->registers.data()) + 63) / 64 * 64;
    w->bank[0] = reinterpret_cast<u8*>(base);
    w->bank[1] = program.constant_base();
    const u32 first = index * kLanes;
    const u32 lanes = std::min<u32>(kLanes, grid.threads_per_block - first);
    w->live = w->full = lanes == kLanes ? kAll : (1u << lanes) - 1;
    w->fragments[0] = {0, w->live, Fragment::ready};
    w->count = 1;
    if (program.has_wgmma) w->written_at.assign(program.register_bytes / 64 + 1, 0);
    w->local.assign(program.local_bytes * kLanes, 0xff);
    const KnownRef nothing(new Known());
    nothing->group = block.group->index;
    for (int l = 0; l < kLanes; ++l) {
        w->lanes[l].id = block.rank * grid.threads_per_block + first + l;
        w->lanes[l].known = nothing;
    }
    for (const SpecialUse& use : program.specials) {
        u64 values[kLanes];
        for (int l = 0; l < kLanes; ++l) values[l] = special_value(grid, block, *w, use.name, l);
        if (use.where.width) lanes_any_out(*w, use.where, values, kAll);
        else predicate_out(*w, use.where, values[0] ? kAll : 0, kAll);
    }
    return w;
}

std::unique_ptr<Block> make_block(Grid& grid, Group& group, const u32* index, u32 rank) {
    auto block = std::make_unique<Block>();
    const Program& program = *grid.program;
    block->group = &group;
    block->rank = rank;
    std::copy(index, index + 3, block->index);
    block->linear = index[0] + grid.options.grid[0] * (index[1] + grid.options.grid[1] * index[2]);
    block->live_threads = grid.threads_per_block;
    u64 bytes = program.has_dynamic ? program.dynamic_offset() + grid.options.dynamic_shared : program.static_end;
    block->shared.assign(bytes + 64, 0xff);  // NaN where nobody has written
    block->shared_cells.assign(bytes / 4 + 16, Cell{});
    block->shared_valid.assign(bytes / 4 + 16, 0);
    block->shadow = {block->shared_cells.data(), block->shared_valid.data(), nullptr};
    block->ended = Joiner(group.index);
    for (Barrier& b : block->barriers) b.released = b.proxied = Joiner(group.index);
    for (u32 k = 0; k < grid.warps_per_block; ++k) block->warps.push_back(make_warp(grid, *block, k));
    return block;
}

}  // namespace

u32 begin_launch(Grid& grid) {
    const Options& o = grid.options;
    grid.threads_per_block = o.block[0] * o.block[1] * o.block[2];
    grid.warps_per_block = (grid.threads_per_block + kLanes - 1) / kLanes;
    grid.blocks_per_group = o.cluster[0] * o.cluster[1] * o.cluster[2];
    grid.random.seed(o.seed * 7919 + 1);
    grid.program->executed.assign(grid.program->code.size(), 0);
    u64 footprint = 0;
    for (const Region& region : grid.regions) footprint += region.hi - region.lo;
    if (o.l2_bytes && footprint > o.l2_bytes) grid.l2 = std::make_unique<L2>(o.l2_bytes);
    u64 groups = u64(o.grid[0]) * o.grid[1] * o.grid[2] / grid.blocks_per_group;
    if (groups * grid.ids_per_group() >= 0xffffffffull) throw Unsupported("the grid is too large to be checked");
    return u32(groups);
}

std::unique_ptr<Group> make_group(Grid& grid, u32 number) {
    auto group = std::make_unique<Group>();
    group->grid = &grid;
    group->index = number;
    group->cluster_barrier.released = group->cluster_barrier.proxied = Joiner(number);
    const Options& o = grid.options;
    u32 clusters[3], first[3];
    for (int a = 0; a < 3; ++a) clusters[a] = o.grid[a] / o.cluster[a];
    first[0] = number % clusters[0] * o.cluster[0];
    first[1] = number / clusters[0] % clusters[1] * o.cluster[1];
    first[2] = number / (clusters[0] * clusters[1]) * o.cluster[2];
    for (u32 rank = 0; rank < grid.blocks_per_group; ++rank) {
        u32 index[3] = {first[0] + rank % o.cluster[0], first[1] + rank / o.cluster[0] % o.cluster[1],
                        first[2] + rank / (o.cluster[0] * o.cluster[1])};
        group->blocks.push_back(make_block(grid, *group, index, rank));
    }
    return group;
}

void end_group(Grid& grid, Group& group) {
    grid.stats.benign_writes += group.races.benign;
    for (auto& block : group.blocks) {
        for (auto& w : block->warps) grid.stats.divergent_steps += w->divergent_steps;
    }
}

void end_launch(Grid& grid) {
    Stats& stats = grid.stats;
    const Program& program = *grid.program;
    for (const Instr& i : program.code) {
        const u64 times = program.executed[i.pc];
        if (i.pc + 1 < program.code.size()) stats.warp_instructions += times;
        if (i.integer) stats.integer_instructions += times;
    }
    stats.benign_writes += grid.races.benign;
    u64 read_sectors = 0, written_sectors = 0;
    for (const Region& region : grid.regions) {
        const u8* touched = region.shadow.touched;
        const u64 words = (region.hi - region.lo + 3) / 4, before = region.lo % 32 / 4;
        bool read = false, written = false;
        for (u64 k = 0; k < words; ++k) {
            const bool sector = (k + before) % 8 == 0 && k + 8 <= words;
            if (u64 none = 0; sector && memcmp(touched + k, &none, 8) == 0) {
                k += 7;   // most of a tensor whose rows lie far apart
                continue;
            }
            stats.distinct_read += u64(__builtin_popcount(touched[k] & 15));
            stats.distinct_written += u64(__builtin_popcount(touched[k] >> 4));
            read |= touched[k] & 15;
            written |= touched[k] >> 4;
            if ((k + before) % 8 == 7 || k + 1 == words) {
                read_sectors += read;
                written_sectors += written;
                read = written = false;
            }
        }
    }
    if (grid.l2) grid.l2->flush();
    stats.dram_read = grid.l2 ? grid.l2->read_bytes : read_sectors * 32;
    stats.dram_written = grid.l2 ? grid.l2->written_bytes : written_sectors * 32;
}

}  // namespace ptx
