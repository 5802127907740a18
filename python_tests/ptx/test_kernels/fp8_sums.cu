// d[64][32] = c + Σ a[i] · b[i]ᵀ over `products` products of a warpgroup: a [products][64][32], b [products][32][32]
// bytes of E4M3.
#include "device_sm90.h"
using namespace llmfp4::cuda;

extern "C" __global__ void __launch_bounds__(128)
    fp8_sums(const uint32_t* a, const uint4* b, const float* c, float* d, int products) {
    __shared__ __align__(128) uint4 x[4][2][8];
    const int t = threadIdx.x, lane = t % 32, row = t / 32 * 16 + lane / 4, word = lane % 4;
    auto at = [&](int j, int e) { return (row + e / 2 * 8) * 32 + 8 * j + 2 * word + e % 2; };
    float sum[4][4];
    for (int j = 0; j < 4; ++j)
        for (int e = 0; e < 4; ++e) sum[j][e] = c[at(j, e)];
    for (int i = 0; i < products; ++i, a += 64 * 8, b += 32 * 2) {
        __syncthreads();
        if (t < 64) x[t / 16][t % 2][t / 2 % 8] = b[t];
        barriers_ready();
        __syncthreads();
        uint32_t words[4];
        for (int r = 0; r < 4; ++r) words[r] = a[(row + r % 2 * 8) * 8 + r / 2 * 4 + word];
        for (auto& w : words) settle(w);
        products_begin();
        multiply_add(E4M3{}, Columns<32>{}, sum, words, blocks_at(x, sizeof x[0]));
        products_commit();
        wait_for_products();
        for (auto& four : sum)
            for (float& v : four) settle(v);
    }
    for (int j = 0; j < 4; ++j)
        for (int e = 0; e < 4; ++e) d[at(j, e)] = sum[j][e];
}
