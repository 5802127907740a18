// d[64][32] = c + Σ a[i] · b[i]ᵀ over `products` products of tiles of 16 x 8, a warp each: a [products][64][32],
// b [products][32][32] bytes of E4M3.
#include <cstdint>

extern "C" __global__ void __launch_bounds__(32)
    fp8_sums_sm89(const uint32_t* a, const uint32_t* b, const float* c, float* d, int products) {
    const int lane = threadIdx.x, g = lane / 4, word = lane % 4;
    const int row = blockIdx.x * 16 + g, column = blockIdx.y * 8 + g;
    auto at = [&](int e) { return (row + e / 2 * 8) * 32 + blockIdx.y * 8 + 2 * word + e % 2; };
    float sum[4];
    for (int e = 0; e < 4; ++e) sum[e] = c[at(e)];
    for (int i = 0; i < products; ++i, a += 64 * 8, b += 32 * 8) {
        uint32_t x[4], y[2];
        for (int r = 0; r < 4; ++r) x[r] = a[(row + r % 2 * 8) * 8 + r / 2 * 4 + word];
        for (int r = 0; r < 2; ++r) y[r] = b[column * 8 + r * 4 + word];
        asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
    }
    for (int e = 0; e < 4; ++e) d[at(e)] = sum[e];
}
