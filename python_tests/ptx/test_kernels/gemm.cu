// C[m,n] = sum_k A[m,k] B[n,k], int8, exact: 64 x 64 tiles, two stages of cp.async, ldmatrix, mma.sync m16n8k32.
// A shared row is 64 bytes; its 16-byte chunks are permuted so that ldmatrix finds eight rows in different banks.
#include <cstdint>
constexpr int TILE = 64, STAGES = 2, THREADS = 128;

__device__ int place(int row, int chunk) { return row * TILE + ((chunk ^ (row >> 1 & 3)) * 16); }
__device__ uint32_t address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ void load_tile(int8_t* tile, const int8_t* x, int rows, int row0, int k, int k0) {
#pragma unroll 1
    for (int i = threadIdx.x; i < TILE * 4; i += THREADS) {
        int row = i / 4, chunk = i % 4;
        bool inside = row0 + row < rows && k0 + chunk * 16 < k;
        const int8_t* from = inside ? x + (size_t)(row0 + row) * k + k0 + chunk * 16 : x;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(tile + place(row, chunk))),
                     "l"(from), "r"(inside ? 16 : 0)
                     : "memory");
    }
}

__device__ void multiply(int (&sum)[2][4][4], const int8_t* a, const int8_t* b, int row0, int column0, int half) {
    int lane = threadIdx.x % 32;
    uint32_t fa[2][4], fb[4][2];
    for (int i = 0; i < 2; i++)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(fa[i][0]), "=r"(fa[i][1]), "=r"(fa[i][2]), "=r"(fa[i][3])
                     : "r"(address(a + place(row0 + i * 16 + lane % 16, half * 2 + lane / 16)))
                     : "memory");
    for (int j = 0; j < 4; j++)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                     : "=r"(fb[j][0]), "=r"(fb[j][1])
                     : "r"(address(b + place(column0 + j * 8 + lane % 8, half * 2 + lane / 8 % 2)))
                     : "memory");
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++)
            asm volatile(
                "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                : "+r"(sum[i][j][0]), "+r"(sum[i][j][1]), "+r"(sum[i][j][2]), "+r"(sum[i][j][3])
                : "r"(fa[i][0]), "r"(fa[i][1]), "r"(fa[i][2]), "r"(fa[i][3]), "r"(fb[j][0]), "r"(fb[j][1]));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gemm(const int8_t* a, const int8_t* b, int* c, int m, int n, int k) {
    extern __shared__ __align__(128) int8_t stages[];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m0 = blockIdx.y * TILE, n0 = blockIdx.x * TILE;
    int row0 = warp / 2 * 32, column0 = warp % 2 * 32, sum[2][4][4] = {};
    auto load = [&](int stage, int k0) {
        load_tile(stages + stage * 2 * TILE * TILE, a, m, m0, k, k0);
        load_tile(stages + (stage * 2 + 1) * TILE * TILE, b, n, n0, k, k0);
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    load(0, 0);
#pragma unroll 1
    for (int k0 = 0, stage = 0; k0 < k; k0 += TILE, stage ^= 1) {
        if (k0 + TILE < k) load(stage ^ 1, k0 + TILE);
        if (k0 + TILE < k)
            asm volatile("cp.async.wait_group 1;" ::: "memory");
        else
            asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncthreads();
#pragma unroll 1
        for (int half = 0; half < 2; half++)
            multiply(sum, stages + stage * 2 * TILE * TILE, stages + (stage * 2 + 1) * TILE * TILE, row0, column0,
                     half);
        __syncthreads();
    }
    for (int q = 0; q < 32; q++) {
        int i = q / 16, j = q / 4 % 4, e = q % 4;
        int row = m0 + row0 + i * 16 + lane / 4 + e / 2 * 8, column = n0 + column0 + j * 8 + lane % 4 * 2 + e % 2;
        if (row < m && column < n) c[(size_t)row * n + column] = sum[i][j][e];
    }
}
