// wgmma: four warps multiply a tile of 64 rows from shared memory (A also from registers).
//
// Each warp computes its 16 rows when it issues the instruction. That it is asynchronous shows in what is
// checked: shared memory is read by the warp's wgmma engine until the group is waited for, registers are
// in flight, and registers written before need a wgmma.fence.
#include "descriptor.h"
#include "memory.h"
#include "setup.h"
#include "sync.h"
#include "tensorcore.h"

namespace ptx {
namespace {

// Everything the lanes of the warp know, as the one who issues.
LaneClock issuer(const Warp& w) {
    const Group& group = *w.block->group;
    Joiner known(group.index), proxied(group.index);
    for (const LaneClock& lane : w.lanes) {
        known.add(lane, group.grid->threads_per_group());
        proxied.add(lane.proxied);
    }
    LaneClock all = w.lanes[0];
    all.known = known.take();
    all.proxied = proxied.empty() ? KnownRef() : proxied.take();
    return all;
}

class Reader {
public:
    Reader(Warp& w, const Instr& i)
        : w_(w), i_(i), knows_(issuer(w)),
          as_{kWgmma * w.block->group->grid->threads_per_group() + w.lanes[0].id, w.wgmma_group, &knows_} {}

    // to[row * k + column] of `rows` rows from `first` on.
    void matrix(u64 bits, Type type, bool along_rows, int first, int rows, double* to) {
        const MatrixDescriptor d(bits);
        const int bytes = bytes_of(type), per = 16 / bytes, depth = i_.k;
        u8 data[16];
        for (int row = first; row < first + rows; row += along_rows ? per : 1) {
            for (int k = 0; k < depth; k += along_rows ? 1 : per) {
                fetch(d.chunk(row, k, bytes, along_rows), data);
                for (int e = 0; e < per; ++e) {
                    u32 value = 0;
                    memcpy(&value, data + e * bytes, size_t(bytes));
                    const int at = along_rows ? (row - first + e) * depth + k : (row - first) * depth + k + e;
                    to[at] = element(type, value, 0);
                }
            }
        }
    }

private:
    void fetch(u64 at, u8* data) {
        const Place p = find_place(w_, i_, 0, Space::shared, at, 16, "wgmma read");
        check_access(w_, i_, 0, p, 16, Access::read, false, as_, true);
        memcpy(data, p.host, 16);
    }
    Warp& w_;
    const Instr& i_;
    LaneClock knows_;
    Recorder as_;
};

// A from registers: as for mma, of the warp's 16 rows.
void registers_a(const Warp& w, const Instr& i, double* a) {
    const int per = 4 / bytes_of(i.type);
    for (size_t r = 0; r < i.list.size(); ++r) {
        const u32* in = lanes_in<u32>(w, i.list[r]);
        for (int l = 0; l < kLanes; ++l) {
            double* to = a + (l / 4 + 8 * int(r & 1)) * i.k + l % 4 * per + 4 * per * int(r / 2);
            for (int j = 0; j < per; ++j) to[j] = element(i.type, in[l], j);
        }
    }
}

// Register r of the accumulator: row l/4 + 8 (r/2 % 2), column 8 (r/4) + 2 (l%4) + r%2; two columns in
// each register of f16.
void accumulate(Warp& w, const Instr& i, const vector<double>& product, bool add) {
    const bool perturb = w.block->group->grid->options.perturb;
    for (size_t r = 0; r < i.list3.size(); ++r) {
        u32* d = reinterpret_cast<u32*>(w.bank[0] + i.list3[r].offset);
        for (int l = 0; l < kLanes; ++l) {
            const size_t e = i.op == kHalf ? 2 * r : r;
            const int row = l / 4 + 8 * int(e / 2 & 1), col = 8 * int(e / 4) + 2 * (l % 4) + int(e & 1);
            const double* at = &product[size_t(row * i.n + col)];
            if (i.op == kFloat) {
                d[l] = bits_as<u32>(accumulated(at[0] + (add ? bits_as<float>(d[l]) : 0), perturb));
            } else if (i.op == kInteger) {
                d[l] = integer_sum(at[0] + (add ? i32(d[l]) : 0), i.sat);
            } else {
                const double low = at[0] + (add ? half_to_float(u16(d[l])) : 0);
                const double high = at[1] + (add ? half_to_float(u16(d[l] >> 16)) : 0);
                d[l] = double_to_half(low) | u32(double_to_half(high)) << 16;
            }
        }
    }
}

void fly(Warp& w, const Operand& o, u32 pc, bool result) {
    const u32 first = o.offset, end = o.offset + u32(o.width) * kLanes;
    if (!w.flights.empty()) {
        Warp::Flight& last = w.flights.back();
        if (last.end == first && last.group == w.wgmma_group && last.result == result && last.pc == pc) {
            last.end = end;
            return;
        }
    }
    w.flights.push_back({first, end, w.wgmma_group, pc, result});
}

void need_fence(Warp& w, const Instr& i, const vector<Operand>& list) {
    if (!w.wgmma_fence) fail(w, i, 0, "missing wgmma.fence", "the first wgmma comes before any wgmma.fence");
    for (const Operand& o : list) {
        if (w.written_at[o.offset / 64] <= w.wgmma_fence) continue;
        fail(w, i, 0, "missing wgmma.fence", "a register of this wgmma was written after the last wgmma.fence");
    }
}

bool overlap(const Warp::Flight& f, const Operand& o) {
    const u32 bytes = o.width ? o.width * kLanes : 4;
    return o.offset < f.end && f.first < o.offset + bytes;
}

void in_flight(Warp& w, const Instr& i, const Warp::Flight& f, bool writes) {
    const string verb = writes ? "overwrites " : "reads ";
    const string what = f.result ? "an accumulator of a wgmma" : "registers a wgmma reads";
    fail(w, i, 0, "wgmma not waited for", "this " + verb + what + " in flight, issued at " +
         place_of(*w.block->group->grid->program, f.pc));
}

void run(Warp& w, const Instr& i, u32);

// Of registers in flight a wgmma may use only accumulators, as accumulators of the same shape.
void watch_operands(Warp& w, const Instr& i) {
    for (const Warp::Flight& f : w.flights) {
        const Instr& by = w.block->group->grid->program->code[f.pc];
        const bool alike = f.result && (by.run != run || (by.n == i.n && by.op == i.op));
        for (const Operand& o : i.list) {
            if (f.result && overlap(f, o)) in_flight(w, i, f, false);
        }
        for (const Operand& o : i.list3) {
            if (!alike && overlap(f, o)) in_flight(w, i, f, true);
        }
    }
}

void run(Warp& w, const Instr& i, u32) {
    w.wgmmas = w.wgmmas * 31 + i.pc;
    watch_operands(w, i);
    need_fence(w, i, i.list3);
    need_fence(w, i, i.list);
    if (w.index / 4 * 4 + 4 > int(w.block->warps.size())) {
        fail(w, i, 0, "divergence", "wgmma needs a warpgroup of four whole warps");
    }
    const u64 da = i.list.empty() ? *lanes_in<u64>(w, i.src[0]) : 0, db = *lanes_in<u64>(w, i.src[1]);
    const bool add = i.src[2].exists ? predicate(w, i.src[2]) & 1 : true;
    vector<double> a(size_t(16 * i.k)), b(size_t(i.n * i.k)), product(size_t(16 * i.n));
    Reader reader(w, i);
    if (i.list.empty()) reader.matrix(da, i.type, i.immediate & 1, w.index % 4 * 16, 16, a.data());
    else registers_a(w, i, a.data());
    reader.matrix(db, i.from, i.immediate & 2, 0, i.n, b.data());
    vector<double> across(b.size());  // k rows of n
    for (int n = 0; n < i.n; ++n) {
        for (int k = 0; k < i.k; ++k) across[size_t(k * i.n + n)] = b[size_t(n * i.k + k)];
    }
    const double sign = i.offset;     // of both imm-scale operands
    for (int row = 0; row < 16; ++row) {
        double* to = &product[size_t(row * i.n)];
        for (int k = 0; k < i.k; ++k) {
            const double x = sign * a[size_t(row * i.k + k)];
            const double* from = &across[size_t(k * i.n)];
            for (int n = 0; n < i.n; ++n) to[n] = std::fma(x, from[n], to[n]);
        }
    }
    accumulate(w, i, product, add);
    for (const Operand& o : i.list3) fly(w, o, i.pc, true);
    for (const Operand& o : i.list) fly(w, o, i.pc, false);
    w.block->group->grid->stats.mma_flops += 2ull * 16 * u64(i.n) * u64(i.k);
}

void fence(Warp& w, const Instr&, u32) { w.wgmma_fence = w.steps; }

void commit(Warp& w, const Instr&, u32) { ++w.wgmma_group; }

void wait(Warp& w, const Instr& i, u32) {
    const u32 committed = w.wgmma_group - 1;
    const u32 done = committed > u32(i.immediate) ? committed - u32(i.immediate) : 0;
    std::erase_if(w.flights, [=](const Warp::Flight& f) { return f.group <= done; });
    for (LaneClock& lane : w.lanes) {
        lane.done[kWgmma - 1] = std::max(lane.done[kWgmma - 1], done);
        ++lane.clock;
    }
}

void decode_mma_async(Decoder& d, const Statement& st, Instr& i) {
    need_args(st, 4);
    for (const string& word : st.op) sscanf(word.c_str(), "m%dn%dk%d", &i.m, &i.n, &i.k);
    i.type = type_at(st, 1);
    i.from = type_at(st, 0);
    i.op = accumulator(type_at(st, 2));
    i.sat = has(st, "satfinite");
    i.list3 = d.results(st.args[0]);
    if (st.args[1].kind == Arg::vector_) i.list = d.values(st.args[1], Type::b32);
    else i.src[0] = d.value(st.args[1], Type::b64);
    i.src[1] = d.value(st.args[2], Type::b64);
    i.src[2] = d.value(st.args[3], Type::pred);
    auto number = [&](size_t k) { return k < st.args.size() ? i64(st.args[k].bits) : 0; };
    i.offset = st.args.size() > 5 ? number(4) * number(5) : 1;
    const bool from_registers = !i.list.empty();
    if (!from_registers) i.immediate = number(6) | number(7) << 1;
    else i.immediate = number(6) << 1;
    const int bytes = bytes_of(i.type);
    const bool right = i.m == 64 && i.k * bytes == 32 && (i.immediate == 0 || bytes == 2) && !has(st, "sp");
    const size_t registers = size_t(i.n) / (i.op == kHalf ? 4 : 2);
    if (right && i.list3.size() == registers && (!from_registers || i.list.size() == 4)) i.run = run;
}

}  // namespace

void watch_registers(Warp& w, const Instr& i) {
    ++w.steps;
    if (i.run == run) return;
    // ptxas renames registers: a mov of an accumulator in flight only gives it another name
    u32 renamed = 0;  // its group
    for (const Warp::Flight& f : w.flights) {
        for (const Operand& o : i.reads) {
            if (!f.result || !overlap(f, o)) continue;
            if (i.source->op[0] != "mov" || !i.dst.exists) in_flight(w, i, f, false);
            renamed = f.group;
        }
    }
    for (const Warp::Flight& f : w.flights) {
        for (const Operand& o : i.writes) {
            if (!renamed && overlap(f, o)) in_flight(w, i, f, true);
        }
    }
    if (renamed) w.flights.push_back({i.dst.offset, i.dst.offset + 4 * kLanes, renamed, i.pc, true});
    if (i.source->op[0] == "mov") return;  // ptxas moves such writes before the fence
    for (const Operand& o : i.writes) {
        const u32 bytes = o.width ? o.width * kLanes : 0;
        for (u32 at = o.offset; at < o.offset + bytes; at += 64) w.written_at[at / 64] = w.steps;
    }
}

bool decode_wgmma(Decoder& d, const Statement& st, Instr& i) {
    if (st.op[0] != "wgmma" || st.op.size() < 2) return false;
    i.converge = Converge::all;
    if (st.op[1] == "fence") {
        i.run = fence;
    } else if (st.op[1] == "commit_group") {
        i.run = commit;
    } else if (st.op[1] == "wait_group") {
        need_args(st, 1);
        i.immediate = i64(st.args[0].bits);
        i.run = wait;
    } else if (st.op[1] == "mma_async") {
        d.uses_wgmma();
        decode_mma_async(d, st, i);
    }
    return true;
}

}  // namespace ptx
