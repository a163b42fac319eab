// Tensor cores and asynchronous copies. Fragments are loaded by the tables of the PTX ISA.
#pragma once
#include <cstdint>

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// P elements of type T in a register: A [16, K], B [K, 8] given as its transpose [8, K], C and D [16, 8].
template <class T, int K>
struct Fragments {
    static constexpr int P = 4 / sizeof(T), A = K * sizeof(T) / 8, B = A / 2;
    uint32_t a[A], b[B];
    __device__ Fragments(const T* x, const T* y) {
        const int g = threadIdx.x / 4, t = threadIdx.x % 4;
        for (int r = 0; r < A; ++r) a[r] = *(const uint32_t*)&x[(g + 8 * (r & 1)) * K + t * P + 4 * P * (r / 2)];
        for (int r = 0; r < B; ++r) b[r] = *(const uint32_t*)&y[g * K + t * P + 4 * P * r];
    }
};

template <class C>
__device__ void store(C* o, const C* c) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    for (int r = 0; r < 4; ++r) o[(g + 8 * (r / 2)) * 8 + 2 * t + (r & 1)] = c[r];
}

#define MMA_4_2(NAME, T, K, C, CONSTRAINT, INSTRUCTION)                                                \
    extern "C" __global__ void NAME(const T* x, const T* y, C* o) {                                    \
        Fragments<T, K> f(x, y);                                                                       \
        C c[4] = {1, 2, 3, 4};                                                                         \
        asm volatile(INSTRUCTION " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"    \
                     : "+" CONSTRAINT(c[0]), "+" CONSTRAINT(c[1]), "+" CONSTRAINT(c[2]),               \
                       "+" CONSTRAINT(c[3])                                                            \
                     : "r"(f.a[0]), "r"(f.a[1]), "r"(f.a[2]), "r"(f.a[3]), "r"(f.b[0]), "r"(f.b[1]));  \
        store(o, c);                                                                                   \
    }
MMA_4_2(mma_bf16, uint16_t, 16, float, "f", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
MMA_4_2(mma_f16, uint16_t, 16, float, "f", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
MMA_4_2(mma_tf32, float, 8, float, "f", "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
MMA_4_2(mma_s8, int8_t, 32, int, "r", "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32")
MMA_4_2(mma_u8, uint8_t, 32, int, "r", "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32")
MMA_4_2(mma_e5m2, uint8_t, 32, float, "f", "mma.sync.aligned.m16n8k32.row.col.f32.e5m2.e5m2.f32")
MMA_4_2(mma_e4m3, uint8_t, 32, float, "f", "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32")

extern "C" __global__ void mma_f16_f16(const uint16_t* x, const uint16_t* y, uint16_t* o) {  // half accumulators
    Fragments<uint16_t, 8> f(x, y);
    uint32_t c[2] = {0, 0};
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3}, {%4}, {%0, %1};"
                 : "+r"(c[0]), "+r"(c[1]) : "r"(f.a[0]), "r"(f.a[1]), "r"(f.b[0]));
    uint16_t h[4] = {uint16_t(c[0]), uint16_t(c[0] >> 16), uint16_t(c[1]), uint16_t(c[1] >> 16)};
    store(o, h);
}

extern "C" __global__ void mma_f64(const double* x, const double* y, double* o) {  // [8, 4] x [4, 8]
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    double c0 = 1, c1 = 2;
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+d"(c0), "+d"(c1) : "d"(x[g * 4 + t]), "d"(y[g * 4 + t]));
    o[g * 8 + 2 * t] = c0;
    o[g * 8 + 2 * t + 1] = c1;
}

// Two 8 x 8 tiles through ldmatrix.trans, movmatrix and stmatrix: o is the tiles as they were, then
// their transposes.
extern "C" __global__ void matrices(const uint16_t* x, uint16_t* o) {
    __shared__ __align__(16) uint16_t in[128], out[256];
    const int t = threadIdx.x;
    for (int k = t; k < 128; k += 32) in[k] = x[k];
    __syncwarp();
    uint32_t a, b, c, d;
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(a), "=r"(b) : "r"(shared_address(&in[t % 16 * 8])));
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(c) : "r"(a));
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(b));
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(shared_address(&out[t * 8])), "r"(c), "r"(d), "r"(a), "r"(b) : "memory");
    __syncwarp();
    for (int k = t; k < 256; k += 32) o[k] = out[k];
}

