// Asynchronous kernels that are right with bug = 0 and wrong with bug = 1.
#pragma once
#include <cstdint>

#include "tensor.cuh"

namespace {

__device__ void expect_bytes(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}

__device__ void load_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

__device__ void store_bytes(void* to, uint32_t from, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2; cp.async.bulk.commit_group;"
                 :: "l"(to), "r"(from), "r"(bytes) : "memory");
}

__device__ void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
__device__ void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
}

// Matrices of rows of 16 bytes without swizzle: eight rows 128 bytes, the next 16 bytes of depth `rows` x 16 on.
__device__ uint64_t matrix(const void* at, int rows) {
    return shared_address(at) >> 4 | uint64_t(rows) << 16 | uint64_t(8) << 32;
}

__device__ void wgmma_n8(float* d, uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
}

__device__ uint32_t in_peer(const void* mine, uint32_t rank) {
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(mine)), "r"(rank));
    return address;
}

__device__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}

__device__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

}  // namespace

// ---- mbarriers and bulk copies ----

extern "C" __global__ void wrong_parity(const float* x, float* o, int bug) {
    __shared__ __align__(128) float s[32];
    __shared__ uint64_t barrier;
    const uint32_t b = shared_address(&barrier);
    if (threadIdx.x == 0) init_mbarrier(b, 1);
    __syncthreads();
    if (threadIdx.x == 0) {
        expect_bytes(b, 128);
        load_bytes(shared_address(s), x, 128, b);
    }
    wait_parity(b, bug);
    o[threadIdx.x] = s[threadIdx.x];
    wait_parity(b, 0);
}

extern "C" __global__ void bytes_nobody_expects(const float* x, float* o, int bug) {
    __shared__ __align__(128) float s[32];
    __shared__ uint64_t barrier;
    const uint32_t b = shared_address(&barrier);
    if (threadIdx.x == 0) init_mbarrier(b, 1);
    __syncthreads();
    if (threadIdx.x == 0) {
        if (bug) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(b) : "memory");
        else expect_bytes(b, 128);
        load_bytes(shared_address(s), x, 128, b);
    }
    wait_parity(b, 0);
    o[threadIdx.x] = s[threadIdx.x];
}

extern "C" __global__ void too_few_bytes(const float* x, float* o, int bug) {
    __shared__ __align__(128) float s[32];
    __shared__ uint64_t barrier;
    const uint32_t b = shared_address(&barrier);
    if (threadIdx.x == 0) init_mbarrier(b, 1);
    __syncthreads();
    if (threadIdx.x == 0) {
        expect_bytes(b, bug ? 64 : 128);
        load_bytes(shared_address(s), x, 128, b);
    }
    wait_parity(b, 0);
    o[threadIdx.x] = s[threadIdx.x];
}

extern "C" __global__ void unpublished_mbarrier(const float* x, float* o, int bug) {
    __shared__ __align__(128) float s[32];
    __shared__ uint64_t barrier;
    const uint32_t b = shared_address(&barrier);
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(b) : "memory");
        if (!bug) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        expect_bytes(b, 128);
        load_bytes(shared_address(s), x, 128, b);
    }
    wait_parity(b, 0);
    o[threadIdx.x] = s[threadIdx.x];
}

// A copy overwrites what ordinary stores have written: that, too, wants the fence.
extern "C" __global__ void unfenced_overwrite(const float* x, float* o, int bug) {
    __shared__ __align__(128) float s[32];
    __shared__ uint64_t barrier;
    const uint32_t b = shared_address(&barrier);
    if (threadIdx.x == 0) init_mbarrier(b, 1);
    s[threadIdx.x] = x[threadIdx.x];
    if (!bug) fence_proxy();
    __syncthreads();
    if (threadIdx.x == 0) {
        expect_bytes(b, 128);
        load_bytes(shared_address(s), x, 128, b);
    }
    wait_parity(b, 0);
    o[threadIdx.x] = s[threadIdx.x];
}

// Waiting for the reads of a store does not make visible what it has written.
extern "C" __global__ void wait_for_reads_only(const float* x, float* o, int bug) {
    __shared__ __align__(128) float s[32];
    s[threadIdx.x] = x[threadIdx.x];
    fence_proxy();
    __syncthreads();
    if (threadIdx.x == 0) {
        store_bytes(o, shared_address(s), 128);
        if (bug) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        else wait_stores();
    }
    __syncthreads();
    s[threadIdx.x] = 0;
    o[32 + threadIdx.x] = o[threadIdx.x];
}

extern "C" __global__ void early_overwrite(const float* x, float* o, int bug) {
    __shared__ __align__(128) float s[32];
    s[threadIdx.x] = x[threadIdx.x];
    fence_proxy();
    __syncthreads();
    if (threadIdx.x == 0) store_bytes(o, shared_address(s), 128);
    if (!bug && threadIdx.x == 0) wait_stores();
    __syncthreads();
    s[threadIdx.x] = 0;
    if (threadIdx.x == 0) wait_stores();
}

extern "C" __global__ void exit_before_the_store(const float* x, float* o, int bug) {
    __shared__ __align__(128) float s[32];
    s[threadIdx.x] = x[threadIdx.x];
    fence_proxy();
    __syncthreads();
    if (threadIdx.x == 0) {
        store_bytes(o, shared_address(s), 128);
        if (!bug) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    }
}

