// Memory accesses of a warp: where the addresses lead, and what is checked and counted on the way.
#pragma once
#include "lanewise.h"

namespace ptx {

constexpr u32 kMostBytes = 32;   // of one lane

struct Place {               // of one lane's address
    Space space = Space::global;
    u8* host = nullptr;
    u64 offset = 0;          // in the shadow
    const Shadow* shadow = nullptr;
    Block* owner = nullptr;  // of shared memory
};

struct Request {
    u32 mask = 0;
    u32 bytes = 0;           // of one lane
    Access kind = Access::read;
    bool strong = false;
    Scope scope = Scope::sys;
    Space space = Space::generic;   // as the instruction says; of the first lane once open
    u64 at[kLanes];
    Place place[kLanes];
};

// Addresses of slot `slot` of the instruction, 32-bit ones wrapped.
void addresses(const Warp& w, const Instr& i, int slot, u32 mask, u64* at);

// One address: checks bounds and alignment, raises what is wrong. `what`: "read", "write", ...
Place find_place(Warp& w, const Instr& i, int lane, Space space, u64 at, u32 bytes, const char* what, u32 align = 0);

// All lanes: places and traffic.
void open_request(Warp& w, const Instr& i, Request& r);

// Races, initialised bytes and bytes touched, lane by lane. Bits of `equal`: the write changes nothing.
void check_request(Warp& w, const Instr& i, Request& r, u32 equal = 0);

// One access by a lane or by one of its engines; `issuer` decides what is ordered, `as` what is recorded.
struct Recorder {
    u32 id;                  // local id to record
    u32 stamp;
    const LaneClock* knows = nullptr;  // in the place of the lane, if several issue it together
};
void check_access(Warp& w, const Instr& i, int lane, const Place& p, u32 bytes, Access kind, bool equal,
                  const Recorder& as, bool async_proxy = false);

// The same for any number of bytes.
void check_range(Warp& w, const Instr& i, int lane, const Place& p, u64 bytes, Access kind, const Recorder& as,
                 bool async_proxy = false, bool equal = false);

u32 strength(const Request& r);  // the flags of its stamps
Recorder recorder(const Warp& w, int lane);
string address_name(const Warp& w, const Place& p, u64 at);

// traffic.cpp
void count_traffic(Warp& w, const Request& r);
void count_shared_waves(Stats& stats, const u64* offsets, u32 mask, u32 bytes, bool store);
void count_sectors(Grid& grid, vector<u64>& sectors, u64 bytes, bool load, bool store);

}  // namespace ptx
