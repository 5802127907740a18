// The vocabulary of AMX: eight tile registers of 16 rows x 64 bytes. Four hold sums, two the left side, two the right.
//
//              B0 B1        sum(i, j) [16 x 16] += A(i) [16 rows, 64 bytes of k] · B(j) [64 bytes of k, 16 outputs]
//          A0  C0 C1
//          A1  C2 C3        A row: int8 k..k+63 or bf16 k..k+31.  B row: one dword (4 int8 or 2 bf16 of k) per output.
#pragma once
#include "../core/half.h"
#include "simd.h"

namespace llmfp4::cpu::amx {

// Sets up the tiles for this thread and puts back what was there: oneDNN remembers what it configured and does not look
// again.
class TileSession {
public:
    TileSession() {
        __asm__ volatile("sttilecfg %0" : "=m"(before_));
        Config config{};
        config.bytes[0] = 1;  // palette
        for (int tile = 0; tile < 8; ++tile) {
            config.bytes[16 + 2 * tile] = 64;  // bytes a row
            config.bytes[48 + tile] = 16;      // rows
        }
        load(config);
    }
    ~TileSession() { load(before_); }
    TileSession(const TileSession&) = delete;
    TileSession& operator=(const TileSession&) = delete;

private:
    struct Config {
        uint8_t bytes[64];
    };
    // gcc 12's intrinsics name 8 bytes as their operand: stores to the other 56 may be left out.
    static void load(const Config& config) { __asm__ volatile("ldtilecfg %0" : : "m"(config)); }

    Config before_;
};

// gcc's tile intrinsics paste their argument into the assembly text and refuse a template parameter; `%c` takes one.
template <int tile>
inline void load_tile_register(const void* at, size_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(at), "r"(stride), "i"(tile) : "memory");
}
template <int i>
inline void load_a(const void* rows, size_t stride) {
    load_tile_register<4 + i>(rows, stride);
}
template <int j>
inline void load_b(const void* rows) {
    load_tile_register<6 + j>(rows, 64);
}
template <int i, int j>
inline void load_sum(const void* at, size_t stride) {
    load_tile_register<2 * i + j>(at, stride);
}
template <int i, int j>
inline void zero_sum() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(2 * i + j));
}
template <int i, int j>
inline void store_sum(void* at, size_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(at), "r"(stride), "i"(2 * i + j) : "memory");
}

struct SignedByUnsigned {  // int8 activations, offset weight bytes, int32 sums
    template <int i, int j>
    static void multiply() {
        __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(2 * i + j), "i"(4 + i), "i"(6 + j));
    }
};
struct Bf16Pairs {  // bf16 both, fp32 sums
    template <int i, int j>
    static void multiply() {
        __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(2 * i + j), "i"(4 + i), "i"(6 + j));
    }
};

template <class Op>
inline void multiply_all() {
    Op::template multiply<0, 0>();
    Op::template multiply<0, 1>();
    Op::template multiply<1, 0>();
    Op::template multiply<1, 1>();
}

// Two neighbouring columns of 16 outputs, exact in bf16, to one B row: dword n = (even k, odd k).
inline Bytes pack_bf16(F32 even, F32 odd) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
    return _mm512_mask_mov_epi16(low, 0xaaaaaaaau, _mm512_castps_si512(odd));
}

// bf16 numbers by code: their low bytes and, 16 entries later, their high ones, twice.
struct Bf16Table {
    __m512i entries;

    explicit Bf16Table(const float (&table)[16]) {
        uint8_t bytes[64];
        for (int i = 0; i < 64; ++i) bytes[i] = uint8_t(float_to_bf16(table[i % 16]) >> i / 16 % 2 * 8);
        entries = _mm512_loadu_si512(bytes);
    }
};

// Bytes 2·half and 2·half + 1 of each dword, whose low nibbles are codes, to one B row.
template <int half>
inline Bytes decode_bf16(Tile codes, const Bf16Table& table) {
    const __m128i twice = half ? _mm_setr_epi8(2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15)
                               : _mm_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13);
    const __m512i spread = _mm512_shuffle_epi8(codes, _mm512_broadcast_i32x4(twice));
    constexpr int a_and_b_or_c = 0xea;
    const __m512i index =
        _mm512_ternarylogic_epi32(spread, _mm512_set1_epi32(0x0f0f0f0f), _mm512_set1_epi32(0x10001000), a_and_b_or_c);
    return _mm512_permutexvar_epi8(index, table.entries);
}
inline Tile high_nibbles(Tile codes) { return _mm512_srli_epi16(codes, 4); }

}  // namespace llmfp4::cpu::amx
