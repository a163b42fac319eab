// Stands in for libcublasLt on CPU pointers: refuses what NVIDIA's documentation refuses, computes in double, and tells
// the tests what it was asked for. Written from the documentation, not from csrc/cuda/cublaslt.cpp.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <vector>

namespace {

constexpr int kSuccess = 0, kInvalid = 7, kNotSupported = 15;   // cublasStatus_t

struct Layout {
    int type;
    uint64_t rows, cols;
    int64_t stride;
};
struct Descriptor {
    std::map<int, uint64_t> values;   // by attribute, as many bytes as it has
    uint64_t get(int attribute, uint64_t otherwise) const {
        const auto found = values.find(attribute);
        return found == values.end() ? otherwise : found->second;
    }
};
struct Result {   // cublasLtMatmulHeuristicResult_t
    uint64_t algorithm[8];
    size_t workspace;
    int status;
    float waves;
    int reserved[4];
};
static_assert(sizeof(Result) == 96);

std::vector<int> epilogues;   // of the products that were run
int refused = 0;              // epilogue that the heuristic finds nothing for
constexpr uint64_t kSecret = 0x5eed;

// Attribute -> size in bytes, of those that exist and may be set here.
int set(Descriptor& d, const std::map<int, size_t>& sizes, int attribute, const void* value, size_t bytes) {
    const auto known = sizes.find(attribute);
    if (known == sizes.end() || known->second != bytes) return kInvalid;
    uint64_t v = 0;
    memcpy(&v, value, bytes);
    d.values[attribute] = v;
    return kSuccess;
}

double half(uint16_t bits) {
    const int e = bits >> 10 & 31, m = bits & 1023;
    const double v = e == 0 ? std::ldexp(m, -24) : e == 31 ? (m ? NAN : INFINITY) : std::ldexp(1024 + m, e - 25);
    return bits & 0x8000 ? -v : v;
}

double load(const void* data, int type, int64_t i) {
    if (type == 0) return static_cast<const float*>(data)[i];
    const uint16_t bits = static_cast<const uint16_t*>(data)[i];
    if (type == 2) return half(bits);
    const uint32_t wide = uint32_t(bits) << 16;
    float v;
    memcpy(&v, &wide, 4);
    return v;
}

void store(void* data, int type, int64_t i, double value) {
    const float v = float(value);
    if (type == 0) {
        static_cast<float*>(data)[i] = v;
    } else if (type == 2) {
        const _Float16 h = _Float16(v);
        memcpy(static_cast<uint16_t*>(data) + i, &h, 2);
    } else {
        uint32_t bits;
        memcpy(&bits, &v, 4);
        static_cast<uint16_t*>(data)[i] = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

struct Element {
    const void* data;
    const Layout& l;
    bool transposed;
    double operator()(int64_t r, int64_t c) const {
        return load(data, l.type, transposed ? c + r * l.stride : r + c * l.stride);
    }
    uint64_t rows() const { return transposed ? l.cols : l.rows; }
    uint64_t cols() const { return transposed ? l.rows : l.cols; }
};

bool aligned(const void* data, const Descriptor& preference, int attribute) {
    return reinterpret_cast<uintptr_t>(data) % preference.get(attribute, 256) == 0;
}

const Descriptor* promised = nullptr;   // the preference of the last heuristic; it lives until the product is run

bool possible(const Descriptor& d, const Layout& a, const Layout& b, const Layout& out) {
    const bool ta = d.get(3, 0) == 1, tb = d.get(4, 0) == 1;
    const Element x{nullptr, a, ta}, y{nullptr, b, tb};
    const int epilogue = int(d.get(7, 1));
    const bool gradient = epilogue == 256 || epilogue == 512;
    const bool fits = x.rows() == out.rows && y.cols() == out.cols && x.cols() == y.rows() && a.type == b.type &&
                      a.type == out.type;
    const bool bias = epilogue == 4 || epilogue == 6 || epilogue == 36 || epilogue == 164 || gradient;
    const bool aux = epilogue == 160 || epilogue == 164;
    const bool known = bias || aux || epilogue == 1 || epilogue == 2 || epilogue == 32;
    if (bias && !d.get(8, 0)) return false;
    if (aux && (!d.get(11, 0) || d.get(12, 0) % 8 || d.get(12, 0) < out.rows)) return false;
    return fits && known && epilogue != refused;
}

}  // namespace

extern "C" {

// ---- for the tests ----

int stand_in_products(int* to, int most) {
    const int count = int(epilogues.size());
    for (int i = 0; i < count && i < most; ++i) to[i] = epilogues[size_t(i)];
    epilogues.clear();
    return count;
}
void stand_in_refuse(int epilogue) { refused = epilogue; }

// ---- the library ----

int cublasLtCreate(void** handle) {
    static int one;
    *handle = &one;
    return kSuccess;
}
int cublasLtMatmulDescCreate(Descriptor** to, int compute, int scale) {
    if (compute != 68 || scale != 0) return kNotSupported;   // CUBLAS_COMPUTE_32F, CUDA_R_32F
    *to = new Descriptor;
    return kSuccess;
}
int cublasLtMatmulDescDestroy(Descriptor* d) { return delete d, kSuccess; }
int cublasLtMatmulDescSetAttribute(Descriptor* d, int attribute, const void* value, size_t bytes) {
    // TRANSA, TRANSB, EPILOGUE: int32; BIAS_POINTER, EPILOGUE_AUX_POINTER: pointers; EPILOGUE_AUX_LD: int64
    return set(*d, {{3, 4}, {4, 4}, {7, 4}, {8, 8}, {11, 8}, {12, 8}}, attribute, value, bytes);
}
int cublasLtMatrixLayoutCreate(Layout** to, int type, uint64_t rows, uint64_t cols, int64_t stride) {
    if ((type != 0 && type != 2 && type != 14) || !rows || !cols || stride < int64_t(rows)) return kInvalid;
    *to = new Layout{type, rows, cols, stride};
    return kSuccess;
}
int cublasLtMatrixLayoutDestroy(Layout* l) { return delete l, kSuccess; }
int cublasLtMatmulPreferenceCreate(Descriptor** to) {
    *to = new Descriptor;
    return kSuccess;
}
int cublasLtMatmulPreferenceDestroy(Descriptor* d) { return delete d, kSuccess; }
int cublasLtMatmulPreferenceSetAttribute(Descriptor* d, int attribute, const void* value, size_t bytes) {
    // MAX_WORKSPACE_BYTES: uint64; REDUCTION_SCHEME_MASK, MIN_ALIGNMENT_[ABCD]_BYTES: uint32
    return set(*d, {{1, 8}, {3, 4}, {5, 4}, {6, 4}, {7, 4}, {8, 4}}, attribute, value, bytes);
}
int cublasLtMatmulAlgoGetHeuristic(void* handle, Descriptor* d, Layout* a, Layout* b, Layout* c, Layout* out,
                                   Descriptor* preference, int wanted, Result* results, int* found) {
    *found = 0;
    if (!handle || wanted < 1 || c->rows != out->rows || c->cols != out->cols || !possible(*d, *a, *b, *out))
        return kNotSupported;
    if (preference->get(3, 7) & 1) return kNotSupported;   // the tests want no sums in place, whose order is any
    *results = {{kSecret}, 1024, kSuccess, 1.0f, {}};
    *found = 1;
    promised = preference;
    return kSuccess;
}
int cublasLtMatmul(void* handle, Descriptor* d, const float* alpha, const void* a_data, Layout* a, const void* b_data,
                   Layout* b, const float* beta, const void* c_data, Layout*, void* d_data, Layout* out,
                   const Result* algorithm, void* workspace, size_t bytes, void* stream) {
    const bool right = handle && *alpha == 1 && *beta == 0 && c_data == d_data && possible(*d, *a, *b, *out) &&
                       algorithm->algorithm[0] == kSecret && promised && bytes <= promised->get(1, 0) &&
                       reinterpret_cast<uintptr_t>(workspace) % 16 == 0 && stream && aligned(a_data, *promised, 5) &&
                       aligned(b_data, *promised, 6) && aligned(c_data, *promised, 7) && aligned(d_data, *promised, 8);
    if (!right) return kInvalid;
    memset(workspace, 0x5a, bytes);   // all of it is there
    const Element x{a_data, *a, d->get(3, 0) == 1}, y{b_data, *b, d->get(4, 0) == 1};
    const int epilogue = int(d->get(7, 1));
    void* const bias = reinterpret_cast<void*>(d->get(8, 0));
    void* const aux = reinterpret_cast<void*>(d->get(11, 0));
    const int64_t rows = int64_t(out->rows), cols = int64_t(out->cols), depth = int64_t(x.cols());
    for (int64_t c = 0; c < cols; ++c)
        for (int64_t r = 0; r < rows; ++r) {
            double sum = 0;
            for (int64_t k = 0; k < depth; ++k) sum += x(r, k) * y(k, c);
            if (epilogue & 4) sum += load(bias, out->type, r);
            if (epilogue & 128) store(aux, out->type, r + c * int64_t(d->get(12, 0)), sum);
            if (epilogue & 2) sum = sum > 0 ? sum : 0;
            if (epilogue & 32) sum *= 0.5 * (1 + std::tanh(std::sqrt(2 / M_PI) * (sum + 0.044715 * sum * sum * sum)));
            store(d_data, out->type, r + c * out->stride, sum);
        }
    for (int64_t i = 0; i < (epilogue == 256 ? rows : epilogue == 512 ? cols : 0); ++i) {
        double sum = 0;
        for (int64_t k = 0; k < depth; ++k) sum += epilogue == 256 ? x(i, k) : y(k, i);
        store(bias, out->type, i, sum);
    }
    epilogues.push_back(epilogue);
    promised = nullptr;
    return kSuccess;
}

}  // extern "C"
