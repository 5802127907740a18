// ldmatrix, stmatrix and mma.sync. Lane l = 4 g + t holds of a 16 x 8 fp32 or s32 tile
//
//     columns      2t 2t+1          of A (16 x k) register r: row g + 8 (r & 1), the t-th word of k's half r >> 1;
//     row g        c0  c1           of B (k x 8) register r: column g, the t-th word of k's half r
//     row g + 8    c2  c3
#include "numbers.h"

namespace ptx {
float added_in_14_bits(float sum, const float* a, const float* b, int k, int sign);

struct MatrixArg {
    u32 address;
    u32* words;
};

void ldmatrix(Thread& T, int matrices, bool transposed, u32 address, u32* out) {
    check_converged(T);
    if (T.lane < 8 * matrices) check_shared(T, address, 16, READ, 16);
    MatrixArg mine{address, out};
    collective(T, LDMATRIX, ~0u, &mine, [&](void** arg) {
        for (int m = 0; m < matrices; m++)
            for (int lane = 0; lane < 32; lane++) {
                auto half = [&](int row, int column) {
                    u16 h;
                    memcpy(&h, B.shared + (((MatrixArg*)arg[m * 8 + row])->address - SHARED_BASE) + 2 * column, 2);
                    return u32(h);
                };
                int g = lane >> 2, t = lane & 3;
                u32 low = transposed ? half(2 * t, g) : half(g, 2 * t),
                    high = transposed ? half(2 * t + 1, g) : half(g, 2 * t + 1);
                ((MatrixArg*)arg[lane])->words[m] = low | high << 16;
            }
    });
}

void stmatrix(Thread& T, int matrices, bool transposed, u32 address, const u32* in) {
    check_converged(T);
    if (T.lane < 8 * matrices) check_shared(T, address, 16, WRITE, 16);
    MatrixArg mine{address, (u32*)in};
    collective(T, STMATRIX, ~0u, &mine, [&](void** arg) {
        for (int m = 0; m < matrices; m++)
            for (int lane = 0; lane < 32; lane++)
                for (int e = 0; e < 2; e++) {
                    int g = lane >> 2, c = 2 * (lane & 3) + e, row = transposed ? c : g, column = transposed ? g : c;
                    u16 h = u16(((MatrixArg*)arg[lane])->words[m] >> (16 * e));
                    memcpy(B.shared + (((MatrixArg*)arg[m * 8 + row])->address - SHARED_BASE) + 2 * column, &h, 2);
                }
    });
}

int bits(Type t) { return t == BF16 || t == F16 ? 16 : t == S4 || t == U4 || t == E2M1 ? 4 : t == TF32 ? 32 : 8; }

float decode_float(Type t, const u8* p, int i) {
    u16 h;
    u32 w;
    if (t == E4M3) return e4m3(p[i]);
    if (t == E5M2) return e5m2(p[i]);
    if (t == E2M1) return e2m1(p[i / 2] >> (4 * (i & 1)) & 15);
    if (t == TF32) return memcpy(&w, p + 4 * i, 4), f32(w & 0xffffe000u);
    memcpy(&h, p + 2 * i, 2);
    return t == BF16 ? bf16(h) : f16(h);
}

s32 decode_int(Type t, const u8* p, int i) {
    if (t == S8) return s8(p[i]);
    if (t == U8) return p[i];
    int v = p[i / 2] >> (4 * (i & 1)) & 15;
    return t == S4 ? v - ((v & 8) << 1) : v;
}

struct MmaArg {
    u32* d;
    const u32 *a, *b, *c;
};

template <class V, class Decode>
static void unpack(int k, Type ta, Type tb, void** arg, Decode decode, V* a, V* b) {
    int per_a = 32 / bits(ta), per_b = 32 / bits(tb);
    int words_a = 16 * k * bits(ta) / 1024, words_b = 8 * k * bits(tb) / 1024;
    for (int lane = 0; lane < 32; lane++) {
        const MmaArg* m = (const MmaArg*)arg[lane];
        int g = lane >> 2, t = lane & 3;
        for (int r = 0; r < words_a; r++)
            for (int e = 0; e < per_a; e++)
                a[(g + 8 * (r & 1)) * k + (t + 4 * (r >> 1)) * per_a + e] = V(decode(ta, (const u8*)&m->a[r], e));
        for (int r = 0; r < words_b; r++)
            for (int e = 0; e < per_b; e++)
                b[((t + 4 * r) * per_b + e) * 8 + g] = V(decode(tb, (const u8*)&m->b[r], e));
    }
}

template <class V>
static void multiply(int k, const V* a, const V* b, V* c) {
    for (int i = 0; i < 16; i++)
        for (int x = 0; x < k; x++)
            for (int j = 0; j < 8; j++) c[i * 8 + j] += a[i * k + x] * b[x * 8 + j];
}

// Ada's sums of 8-bit floats: 16 products at a time.
static void multiply_in_14_bits(int k, const float* a, const float* b, float* c) {
    float column[16];
    for (int x = 0; x < k; x += 16)
        for (int j = 0; j < 8; j++) {
            for (int e = 0; e < 16; e++) column[e] = b[(x + e) * 8 + j];
            for (int i = 0; i < 16; i++) c[i * 8 + j] = added_in_14_bits(c[i * 8 + j], a + i * k + x, column, 16, 1);
        }
}

static float read_float(Type type, const u32* c, int i) {
    return type == F16 ? f16(u16(c[i / 2] >> (16 * (i & 1)))) : f32(c[i]);
}

static void write_float(Type type, u32* d, int i, float v) {
    if (type != F16) return (void)(d[i] = of_f32(v));
    d[i / 2] = i & 1 ? (d[i / 2] & 0xffff) | u32(of_f16(v)) << 16 : of_f16(v);
}

static void multiply_floats(int k, Type ta, Type tb, Type td, bool in_14_bits, void** arg) {
    float a[16 * 64], b[64 * 8], c[128];
    unpack<float>(k, ta, tb, arg, decode_float, a, b);
    auto at = [](int lane, int i) { return ((lane >> 2) + 8 * (i >> 1)) * 8 + (lane & 3) * 2 + (i & 1); };
    for (int q = 0; q < 128; q++) c[at(q / 4, q % 4)] = read_float(td, ((MmaArg*)arg[q / 4])->c, q % 4);
    in_14_bits ? multiply_in_14_bits(k, a, b, c) : multiply(k, a, b, c);
    for (int q = 0; q < 128; q++) write_float(td, ((MmaArg*)arg[q / 4])->d, q % 4, c[at(q / 4, q % 4)]);
}

static void multiply_ints(int k, Type ta, Type tb, bool saturate, void** arg) {
    s64 a[16 * 64], b[64 * 8], c[128];
    unpack<s64>(k, ta, tb, arg, decode_int, a, b);
    auto at = [](int lane, int i) { return ((lane >> 2) + 8 * (i >> 1)) * 8 + (lane & 3) * 2 + (i & 1); };
    for (int q = 0; q < 128; q++) c[at(q / 4, q % 4)] = s32(((MmaArg*)arg[q / 4])->c[q % 4]);
    multiply(k, a, b, c);
    for (int q = 0; q < 128; q++) {
        s64 v = c[at(q / 4, q % 4)];
        ((MmaArg*)arg[q / 4])->d[q % 4] = saturate ? u32(narrowed<s32>(v)) : u32(v);
    }
}

void mma(Thread& T, int k, Type ta, Type tb, Type td, bool integer, bool saturate, bool in_14_bits, u32* d,
         const u32* a, const u32* b, const u32* c) {
    check_converged(T);
    MmaArg mine{d, a, b, c};
    collective(T, MMA, ~0u, &mine, [&](void** arg) {
        integer ? multiply_ints(k, ta, tb, saturate, arg) : multiply_floats(k, ta, tb, td, in_14_bits, arg);
    });
}

struct ScaledArg {
    MmaArg words;  // first: `unpack` reads it
    BlockScales a, b;
};

static float scale_of(Thread& T, Type type, const BlockScales& from, int block) {
    u8 byte = u8(from.word >> (8 * (from.byte + block)));
    if (type == UE8M0) return ue8m0(byte);
    if (byte & 128) fail(T, "Misuse", "ue4m3 scale 0x%02x: its highest bit is not 0", byte);
    return e4m3(byte);
}

// The scales of row i of A lie in lane 4 (i % 8) + 2 thread + i / 8, those of column j of B in lane 4 j + thread.
void mma_scaled(Thread& T, int blocks, Type scale_type, u32* d, const u32* a, const u32* b, const u32* c,
                BlockScales scale_a, BlockScales scale_b) {
    check_converged(T);
    ScaledArg mine{{d, a, b, c}, scale_a, scale_b};
    collective(T, MMA, ~0u, &mine, [&](void** arg) {
        constexpr int k = 64;
        float fa[16 * k], fb[k * 8], sum[128];
        unpack<float>(k, E2M1, E2M1, arg, decode_float, fa, fb);
        for (int q = 0; q < 128; q++) {
            int lane = q / 4, i = (lane >> 2) + 8 * (q % 4 >> 1), j = (lane & 3) * 2 + (q & 1);
            const BlockScales& of_row = ((ScaledArg*)arg[4 * (i % 8) + 2 * scale_a.thread + i / 8])->a;
            const BlockScales& of_column = ((ScaledArg*)arg[4 * j + scale_b.thread])->b;
            sum[q] = f32(((ScaledArg*)arg[lane])->words.c[q % 4]);
            for (int block = 0; block < blocks; block++) {
                double scales =
                    double(scale_of(T, scale_type, of_row, block)) * double(scale_of(T, scale_type, of_column, block));
                for (int x = block * k / blocks; x < (block + 1) * k / blocks; x++)
                    sum[q] += float(double(fa[i * k + x] * fb[x * 8 + j]) * scales);
            }
        }
        for (int q = 0; q < 128; q++) ((ScaledArg*)arg[q / 4])->words.d[q % 4] = of_f32(sum[q]);
    });
}
}  // namespace ptx
