// The machine: grid > group (a block, or a cluster of blocks) > block > warp > lanes.
#pragma once
#include <cstring>
#include <deque>

#include "program.h"
#include "race.h"
#include "stats.h"

namespace ptx {

struct Block;
struct Group;
struct Grid;

// Generic addresses of what is no host memory.
constexpr u64 kSharedWindow = 0x7000'0000'0000'0000ull;
constexpr u64 kLocalWindow = 0x7100'0000'0000'0000ull;
constexpr u64 kParamWindow = 0x7200'0000'0000'0000ull;
constexpr u64 kWindow = 0x0100'0000'0000'0000ull;
constexpr u32 kRankShift = 24;  // shared::cluster addresses: (rank + 1) << 24 | offset; 0 means the own block

// Lanes of a warp that stand at the same instruction.
struct Fragment {
    int pc;
    u32 mask;
    enum State : u8 { ready, converging, blocked } state = ready;
};

struct AsyncCopy {           // cp.async before it lands
    u64 offset;
    u8 bytes, data[16];
};

struct CopyGroups {          // of one lane
    vector<AsyncCopy> open;
    std::deque<vector<AsyncCopy>> closed;
    u32 issued = 1;          // clock of the open group
    u32 bulk_issued = 1, bulk_closed = 0;
};

struct Warp {
    Block* block = nullptr;
    int index = 0;
    u32 live = 0, full = 0;
    vector<u8> registers;
    u8* bank[2] = {nullptr, nullptr};
    Fragment fragments[kLanes];
    int count = 0;           // of fragments
    u32 divergent_steps = 0;
    u32 apart = 0;           // of these, since all lanes have met
    u32 blocked = 0;         // set by an instruction: these lanes wait for a barrier
    bool at_barrier = false; // set by an instruction: barriers may have become complete
    u32 cluster_arrived = 0; // lanes between arrive and wait of the cluster barrier
    u32 cluster_phase[kLanes] = {};
    u32 carry = 0;           // the condition code of add.cc and the like, a bit a lane
    bool yield = false;      // set by an instruction: nothing to do before another warp moves
    LaneClock lanes[kLanes];
    vector<u8> local;        // [lane][byte]
    std::unique_ptr<CopyGroups[]> copies;
    struct Flight {          // registers of a wgmma not waited for
        u32 first, end;      // byte range in the register file
        u32 group, pc;
        bool result;         // written by it, else read
    };
    vector<Flight> flights;
    u32 wgmma_group = 1;     // number of the open group
    u64 wgmma_fence = 0;     // when the last wgmma.fence was, in instructions of the warp
    u64 steps = 0;
    u64 wgmmas = 0;          // which ones the warp has executed, a hash
    vector<u64> written_at;  // by 64 bytes of registers: step of the last write but wgmma's; in programs with wgmma
    CopyGroups& copy_groups(int lane) {
        if (!copies) copies.reset(new CopyGroups[kLanes]);
        return copies[lane];
    }
};

struct Barrier {
    struct Waiter {
        Warp* warp;
        u32 mask;
        const Instr* instr;
    };
    u32 arrived = 0, expected = 0;        // expected 0: every live thread
    vector<Waiter> waiting;
    Joiner released, proxied;
    u32 ones = 0, threads = 0;            // of bar.red
};

struct Mbarrier {
    bool valid = false;
    u32 creator = 0, created = 0;  // thread and its clock
    bool published = false;  // by a fence.mbarrier_init
    u32 expected = 0, pending = 0;
    i64 transactions = 0;    // bytes promised and not arrived
    u32 phase = 0;           // completed phases
    u32 actor = 0, clock = 0;  // of what completes on it in this phase; the clock outlives mbarrier.inval
    Joiner released, proxied, far;   // far: by other blocks, at the scope of the cluster
    KnownRef completed, completed_proxied, completed_far;
};

struct SyncVariable {        // what an atomic location carries: to the block, to the cluster, to everyone
    KnownRef released[3];
    u32 block[3] = {0, 0, 0}, group[3] = {0, 0, 0};  // who released it
};

struct Block {
    Group* group = nullptr;
    u32 index[3] = {0, 0, 0}, linear = 0, rank = 0;
    vector<std::unique_ptr<Warp>> warps;
    vector<u8> shared, shared_valid;
    vector<Cell> shared_cells;
    Shadow shadow;           // of shared memory
    Barrier barriers[16];
    std::map<u64, Mbarrier> mbarriers;
    std::map<u64, SyncVariable> syncs;
    u32 live_threads = 0;
    Joiner ended;            // what its threads knew when they exited
};

struct Arrival {             // bytes on their way to an mbarrier
    Mbarrier* at;
    u32 actor, clock;
    u64 bytes;
};

struct Group {
    Grid* grid = nullptr;
    u32 index = 0;
    vector<std::unique_ptr<Block>> blocks;
    RaceChecker races;       // of shared memory
    Barrier cluster_barrier;
    u32 cluster_phase = 0;
    KnownRef cluster_known, cluster_proxied;
    u32 mbarrier_actors = 0;
    vector<Arrival> late;    // in random order
    bool finished = false;
    u64 issued = 0;
};

struct Tensor {
    string name;
    u64 lo = 0, hi = 0;
    int region = 0;
    u32 element = 4;
};

struct Region {              // tensors that share memory share its shadow
    u64 lo = 0, hi = 0;
    Shadow shadow;
};

struct Options {
    u32 grid[3] = {1, 1, 1}, block[3] = {1, 1, 1}, cluster[3] = {1, 1, 1};
    u64 dynamic_shared = 0;
    int order = 0;           // 0 fixed, 1 random, 2 greedy
    u32 seed = 0;
    bool perturb = false, check = true;
    bool strict = true;      // want proxy fences that Triton leaves out, too
    u64 budget = 400'000'000;
    u64 l2_bytes = 0;
};

// Random numbers for schedules (xorshift).
class Generator {
public:
    using result_type = u32;
    static constexpr u32 min() { return 0; }
    static constexpr u32 max() { return kAll; }
    void seed(u64 value) { state_ = value * 0x9e3779b97f4a7c15ull | 1; }
    u32 operator()() {
        state_ ^= state_ << 13;
        state_ ^= state_ >> 7;
        state_ ^= state_ << 17;
        return u32(state_ >> 32);
    }

private:
    u64 state_ = 1;
};

struct Grid {
    Program* program = nullptr;
    Options options;
    vector<u8> params;
    vector<Tensor> tensors;               // sorted by address
    vector<Region> regions;
    RaceChecker races;       // of global memory
    std::map<u64, SyncVariable> syncs;
    Stats stats;
    Generator random;
    u64 issued = 0;
    u64 progress = 0;        // grows when the state of the machine moves on
    u32 threads_per_block = 0, warps_per_block = 0, blocks_per_group = 1;
    u32 threads_per_group() const { return threads_per_block * blocks_per_group; }
    u32 ids_per_group() const { return threads_per_group() * 5 + 4096; }
    std::unique_ptr<class L2> l2;
    string spinning;         // the wait that failed last, for the message of a deadlock
};

// ---- what the families of instructions use ----

template <class T>
const T* lanes_in(const Warp& w, const Operand& o) {
    return reinterpret_cast<const T*>(w.bank[o.bank] + o.offset);
}

template <class T>
void lanes_out(Warp& w, const Operand& o, const T* values, u32 mask) {
    if (!o.exists) return;
    T* to = reinterpret_cast<T*>(w.bank[0] + o.offset);
    if (mask == kAll) {
        memcpy(to, values, sizeof(T) * kLanes);
        return;
    }
    for (int l = 0; l < kLanes; ++l) to[l] = mask >> l & 1 ? values[l] : to[l];
}

inline u32 predicate(const Warp& w, const Operand& o) {
    u32 mask = *reinterpret_cast<const u32*>(w.bank[o.bank] + o.offset);
    return o.negated ? ~mask : mask;
}

inline void predicate_out(Warp& w, const Operand& o, u32 values, u32 mask) {
    if (!o.exists) return;
    u32& to = *reinterpret_cast<u32*>(w.bank[0] + o.offset);
    to = (to & ~mask) | (values & mask);
}

// Lanes of any width, zero extended.
void lanes_any(const Warp& w, const Operand& o, u64* values);
void lanes_any_out(Warp& w, const Operand& o, const u64* values, u32 mask);

template <class F>
void each_lane(u32 mask, F f) {
    for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

[[noreturn]] void fail(const Warp& w, const Instr& i, int lane, const char* kind, const string& what);
string place_of(const Program& program, u32 pc);  // file:line of an instruction
string thread_name(const Grid& grid, u32 global_id);

void run_grid(Grid& grid);

}  // namespace ptx
