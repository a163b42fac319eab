// mma.sync of tiles of 16 x 8 (f16 bf16 tf32 fp8 s8 u8) and 8 x 8 x 4 (f64).
#include "tensorcore.h"

namespace ptx {
namespace {

// With p elements in a register: register r of A holds row g + 8 (r%2), columns t p.. + 4 p (r/2);
// register r of B holds rows t p.. + 4 p r of column g. g = lane / 4, t = lane % 4.
template <Type type>
void gather_a(const Warp& w, const Instr& i, double (*a)[32]) {
    constexpr int per = type == Type::tf32 ? 1 : type == Type::f16 || type == Type::bf16 ? 2 : 4;
    for (size_t r = 0; r < i.list.size(); ++r) {
        const u32* in = lanes_in<u32>(w, i.list[r]);
        for (int l = 0; l < kLanes; ++l) {
            double* to = &a[l / 4 + 8 * int(r & 1)][l % 4 * per + 4 * per * int(r / 2)];
            for (int j = 0; j < per; ++j) to[j] = element(type, in[l], j);
        }
    }
}

template <Type type>
void gather_b(const Warp& w, const Instr& i, double (*b)[8]) {
    constexpr int per = type == Type::tf32 ? 1 : type == Type::f16 || type == Type::bf16 ? 2 : 4;
    for (size_t r = 0; r < i.list2.size(); ++r) {
        const u32* in = lanes_in<u32>(w, i.list2[r]);
        for (int l = 0; l < kLanes; ++l) {
            for (int j = 0; j < per; ++j) b[l % 4 * per + 4 * per * int(r) + j][l / 4] = element(type, in[l], j);
        }
    }
}

// Eight columns at once; a product of two elements is exact in double.
using Row = double __attribute__((vector_size(64)));

void multiply(double (*c)[8], const double (*a)[32], const double (*b)[8], int k) {
    Row from[32];
    memcpy(from, b, sizeof(Row) * size_t(k));
    for (int row = 0; row < 16; ++row) {
        Row sum;
        memcpy(&sum, c[row], sizeof sum);
        for (int j = 0; j < k; ++j) sum += a[row][j] * from[j];
        memcpy(c[row], &sum, sizeof sum);
    }
}

int row_of(int lane, size_t r) { return lane / 4 + 8 * int(r); }

void load_c(const Warp& w, const vector<Operand>& list, Accumulator type, double (*c)[8]) {
    for (size_t r = 0; r < list.size(); ++r) {
        const u32* in = lanes_in<u32>(w, list[r]);
        for (int l = 0; l < kLanes; ++l) {
            const int col = 2 * (l % 4);
            if (type == kHalf) {
                for (int j = 0; j < 2; ++j) c[row_of(l, r)][col + j] = half_to_float(u16(in[l] >> 16 * j));
            } else {
                const double value = type == kFloat ? double(bits_as<float>(in[l])) : double(i32(in[l]));
                c[row_of(l, r / 2)][col + int(r & 1)] = value;
            }
        }
    }
}

template <Type type_a, Type type_b>
void run(Warp& w, const Instr& i, u32 m) {
    alignas(64) double a[16][32], b[32][8], c[16][8];  // filled up to k
    const bool perturb = w.block->group->grid->options.perturb;
    gather_a<type_a>(w, i, a);
    gather_b<type_b>(w, i, b);
    load_c(w, i.reads_c, Accumulator(i.immediate), c);
    multiply(c, a, b, i.k);
    for (size_t r = 0; r < i.list3.size(); ++r) {
        u32 out[kLanes];
        for (int l = 0; l < kLanes; ++l) {
            const int col = 2 * (l % 4);
            const double* at = &c[row_of(l, i.op == kHalf ? r : r / 2)][col];
            if (i.op == kHalf) out[l] = double_to_half(at[0]) | u32(double_to_half(at[1])) << 16;
            else if (i.op == kFloat) out[l] = bits_as<u32>(accumulated(at[r & 1], perturb));
            else out[l] = integer_sum(at[r & 1], i.sat);
        }
        lanes_out(w, i.list3[r], out, m);
    }
    w.block->group->grid->stats.mma_flops += 2ull * 16 * 8 * i.k;
}

// m8n8k4: A row l/4, column l%4; B row l%4, column l/4; C row l/4, columns 2(l%4) and the next.
void run_double(Warp& w, const Instr& i, u32 m) {
    const double *a = lanes_in<double>(w, i.list[0]), *b = lanes_in<double>(w, i.list2[0]);
    double out[2][kLanes];
    for (int j = 0; j < 2; ++j) {
        const double* c = lanes_in<double>(w, i.reads_c[j]);
        for (int l = 0; l < kLanes; ++l) {
            double sum = c[l];
            for (int k = 0; k < 4; ++k) sum = std::fma(a[l / 4 * 4 + k], b[(2 * (l % 4) + j) * 4 + k], sum);
            out[j][l] = sum;
        }
    }
    for (int j = 0; j < 2; ++j) lanes_out(w, i.list3[j], out[j], m);
    w.block->group->grid->stats.mma_flops += 2ull * 8 * 8 * 4;
}

RunFn pick(Type a, Type b) {
    if (a == Type::f16 && b == a) return run<Type::f16, Type::f16>;
    if (a == Type::bf16 && b == a) return run<Type::bf16, Type::bf16>;
    if (a == Type::tf32 && b == a) return run<Type::tf32, Type::tf32>;
    if (a == Type::s8) return b == Type::s8 ? run<Type::s8, Type::s8> : run<Type::s8, Type::u8>;
    if (a == Type::u8) return b == Type::s8 ? run<Type::u8, Type::s8> : run<Type::u8, Type::u8>;
    if (a == Type::e4m3) return b == a ? run<Type::e4m3, Type::e4m3> : run<Type::e4m3, Type::e5m2>;
    if (a == Type::e5m2) return b == a ? run<Type::e5m2, Type::e5m2> : run<Type::e5m2, Type::e4m3>;
    return nullptr;
}

}  // namespace

// mma.sync.aligned.shape.row.col{.satfinite}.d.a.b.c
bool decode_mma(Decoder& d, const Statement& st, Instr& i) {
    need_args(st, 4);
    i.converge = Converge::all;
    const Type td = type_at(st, 3), tc = type_at(st, 0);
    i.type = type_at(st, 2);
    i.from = type_at(st, 1);
    for (const string& word : st.op) sscanf(word.c_str(), "m%dn%dk%d", &i.m, &i.n, &i.k);
    if (has(st, "sp") || has(st, "block_scale") || has(st, "and") || !has(st, "row") || !has(st, "col")) {
        throw Unsupported("mma is not modelled: " + st.text);
    }
    i.list3 = d.results(st.args[0]);
    const Type word = i.type == Type::f64 ? Type::b64 : Type::b32;
    i.list = d.values(st.args[1], word);
    i.list2 = d.values(st.args[2], word);
    i.reads_c = d.values(st.args[3], word);
    i.sat = has(st, "satfinite");
    i.op = accumulator(td);
    i.immediate = accumulator(tc);
    const int bytes = bytes_of(i.type);
    const bool right_size = i.m == 16 && i.n == 8 && i.k <= 32 && i.list.size() == size_t(i.k * bytes / 8) &&
                            i.list2.size() == size_t(i.k * bytes / 16);
    if (i.type == Type::f64 && i.m == 8 && i.k == 4) i.run = run_double;
    else if (right_size) i.run = pick(i.type, i.from);
    return true;
}

}  // namespace ptx