// The last tile is prefetched and never waited for.
extern "C" __global__ void exit_before_the_load(const float* x, float* o, int bug) {
    __shared__ __align__(128) float s[2][32];
    __shared__ uint64_t barrier;
    const uint32_t b = shared_address(&barrier);
    if (threadIdx.x == 0) init_mbarrier(b, 1);
    __syncthreads();
    for (int k = 0; k < 2; ++k) {
        if (threadIdx.x == 0) {
            expect_bytes(b, 128);
            load_bytes(shared_address(s[k]), x + 32 * k, 128, b);
        }
        if (k == 0 || !bug) wait_parity(b, k);
    }
    o[threadIdx.x] = s[0][threadIdx.x];
}

extern "C" __global__ void uninitialised_store(const float* x, float* o, int bug) {
    __shared__ __align__(128) float s[64];
    s[threadIdx.x] = x[threadIdx.x];
    if (!bug) s[32 + threadIdx.x] = 0;
    fence_proxy();
    __syncthreads();
    if (threadIdx.x == 0) {
        store_bytes(o, shared_address(s), 256);
        wait_stores();
    }
}

// ---- clusters ----

// Block 1 hands a value to block 0 through an mbarrier of block 0.
extern "C" __global__ void __cluster_dims__(2, 1, 1) far_arrival(const float* x, float* o, int bug) {
    __shared__ float s[32];
    __shared__ uint64_t barrier;
    const uint32_t b = shared_address(&barrier);
    if (threadIdx.x == 0) init_mbarrier(b, 32);
    cluster_sync();
    if (cluster_rank() == 1) {
        asm volatile("st.shared::cluster.f32 [%0], %1;"
                     :: "r"(in_peer(&s[threadIdx.x], 0)), "f"(x[threadIdx.x]) : "memory");
        const uint32_t far = in_peer(&barrier, 0);
        if (bug == 1) asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" :: "r"(far) : "memory");
        else asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" :: "r"(far) : "memory");
    } else {
        uint32_t done;
        do {
            if (bug == 2) {
                asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;"
                             " selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(b) : "memory");
            } else {
                asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;"
                             " selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(b) : "memory");
            }
        } while (!done);
        o[threadIdx.x] = s[31 - threadIdx.x];
    }
    cluster_sync();
}

// Without the last barrier a block may be gone while its neighbour reads from it.
extern "C" __global__ void __cluster_dims__(2, 1, 1) exit_before_the_peer(const float* x, float* o, int bug) {
    __shared__ float s[32];
    s[threadIdx.x] = x[threadIdx.x];
    cluster_sync();
    float v;
    asm volatile("ld.shared::cluster.f32 %0, [%1];"
                 : "=f"(v) : "r"(in_peer(&s[threadIdx.x], cluster_rank() ^ 1)) : "memory");
    o[cluster_rank() * 32 + threadIdx.x] = v;
    if (!bug) cluster_sync();
}

// A flag in global memory from one cluster to another, released to the own cluster only.
extern "C" __global__ void narrow_scope(const float* x, float* o, int* flag, int bug) {
    if (blockIdx.x == 0) {
        o[1] = *x;
        if (bug) asm volatile("st.release.cluster.global.u32 [%0], 1;" :: "l"(flag) : "memory");
        else asm volatile("st.release.gpu.global.u32 [%0], 1;" :: "l"(flag) : "memory");
        return;
    }
    int seen = 0;
    while (!seen) {
        if (bug) asm volatile("ld.acquire.cluster.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
        else asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
    }
    o[0] = o[1];
}

// ---- wgmma: o = a b^T of [64, 16] and [8, 16], by ordinary stores to shared memory ----

// bug: 1 no fence.proxy.async, 2 a row of b left out, 3 no wait before the results, 4 a group too few waited
// for, 5 no commit, 6 operands overwritten before the wait, 7 three of four warps, 8 no wgmma.fence,
// 9 accumulators in flight as operands.
extern "C" __global__ void __launch_bounds__(128) wgmma_defects(const uint16_t* x, const uint16_t* y, float* o,
                                                                int bug) {
    __shared__ __align__(128) uint16_t a[2][64][8], b[2][8][8];
    const int t = threadIdx.x, row = t / 32 * 16 + t % 32 / 4, col = t % 4 * 2;
    for (int k = t; k < 1024; k += 128) a[k % 16 / 8][k / 16][k % 8] = x[k];
    if (bug != 2 || t < 112) b[t % 16 / 8][t / 16][t % 8] = y[t];
    if (bug != 1) fence_proxy();
    __syncthreads();
    float d[4] = {}, e[4] = {};
    if (bug == 7 && t >= 96) return;
    if (bug != 8) wgmma_fence();
    wgmma_n8(d, matrix(a, 64), matrix(b, 8));
    wgmma_commit();
    wgmma_n8(e, matrix(a, 64), matrix(b, 8));
    if (bug == 9) {
        const uint32_t* f = reinterpret_cast<const uint32_t*>(d);
        asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8,"
                     " 1, 1, 1, 0;" : "+f"(e[0]), "+f"(e[1]), "+f"(e[2]), "+f"(e[3])
                     : "r"(f[0]), "r"(f[1]), "r"(f[2]), "r"(f[3]), "l"(matrix(b, 8)));
    }
    if (bug != 5) wgmma_commit();
    if (bug == 6) a[t / 64][t % 64][0] = 0;
    if (bug == 4) wgmma_wait<1>();
    else if (bug != 3) wgmma_wait<0>();
    for (int r = 0; r < 4; ++r) o[(row + 8 * (r / 2)) * 8 + col + (r & 1)] = (d[r] + e[r]) / 2;
    wgmma_wait<0>();
}
