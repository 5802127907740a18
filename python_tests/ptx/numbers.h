// Number formats and the scalar instructions of PTX. Floats travel as bit patterns.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "machine.h"

namespace ptx {
inline float f32(u32 x) {
    float f;
    memcpy(&f, &x, 4);
    return f;
}
inline u32 of_f32(float f) {
    u32 x;
    memcpy(&x, &f, 4);
    return f != f ? 0x7fffffffu : x;  // every NaN an instruction makes is this one
}
inline double f64(u64 x) {
    double d;
    memcpy(&d, &x, 8);
    return d;
}
inline u64 of_f64(double d) {
    u64 x;
    memcpy(&x, &d, 8);
    return x;
}

// A small float with e exponent and m mantissa bits.
inline float small_float(u32 x, int e, int m, bool has_inf) {
    int exponent = int(x >> m & ((1u << e) - 1)), bias = (1 << (e - 1)) - 1;
    u32 mantissa = x & ((1u << m) - 1);
    float sign = x >> (e + m) & 1 ? -1.f : 1.f;
    if (has_inf && exponent == (1 << e) - 1) return mantissa ? NAN : sign * INFINITY;
    float value = std::ldexp(float(mantissa) + (exponent ? float(1u << m) : 0.f), (exponent ? exponent : 1) - bias - m);
    return sign * value;
}
inline float f16(u16 h) {
    static const std::vector<float> table = [] {
        std::vector<float> t(65536);
        for (u32 i = 0; i < 65536; i++) t[i] = small_float(i, 5, 10, true);
        return t;
    }();
    return table[h];
}
inline float bf16(u16 h) { return f32(u32(h) << 16); }
inline float e4m3(u8 x) { return (x & 127) == 127 ? NAN : small_float(x, 4, 3, false); }
inline float e5m2(u8 x) { return f16(u16(x << 8)); }
inline float e2m1(u8 x) { return small_float(x, 2, 1, false); }
inline float ue8m0(u8 x) { return x == 255 ? NAN : std::ldexp(1.f, x - 127); }

// |f| in units of the format's spacing there, rounded to nearest even; the code is exponent and mantissa.
inline u32 small_code(float f, int e, int m, u32 largest, u32 overflow) {
    u32 sign = std::signbit(f) ? 1u << (e + m) : 0;
    int bias = (1 << (e - 1)) - 1, exponent;
    float a = std::fabs(f);
    if (std::isinf(a)) return sign | overflow;
    if (a == 0) return sign;
    std::frexp(a, &exponent);
    exponent = exponent - 1 < 1 - bias ? 1 - bias : exponent - 1;
    double steps = std::nearbyint(std::ldexp(double(a), m - exponent));
    u64 code = (u64(exponent + bias) << m) + u64(steps) - (1u << m);
    return sign | u32(code > largest ? overflow : code);
}
inline u16 of_f16(float f) { return f != f ? 0x7fff : u16(small_code(f, 5, 10, 0x7bff, 0x7c00)); }
inline u16 of_bf16(float f) {
    if (f != f) return 0x7fff;
    u32 x = of_f32(f);
    return u16((x + 0x7fff + (x >> 16 & 1)) >> 16);
}
inline u8 of_e4m3(float f) { return f != f ? 0x7f : u8(small_code(f, 4, 3, 0x7e, 0x7e)); }
inline u8 of_e5m2(float f) { return f != f ? 0x7f : u8(small_code(f, 5, 2, 0x7b, 0x7b)); }
inline u32 of_tf32(float f) { return f != f ? 0x7fffffffu : (of_f32(f) + 0x1000) & 0xffffe000u; }

inline float flushed(float f) { return std::fabs(f) < std::numeric_limits<float>::min() ? std::copysign(0.f, f) : f; }
inline float saturated(float f) { return f > 0 ? (f < 1 ? f : 1.f) : 0.f; }
inline float relu(float f) { return f != f || f > 0 ? f : 0.f; }
template <class F>
F least(F a, F b) {
    return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class F>
F largest(F a, F b) {
    return a != a ? b : b != b ? a : a > b || (a == b && std::signbit(b)) ? a : b;
}
// Rounds to odd, so that rounding the result once more to fewer bits equals rounding once.
inline double odd(double sum, double error) {
    if (error == 0 || sum != sum || std::isinf(sum)) return sum;
    if ((error < 0) == (sum > 0)) sum = std::nextafter(sum, 0);
    return f64(of_f64(sum) | 1);
}
inline float odd_float(double d) {
    float f = float(d);
    if (double(f) == d || f != f || std::isinf(f)) return f;
    if (std::fabs(double(f)) > std::fabs(d)) f = std::nextafter(f, 0.f);
    return f32(of_f32(f) | 1);
}
inline float fma_odd(float a, float b, float c) {
    double p = double(a) * double(b), s = p + double(c), t = s - p;
    return odd_float(odd(s, (p - (s - t)) + (double(c) - t)));
}

#define PTX_HALF(NAME, DECODE, ENCODE)                                                    \
    inline u16 add_##NAME(u16 a, u16 b) { return ENCODE(DECODE(a) + DECODE(b)); }         \
    inline u16 sub_##NAME(u16 a, u16 b) { return ENCODE(DECODE(a) - DECODE(b)); }         \
    inline u16 mul_##NAME(u16 a, u16 b) { return ENCODE(DECODE(a) * DECODE(b)); }         \
    inline u16 min_##NAME(u16 a, u16 b) { return ENCODE(least(DECODE(a), DECODE(b))); }   \
    inline u16 max_##NAME(u16 a, u16 b) { return ENCODE(largest(DECODE(a), DECODE(b))); } \
    inline u16 fma_##NAME(u16 a, u16 b, u16 c) { return ENCODE(fma_odd(DECODE(a), DECODE(b), DECODE(c))); }
PTX_HALF(f16, f16, of_f16)
PTX_HALF(bf16, bf16, of_bf16)
#undef PTX_HALF
template <class F>
u32 pairs(F f, u32 a, u32 b) {
    return u32(f(u16(a), u16(b))) | u32(f(u16(a >> 16), u16(b >> 16))) << 16;
}
template <class F>
u32 pairs(F f, u32 a, u32 b, u32 c) {
    return u32(f(u16(a), u16(b), u16(c))) | u32(f(u16(a >> 16), u16(b >> 16), u16(c >> 16))) << 16;
}

inline u32 prmt(u32 a, u32 b, u32 selector) {
    u64 bytes = a | u64(b) << 32;
    u32 r = 0;
    for (int i = 0; i < 4; i++) {
        u32 s = selector >> (4 * i) & 15, byte = u32(bytes >> (8 * (s & 7))) & 255;
        if (s & 8) byte = byte & 128 ? 255 : 0;
        r |= byte << (8 * i);
    }
    return r;
}
inline u32 lop3(u32 a, u32 b, u32 c, u32 table) {
    u32 r = 0;
    for (u32 i = 0; i < 8; i++)
        if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return r;
}
// U unsigned; the field begins at bit p, has l bits, and is filled with the sign (signed forms) above the word.
template <class U, bool is_signed>
U bfe(U a, u32 p, u32 l) {
    const u32 width = sizeof(U) * 8;
    p &= 255, l &= 255;
    if (!l) return 0;
    u32 top = p + l - 1 < width - 1 ? p + l - 1 : width - 1;
    bool fill = is_signed && (a >> top & 1);
    U r = 0;
    for (u32 i = 0; i < width; i++) {
        bool bit = i < l && p + i < width ? a >> (p + i) & 1 : fill;
        r |= U(bit) << i;
    }
    return r;
}
template <class U>
U bfi(U field, U into, u32 p, u32 l) {
    const u32 width = sizeof(U) * 8;
    p &= 255, l &= 255;
    if (p >= width || !l) return into;
    U mask = (l >= width ? ~U(0) : (U(1) << l) - 1) << p;
    return (into & ~mask) | ((field << p) & mask);
}
template <class U>
U shl(U a, u32 n) {
    return n >= sizeof(U) * 8 ? U(0) : U(a << n);
}
template <class I>
I shr(I a, u32 n) {
    const u32 width = sizeof(I) * 8;
    return n >= width ? I(a < 0 ? -1 : 0) : I(a >> n);
}
inline u32 funnel(u32 lo, u32 hi, u32 n, bool left, bool wrap) {
    n = wrap ? n & 31 : n > 32 ? 32 : n;
    u64 both = u64(hi) << 32 | lo;
    if (left) return n == 32 ? lo : u32(both << n >> 32);
    return n == 32 ? hi : u32(both >> n);
}
template <class I>
I clamped(double x) {
    if (x != x) return 0;
    if (x <= double(std::numeric_limits<I>::min())) return std::numeric_limits<I>::min();
    if (x >= double(std::numeric_limits<I>::max())) return std::numeric_limits<I>::max();
    return I(x);
}
template <class I>
I narrowed(s64 x) {
    const s64 low = std::numeric_limits<I>::min(), high = std::numeric_limits<I>::max();
    return I(x < low ? low : x > high ? high : x);
}
template <class A, class B>
u32 dp4a(u32 a, u32 b, u32 c) {
    for (int i = 0; i < 4; i++) c += u32(s32(A(a >> (8 * i))) * s32(B(b >> (8 * i))));
    return c;
}
// Division by zero gives all ones (remainder: the dividend), as the hardware does; PTX leaves it open.
template <class I>
I quotient(I a, I b) {
    return b == 0 ? I(~I(0)) : b == I(-1) && std::is_signed<I>::value ? I(0 - std::make_unsigned_t<I>(a)) : I(a / b);
}
template <class I>
I remainder_of(I a, I b) {
    return b == 0 ? a : b == I(-1) && std::is_signed<I>::value ? I(0) : I(a % b);
}
inline u32 brev(u32 x) {
    u32 r = 0;
    for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
    return r;
}
}  // namespace ptx