// ---- asynchronous copies ----

extern "C" __global__ void cp_async(const int4* x, int4* o, int n) {  // the tail is filled with zeros
    __shared__ int4 buffer[64];
    const int t = threadIdx.x;
    const int bytes = t < n ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(&buffer[t])), "l"(x + t), "r"(bytes));
    asm volatile("cp.async.commit_group; cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    o[t] = buffer[t ^ 1];
}

__device__ void wait_parity(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    } while (!done);
}

__device__ void init_mbarrier(uint32_t barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Bulk copies in through an mbarrier and out by a group, tile after tile through one buffer.
extern "C" __global__ void bulk_copy(const float* x, float* o, int tiles) {
    __shared__ __align__(128) float buffer[256];
    __shared__ uint64_t barrier;
    const uint32_t b = shared_address(&barrier), to = shared_address(buffer);
    if (threadIdx.x == 0) init_mbarrier(b, 1);
    __syncthreads();
    for (int k = 0; k < tiles; ++k) {
        if (threadIdx.x == 0) {
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 1024;" :: "r"(b) : "memory");
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 1024, [%2];"
                         :: "r"(to), "l"(x + k * 256), "r"(b) : "memory");
        }
        wait_parity(b, k & 1);
        for (int i = threadIdx.x; i < 256; i += blockDim.x) buffer[i] *= 2;
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
        if (threadIdx.x == 0) {
            asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 1024;"
                         :: "l"(o + k * 256), "r"(to) : "memory");
            asm volatile("cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;" ::: "memory");
        }
        __syncthreads();
    }
}

// Blocks of a cluster read one another's shared memory.
extern "C" __global__ void __cluster_dims__(4, 1, 1) cluster(const int* x, int* o) {
    __shared__ int mine[32];
    uint32_t rank, address;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    mine[threadIdx.x] = x[blockIdx.x * 32 + threadIdx.x];
    asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(address) : "r"(shared_address(&mine[31 - threadIdx.x])), "r"((rank + 1) % 4));
    int theirs;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(theirs) : "r"(address) : "memory");
    o[blockIdx.x * 32 + threadIdx.x] = theirs;
    asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}

struct alignas(64) Map {
    char bytes[128];
};

__device__ void load_tile(uint32_t to, const Map* map, int column, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3}], [%4];"
                 :: "r"(to), "l"(map), "r"(column), "r"(0), "r"(barrier) : "memory");
}

// [64, 64] bf16 tiles by tensor maps in any swizzle, then wgmma: o = a b^T. `high`: the upper bits of the
// descriptors; `columns`: of a tile.

extern "C" __global__ void __launch_bounds__(128) wgmma_swizzles(
    const __grid_constant__ Map a_map, const __grid_constant__ Map b_map, float* o, uint64_t high, int columns,
    int bug) {
    extern __shared__ __align__(1024) uint8_t tiles[];  // [64 / columns][64][columns] of a, then of b
    __shared__ uint64_t barrier;
    const uint32_t b = shared_address(&barrier), base = shared_address(tiles);
    if (threadIdx.x == 0) {
        init_mbarrier(b, 1);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 16384;" :: "r"(b) : "memory");
        for (int k = 0; k < 64; k += columns) {
            load_tile(base + k * 128, &a_map, k, b);
            load_tile(base + 8192 + k * 128, &b_map, k, b);
        }
    }
    __syncthreads();
    if (bug != 1) wait_parity(b, 0);
    float d[4] = {};  // n = 8
    for (int n = 0; n < 64; n += 8) {
        d[0] = d[1] = d[2] = d[3] = 0;
        if (bug != 2) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        for (int k = 0; k < 64; k += 16) {
            const uint32_t tile = k / columns * columns * 128 + k % columns * 2;
            const uint64_t da = high | (base + tile) >> 4;
            const uint64_t db = high | (base + 8192 + tile + n * columns * 2) >> 4;
            asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"
                         " {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                         : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(da), "l"(db));
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (bug != 3) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        if (bug == 4 && threadIdx.x == 0) tiles[0] = 0;
        const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, col = n + threadIdx.x % 4 * 2;
        for (int r = 0; r < 4; ++r) o[(row + 8 * (r / 2)) * 64 + col + (r & 1)] = d[r];
    }
}
