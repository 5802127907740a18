// Products of the CPU kernels alone, for machines that Python's packages are not here for: prints "kernel digest error"
// for each kernel. The digest is of integer products with and without group scales, the error the largest of W4A16 in
// units of its bound (k + 8) · 2^-24 · Σ|x·w|.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../csrc/cpu/kernels.h"
#include "../csrc/cpu/rows.h"

using namespace llmfp4;
using namespace llmfp4::cpu;

namespace {

constexpr int n = 40, k = 200, group = 16, groups = (k + group - 1) / group;
const TileLayout at{n, k};
std::mt19937 random_bits(7);

template <class T>
std::vector<T> filled(size_t count, double low, double high, double padding_from = 1e30) {
    std::vector<T> v(count);
    for (size_t i = 0; i < count; ++i) {
        const double share = double(random_bits()) / 4294967296.0;
        v[i] = double(i) < padding_from ? T(low + share * (high - low)) : T(0);
    }
    return v;
}

struct Problem {
    Element element;
    std::vector<uint8_t> rows = filled<uint8_t>(n * at.row_bytes(), 0, 256), codes = std::vector<uint8_t>(at.bytes());
    std::vector<uint8_t> scale_rows = filled<uint8_t>(n * groups, 8, 120),
                         scales = std::vector<uint8_t>(at.tiles_n() * groups * tile_n);
    std::vector<float> row_scale = filled<float>(n, 0.5, 1.5), inverse = filled<float>(at.padded_k(), 2, 8, k),
                       factor = filled<float>(at.padded_k(), 2, 2, k);

    explicit Problem(Element e) : element(e) {
        shuffle(rows.data(), codes.data(), at);
        shuffle_scales(scale_rows.data(), scales.data(), at, groups);
    }
    Weights weights(ScaleKind kind) const {
        const bool grouped = kind != ScaleKind::none;
        return {at,   element,       codes.data(),        row_scale.data(),     nullptr,
                kind, scales.data(), grouped ? group : 0, grouped ? groups : 0, false};
    }
    double weight(int in, int ik, ScaleKind kind) const {
        const int code = rows[in * at.row_bytes() + ik / 2] >> (ik % 2 * 4) & 15;
        return double(element.value(code)) * decode_scale(kind, scale_rows[in * groups + ik / group]) * row_scale[in];
    }
};

uint64_t digest_of(const std::vector<float>& y, uint64_t digest) {
    for (float v : y) digest = (digest ^ bits_of(v)) * 1099511628211u;
    return digest;
}

double worst(const Problem& p, ScaleKind kind, const std::vector<float>& x, const std::vector<float>& y, int m) {
    double most = 0;
    for (int i = 0; i < m; ++i)
        for (int j = 0; j < n; ++j) {
            double exact = 0, magnitude = 0;
            for (int l = 0; l < k; ++l) {
                const double term = double(x[i * k + l]) * p.factor[l] * p.weight(j, l, kind);
                exact += term, magnitude += std::fabs(term);
            }
            const double error = std::fabs(y[i * n + j] - exact) / ((k + 8) * 0x1p-24 * magnitude);
            most = error > most || std::isnan(error) ? error : most;
        }
    return most;
}

}  // namespace

int main() {
    for (int row = 0; row < kernels().count; ++row) {
        const Kernels& kernel = kernels().rows[row];
        if (!kernel.supported()) continue;
        random_bits.seed(7);
        uint64_t digest = 14695981039346656037u;
        double error = 0;
        for (Element e : {E2M1, E1M2, E3M0})
            for (int m : {1, 3, 8, 21}) {
                const Problem p(e);
                const std::vector<float> x = filled<float>(size_t(m) * k, -2, 2);
                std::vector<float> y(size_t(m) * n, NAN);
                const Call call{x.data(), y.data(), m, k, Dtype::f32, 2};
                const Activation a{E2M1, p.inverse.data(), p.factor.data(), 0.25f, 0.37f, false, false, 0};
                kernel.w4a4(p.weights(ScaleKind::none), a, call);
                digest = digest_of(y, digest);
                for (ScaleKind kind : {ScaleKind::e8m0, ScaleKind::e4m3}) {
                    kernel.w4a8_grouped(p.weights(kind), a, call);
                    digest = digest_of(y, digest);
                }
                for (ScaleKind kind : {ScaleKind::none, ScaleKind::e4m3}) {
                    y.assign(y.size(), NAN);
                    kernel.w4a16(p.weights(kind), p.factor.data(), call);
                    const double found = worst(p, kind, x, y, m);
                    error = found > error || std::isnan(found) ? found : error;
                }
            }
        std::printf("%s %016llx %g\n", kernel.name, static_cast<unsigned long long>(digest), error);
    }
}
