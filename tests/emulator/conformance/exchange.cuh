// Lanes and blocks: shuffles, votes, barriers, atomics, address spaces, calls, control flow.
#pragma once
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

extern "C" __global__ void shuffles(const uint32_t* a, uint32_t* o) {
    const unsigned lane = threadIdx.x;
    o[lane] = __shfl_xor_sync(~0u, a[lane], 5);
    o[32 + lane] = __shfl_up_sync(~0u, a[lane], 3);
    o[64 + lane] = __shfl_down_sync(~0u, a[lane], 3, 8);
    o[96 + lane] = __shfl_sync(~0u, a[lane], 13, 16);
}

extern "C" __global__ void votes(const uint32_t* a, uint32_t* o) {
    const unsigned lane = threadIdx.x;
    o[lane] = __ballot_sync(~0u, a[lane] & 1);
    o[32 + lane] = __any_sync(~0u, a[lane] > 1000) | __all_sync(~0u, a[lane] < 1000) << 1;
    o[64 + lane] = __match_any_sync(~0u, a[lane] % 5);
    o[96 + lane] = lane < 7 ? __activemask() : 0;
}

extern "C" __global__ void reductions(const int* a, int* o) {
    const unsigned lane = threadIdx.x;
    o[lane] = __reduce_add_sync(~0u, a[lane]);
    o[32 + lane] = __reduce_min_sync(~0u, a[lane]);
    o[64 + lane] = __reduce_max_sync(~0u, unsigned(a[lane]));
    o[96 + lane] = __reduce_xor_sync(~0u, unsigned(a[lane]));
}

extern "C" __global__ void barrier_reductions(const int* a, int* o) {
    const int t = threadIdx.x;
    o[t] = __syncthreads_count(a[t] > 0) * 4 + __syncthreads_and(a[t] > 0) * 2 + __syncthreads_or(a[t] > 0);
}

// Two warps produce for two that consume, over two named barriers.
extern "C" __global__ void named_barriers(const int* a, int* o, int rounds) {
    __shared__ int buffer[64];
    const int t = threadIdx.x;
    for (int r = 0; r < rounds; ++r) {
        if (t < 64) {
            if (r) asm volatile("bar.sync 2, 128;" ::: "memory");
            buffer[t] = a[r * 64 + t] * 3;
            asm volatile("bar.arrive 1, 128;" ::: "memory");
        } else {
            asm volatile("bar.sync 1, 128;" ::: "memory");
            o[r * 64 + t - 64] = buffer[(t - 64) ^ 33];
            if (r + 1 < rounds) asm volatile("bar.arrive 2, 128;" ::: "memory");
        }
    }
}

extern "C" __global__ void atomics(const int* a, uint32_t* o, float* f, double* d, __half2* h, __nv_bfloat162* b) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, x = a[i];
    atomicAdd(&o[0], unsigned(x));
    atomicMin(reinterpret_cast<int*>(&o[1]), x);
    atomicMax(&o[2], unsigned(x));
    atomicAnd(&o[3], unsigned(x) | 0xff);
    atomicOr(&o[4], unsigned(x) & 0xff);
    atomicXor(&o[5], unsigned(x));
    atomicInc(&o[6], 100);
    atomicDec(&o[7], 100);
    atomicExch(&o[8], 77u);
    atomicCAS(&o[9], 5u, 6u);
    atomicAdd(f, float(x & 7));
    atomicAdd(d, double(x & 7));
    atomicAdd(h, __floats2half2_rn(1, 2));
    atomicAdd(b, __floats2bfloat162_rn(1, 2));
}

extern "C" __global__ void shared_histogram(const int* a, int* o, int n) {
    __shared__ int bins[16];
    if (threadIdx.x < 16) bins[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) atomicAdd(&bins[a[i] & 15], 1);
    __syncthreads();
    if (threadIdx.x < 16) o[threadIdx.x] = bins[threadIdx.x];
}

// A spin lock that lanes of one warp compete for: they must not starve one another.
extern "C" __global__ void spin_lock(int* lock, int* count) {
    bool done = false;
    while (!done) {
        if (atomicCAS(lock, 0, 1) == 0) {
            __threadfence();
            *static_cast<volatile int*>(count) += 1;
            __threadfence();
            atomicExch(lock, 0);
            done = true;
        }
    }
}

__constant__ int table[4] = {10, 20, 30, 40};
__device__ int counter_start = 7;

extern "C" __global__ void spaces(const int* a, int* o) {
    __shared__ int shared[32];
    int local[8];
    const int t = threadIdx.x;
    for (int k = 0; k < 8; ++k) local[k] = a[t] + k * k;
    shared[t] = local[a[t] & 7];
    __syncthreads();
    int* generic = t & 1 ? &shared[t ^ 1] : &local[3];  // a generic address of either space
    o[t] = *generic + table[t & 3] + counter_start;
}

struct Pair {
    int x;
    double y;
};

__device__ __noinline__ Pair twice(Pair p, int by) {
    if (p.x < 0) return {by, p.y};
    return {p.x * by, p.y + by};
}

extern "C" __global__ void calls(const int* a, double* o, Pair p) {
    const int t = threadIdx.x;
    Pair r = twice({a[t], p.y}, 2);
    if (t & 1) r = twice(r, p.x);
    o[t] = r.x + r.y;
}

extern "C" __global__ void control(const int* a, int* o) {
    const int t = threadIdx.x;
    int x = a[t] & 63, steps = 0;
    while (x != 1 && x) {  // lanes leave at different times
        x = x & 1 ? 3 * x + 1 : x / 2;
        ++steps;
    }
    switch (a[t] & 7) {  // a branch table
    case 0: steps += 11; break;
    case 1: steps *= 3; break;
    case 2: steps -= 5; break;
    case 3: steps ^= 77; break;
    case 4: steps = -steps; break;
    case 5: steps <<= 2; break;
    default: steps += __popc(steps);
    }
    if (t == 9) return;
    o[t] = __shfl_sync(~(1u << 9), steps, (t + 1 == 9 ? 10 : t + 1) & 31);
}

extern "C" __global__ void vectors(const int4* a, longlong2* o, const short2* s, uchar4* u) {
    const int t = threadIdx.x;
    int4 v = a[t];
    o[t] = {static_cast<long long>(v.x) + v.y, static_cast<long long>(v.z) * v.w};
    short2 p = s[t];
    u[t] = {static_cast<unsigned char>(p.x), static_cast<unsigned char>(p.y >> 8), 3, 4};
}
