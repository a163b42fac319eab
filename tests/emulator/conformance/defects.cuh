// Kernels that are right with bug = 0 and wrong with bug = 1.
#pragma once
#include <cassert>
#include <cstdint>

#include "tensor.cuh"

extern "C" __global__ void missing_barrier(const float* x, float* o, int bug) {
    __shared__ float s[64];
    s[threadIdx.x] = x[threadIdx.x];
    if (!bug) __syncthreads();
    o[threadIdx.x] = s[63 - threadIdx.x];
}

extern "C" __global__ void missing_trailing_barrier(const float* x, float* o, int bug) {
    __shared__ float s[64];
    for (int k = 0; k < 4; ++k) {
        s[threadIdx.x] = x[k * 64 + threadIdx.x];
        __syncthreads();
        o[k * 64 + threadIdx.x] = s[63 - threadIdx.x];
        if (!bug) __syncthreads();
    }
}

extern "C" __global__ void missing_syncwarp(const float* x, float* o, int bug) {
    __shared__ float s[32];
    s[threadIdx.x] = x[threadIdx.x];
    if (!bug) __syncwarp();
    o[threadIdx.x] = s[threadIdx.x ^ 1];
}

extern "C" __global__ void off_by_one(const float* x, float* o, int n, int bug) {
    float sum = 0;
    for (int i = threadIdx.x; i < n + bug; i += 32) sum += x[i];
    o[threadIdx.x] = sum;
}

extern "C" __global__ void shared_off_by_one(const float* x, float* o, int bug) {
    __shared__ float s[32], after[32];
    s[threadIdx.x + bug] = x[threadIdx.x];
    after[threadIdx.x] = 1;
    __syncthreads();
    o[threadIdx.x] = s[31 - threadIdx.x] + after[threadIdx.x];
}

extern "C" __global__ void wrong_stride(const float* x, float* o, int rows, int n, int bug) {
    float sum = 0;
    for (int r = 0; r < rows; ++r) sum += x[r * (n + bug) + threadIdx.x];
    o[threadIdx.x] = sum;
}

extern "C" __global__ void missing_tail_mask(const float* x, float* o, int n, int bug) {
    const int i = blockIdx.x * 32 + threadIdx.x;
    if (bug || i < n) o[i] = 2 * x[i];
}

extern "C" __global__ void weak_wait_group(const int4* x, int4* o, int bug) {
    __shared__ int4 s[2][32];
    for (int k = 0; k < 2; ++k) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                     :: "r"(shared_address(&s[k][threadIdx.x])), "l"(x + 32 * k + threadIdx.x));
        asm volatile("cp.async.commit_group;");
    }
    if (bug) asm volatile("cp.async.wait_group 1;" ::: "memory");
    else asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    o[threadIdx.x] = s[1][31 - threadIdx.x];
}

extern "C" __global__ void bank_conflicts(const float* x, float* o, int bug) {
    __shared__ float s[32 * 33];
    const int width = bug ? 32 : 33;  // the padding is dropped
    for (int r = 0; r < 32; ++r) s[r * width + threadIdx.x] = x[r * 32 + threadIdx.x];
    __syncthreads();
    for (int r = 0; r < 32; ++r) o[r * 32 + threadIdx.x] = s[threadIdx.x * width + r];
}

extern "C" __global__ void double_add(const float* x, float* o, int bug) {
    const float v = x[blockIdx.x * 32 + threadIdx.x];
    if (bug) o[threadIdx.x] += v;
    else atomicAdd(&o[threadIdx.x], v);
}

extern "C" __global__ void uninitialised_accumulator(const float* x, float* o, int bug) {
    volatile __shared__ float sum[32];
    if (!bug) sum[threadIdx.x] = 0;
    for (int k = 0; k < 4; ++k) sum[threadIdx.x] += x[k * 32 + threadIdx.x];
    o[threadIdx.x] = sum[threadIdx.x];
}

extern "C" __global__ void uninitialised_output(const float* x, float* o, int bug) {
    if (bug) o[threadIdx.x] += x[threadIdx.x];
    else o[threadIdx.x] = x[threadIdx.x];
}

