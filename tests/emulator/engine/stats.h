// Counters of one launch.
#pragma once
#include "isa.h"

namespace ptx {

struct Stats {
    u64 warp_instructions = 0, integer_instructions = 0;
    u64 load_bytes = 0, load_sectors = 0, store_bytes = 0, store_sectors = 0;
    u64 atomic_operations = 0;
    u64 distinct_read = 0, distinct_written = 0;
    u64 shared_load_waves = 0, shared_load_ideal = 0, shared_store_waves = 0, shared_store_ideal = 0;
    u64 mma_flops = 0, special_ops = 0, barriers = 0;
    u64 dram_read = 0, dram_written = 0;
    u64 benign_writes = 0, divergent_steps = 0;
};

}  // namespace ptx
