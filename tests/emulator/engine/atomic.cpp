// atom and red on global and shared memory.
#include <algorithm>

#include "memory.h"
#include "rounding.h"
#include "sync.h"

namespace ptx {
namespace {

enum Op : u8 { kAdd, kMin, kMax, kAnd, kOr, kXor, kExchange, kCompare, kIncrement, kDecrement };
const char* const kNames[] = {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"};

template <class T>
T integer_result(u8 op, T old, T value) {
    switch (op) {
    case kAdd: return T(u64(old) + u64(value));
    case kMin: return std::min(old, value);
    case kMax: return std::max(old, value);
    case kAnd: return T(old & value);
    case kOr: return T(old | value);
    case kXor: return T(old ^ value);
    case kIncrement: return old >= value ? T(0) : T(old + 1);
    default: return old == 0 || old > value ? value : T(old - 1);  // kDecrement
    }
}

template <class F>
F float_result(u8 op, F old, F value) {
    if (op == kAdd) return old + value;
    return op == kMin ? std::fmin(old, value) : std::fmax(old, value);
}

u64 half_result(u8 op, bool brain, u64 old, u64 value) {
    auto load = [=](u64 b) { return brain ? bfloat_to_float(u16(b)) : half_to_float(u16(b)); };
    double r = float_result<double>(op, load(old), load(value));
    return brain ? double_to_bfloat(r) : double_to_half(r);
}

u64 result(const Instr& i, u64 old, u64 value) {
    if (i.op == kExchange) return value;
    switch (i.type) {
    case Type::s32: return u32(integer_result<i32>(i.op, i32(old), i32(value)));
    case Type::b32: case Type::u32: return integer_result<u32>(i.op, u32(old), u32(value));
    case Type::s64: return u64(integer_result<i64>(i.op, i64(old), i64(value)));
    case Type::b64: case Type::u64: return integer_result<u64>(i.op, old, value);
    case Type::f32: return bits_as<u32>(float_result(i.op, bits_as<float>(u32(old)), bits_as<float>(u32(value))));
    case Type::f64: return bits_as<u64>(float_result(i.op, bits_as<double>(old), bits_as<double>(value)));
    case Type::f16: case Type::bf16: return half_result(i.op, i.type == Type::bf16, old, value);
    case Type::f16x2: case Type::bf16x2: {
        const bool brain = i.type == Type::bf16x2;
        return half_result(i.op, brain, old, value) | half_result(i.op, brain, old >> 16, value >> 16) << 16;
    }
    default: throw Unsupported("atomic of this type: " + i.source->text);
    }
}

void run(Warp& w, const Instr& i, u32 m) {
    Request r;
    r.mask = m;
    r.bytes = i.bytes * i.count;
    r.kind = Access::update;
    r.strong = true;
    r.scope = i.scope;
    r.space = i.space;
    addresses(w, i, 0, m, r.at);
    open_request(w, i, r);
    Grid& grid = *w.block->group->grid;
    grid.stats.atomic_operations += u64(__builtin_popcount(m)) * i.count;
    // release before, acquire after: one lane sees the next only through the result
    release_to(w, i, r);
    check_request(w, i, r);
    acquire_from(w, i, r);
    for (u8 k = 0; k < i.count; ++k) {
        u64 value[kLanes], other[kLanes], old[kLanes] = {};
        lanes_any(w, i.list[k], value);
        if (i.src[1].exists) lanes_any(w, i.src[1], other);
        each_lane(m, [&](int l) {
            u8* at = r.place[l].host + k * i.bytes;
            memcpy(&old[l], at, i.bytes);
            u64 next;
            if (i.op == kCompare) {
                const u64 keep = i.bytes == 8 ? ~0ull : (1ull << 8 * i.bytes) - 1;
                next = old[l] == (value[l] & keep) ? other[l] : old[l];
            } else {
                next = result(i, old[l], value[l]);
            }
            if (memcmp(at, &next, i.bytes)) ++grid.progress;
            memcpy(at, &next, i.bytes);
        });
        if (k < i.list3.size() && i.list3[k].exists) lanes_any_out(w, i.list3[k], old, m);
    }
}

}  // namespace

bool decode_atomic(Decoder& d, const Statement& st, Instr& i) {
    const string& base = st.op[0];
    if (base != "atom" && base != "red") return false;
    const bool returns = base == "atom";
    if (has(st, "async")) return false;
    i.type = type_at(st, 0);
    i.bytes = u8(bytes_of(i.type));
    i.space = space_of(st);
    i.order = order_of(st, Order::relaxed);
    i.scope = scope_of(st, Scope::gpu);
    i.op = 255;
    for (u8 k = 0; k < 10; ++k) {
        if (has(st, kNames[k])) i.op = k;
    }
    if (i.op == 255 || i.bytes > 8) throw Unsupported("atomic is not modelled: " + st.text);
    need_args(st, returns ? 3 : 2);
    d.address(st.args[returns], i);
    i.list = d.values(st.args[returns + 1], i.type);
    i.count = u8(i.list.size());
    if (i.op == kCompare) i.src[1] = d.value(st.args.at(returns + 2), i.type);
    if (returns) i.list3 = d.results(st.args[0]);
    i.run = run;
    return true;
}

}  // namespace ptx
