// What the stand-in for the CUDA runtime tells Python, and what Python sets: see tests/emulator/cuda.py.
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {

struct StandInLaunch {
    const void* fatbin;        // the image that holds the kernel
    const char* kernel;        // its mangled name
    uint32_t grid[3], block[3], cluster[3];
    uint64_t shared_bytes;
    void** args;
    const char* broken;        // a rule of the host that the launch broke, or null
};

// A tensor whose address the room asked for, or that it allocated (`blank`).
struct StandInMemory {
    uint64_t address, bytes;
    uint32_t element, blank;
};

struct StandIn {
    int (*launch)(const StandInLaunch*);   // returns a cudaError_t
    void (*memory)(const StandInMemory*);
    int (*threads)(const void* fatbin, const char* kernel);   // a block may have; 0: no code for this GPU
    int32_t capability, processors, shared_limit;
    int32_t in_room;           // CPU tensors look like CUDA tensors
    uint64_t host;             // but the one at this address
    int32_t guards;            // device guards that live
};

extern StandIn stand_in;
}

constexpr uint64_t kStream = 0x5700;   // what torch's current stream is made of here