extern "C" __global__ void overflow_32_bits(const float* x, float* o, int row, int stride, long long first, int bug) {
    const long long at = bug ? (long long)(row * stride) : (long long)row * stride;
    o[threadIdx.x] = x[at - first + threadIdx.x];  // x holds the elements from `first` on
}

extern "C" __global__ void misaligned_vector(const float* x, float* o, int bug) {
    reinterpret_cast<float4*>(o)[threadIdx.x] = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x + bug);
}

extern "C" __global__ void divergent_barrier(const float* x, float* o, int bug) {
    __shared__ float s[64];
    s[threadIdx.x] = x[threadIdx.x];
    if (!bug || threadIdx.x < 40) __syncthreads();
    const float v = s[threadIdx.x];
    __syncthreads();
    s[63 - threadIdx.x] = v;
    __syncthreads();
    o[threadIdx.x] = s[threadIdx.x];
}

extern "C" __global__ void divergent_shuffle(const float* x, float* o, int bug) {
    float v = x[threadIdx.x];
    if (!bug || threadIdx.x < 16) v += __shfl_xor_sync(0xffffffff, v, 16);
    o[threadIdx.x] = v;
}

// The last block to finish adds up what the others left.
extern "C" __global__ void last_block(const float* x, float* part, unsigned* count, float* o, int bug) {
    part[blockIdx.x] = x[blockIdx.x];
    if (bug != 1) __threadfence();
    if (atomicAdd(count, 1u) + 1 == gridDim.x) {
        if (bug != 2) __threadfence();
        float sum = 0;
        for (unsigned b = 0; b < gridDim.x; ++b) sum += part[b];
        *o = sum;
    }
}

// A block waits for the block before it: with bug = 1 the flag is read as ordinary memory.
extern "C" __global__ void relay(const float* x, float* o, int* flags, int bug) {
    const int b = blockIdx.x;
    if (b > 0) {
        int seen = 0;
        while (!seen) {
            if (bug) asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flags + b - 1) : "memory");
            else asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flags + b - 1) : "memory");
        }
    }
    o[b] = x[b] + (b ? o[b - 1] : 0);
    asm volatile("st.release.gpu.global.u32 [%0], 1;" :: "l"(flags + b) : "memory");
}

extern "C" __global__ void nobody_arrives(float* o, int bug) {
    __shared__ uint64_t barrier;
    const uint32_t b = shared_address(&barrier);
    if (threadIdx.x == 0) init_mbarrier(b, 32 + bug);
    __syncthreads();
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(b) : "memory");
    wait_parity(b, 0);
    o[threadIdx.x] = 1;
}

extern "C" __global__ void uninitialised_mbarrier(float* o, int bug) {
    __shared__ uint64_t barrier;
    const uint32_t b = shared_address(&barrier);
    if (threadIdx.x == 0 && !bug) init_mbarrier(b, 32);
    __syncthreads();
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(b) : "memory");
    o[threadIdx.x] = 1;
}

extern "C" __global__ void endless_loop(float* o, int bug) {
    volatile float* p = o + threadIdx.x;
    do {
        *p = *p + 1;
    } while (bug || *p < 10);
}

extern "C" __global__ void missing_proxy_fence(const float* x, float* o, int bug) {
    __shared__ __align__(128) float s[32];
    s[threadIdx.x] = x[threadIdx.x];
    if (!bug) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 128;"
                     :: "l"(o), "r"(shared_address(s)) : "memory");
        asm volatile("cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;" ::: "memory");
    }
}

extern "C" __global__ void read_only_of_written(const float* x, float* o, int bug) {
    o[threadIdx.x] = x[threadIdx.x];
    o[32 + threadIdx.x] = 2 * (bug ? __ldg(o + threadIdx.x) : *static_cast<volatile float*>(o + threadIdx.x));
}

extern "C" __global__ void failing_assertion(const float* x, float* o, int bug) {
    assert(x[threadIdx.x] < 100 && !bug);
    o[threadIdx.x] = x[threadIdx.x];
}

extern "C" __global__ void local_out_of_bounds(const int* x, int* o, int bug) {
    int local[8];
    for (int k = 0; k < 8; ++k) local[k] = x[threadIdx.x] + k;
    o[threadIdx.x] = local[(x[threadIdx.x] & 7) + 64 * bug];
}
