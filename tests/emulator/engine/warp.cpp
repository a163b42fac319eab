// Exchange within a warp: shfl vote match redux elect activemask. They order no memory.
#include <algorithm>

#include "lanewise.h"
#include "rounding.h"

namespace ptx {
namespace {

enum Shuffle : u8 { kUp, kDown, kButterfly, kIndex };

void must_name_itself(Warp& w, const Instr& i, u32 m) {
    const u32* members = lanes_in<u32>(w, i.member_mask);
    each_lane(m, [&](int l) {
        if (!(members[l] >> l & 1)) fail(w, i, l, "divergence", "the lane is not in its own member mask");
    });
}

void shuffle(Warp& w, const Instr& i, u32 m) {
    must_name_itself(w, i, m);
    const u32 *a = lanes_in<u32>(w, i.src[0]), *b = lanes_in<u32>(w, i.src[1]), *c = lanes_in<u32>(w, i.src[2]);
    u32 r[kLanes] = {}, in_range = 0;
    each_lane(m, [&](int lane) {
        const int bound = int(b[lane] & 31), clamp = int(c[lane] & 31), segment = int(c[lane] >> 8 & 31);
        const int highest = (lane & segment) | (clamp & ~segment), lowest = lane & segment;
        int from = 0;
        bool in = false;
        switch (i.op) {
        case kUp: from = lane - bound; in = from >= highest; break;
        case kDown: from = lane + bound; in = from <= highest; break;
        case kButterfly: from = lane ^ bound; in = from <= highest; break;
        default: from = lowest | (bound & ~segment); in = from <= highest; break;
        }
        if (!in) from = lane;
        if (!(m >> from & 1)) {
            fail(w, i, lane, "divergence", "the shuffle reads lane " + std::to_string(from) +
                 ", which does not take part");
        }
        r[lane] = a[from];
        in_range |= u32(in) << lane;
    });
    lanes_out(w, i.dst, r, m);
    predicate_out(w, i.dst2, in_range, m);
}

enum Vote : u8 { kAll_, kAny, kUniform, kBallot };

void vote(Warp& w, const Instr& i, u32 m) {
    if (i.member_mask.exists) must_name_itself(w, i, m);
    const u32 yes = predicate(w, i.src[0]) & m;
    if (i.op == kBallot) {
        u32 r[kLanes];
        std::fill(r, r + kLanes, yes);
        return lanes_out(w, i.dst, r, m);
    }
    bool answer = i.op == kAll_ ? yes == m : i.op == kAny ? yes != 0 : yes == m || yes == 0;
    predicate_out(w, i.dst, answer ? kAll : 0, m);
}

template <class T>
void match(Warp& w, const Instr& i, u32 m) {
    must_name_itself(w, i, m);
    const T* a = lanes_in<T>(w, i.src[0]);
    u32 r[kLanes] = {};
    each_lane(m, [&](int l) { each_lane(m, [&](int o) { r[l] |= u32(a[o] == a[l]) << o; }); });
    if (i.op == kAll_) {
        const bool same = r[__builtin_ctz(m)] == m;
        std::fill(r, r + kLanes, same ? m : 0);
        predicate_out(w, i.dst2, same ? kAll : 0, m);
    }
    lanes_out(w, i.dst, r, m);
}

enum Reduce : u8 { kAdd, kMin, kMax, kAnd, kOr, kXor };

template <class T>
T reduced(u8 op, T x, T y) {
    switch (op) {
    case kAdd: return T(u32(x) + u32(y));
    case kMin: return std::min(x, y);
    case kMax: return std::max(x, y);
    case kAnd: return T(u32(x) & u32(y));
    case kOr: return T(u32(x) | u32(y));
    default: return T(u32(x) ^ u32(y));
    }
}

template <class T>
void reduce(Warp& w, const Instr& i, u32 m) {
    must_name_itself(w, i, m);
    const T* a = lanes_in<T>(w, i.src[0]);
    T all = a[__builtin_ctz(m)];
    each_lane(m & (m - 1), [&](int l) { all = reduced(i.op, all, a[l]); });
    T r[kLanes];
    std::fill(r, r + kLanes, all);
    lanes_out(w, i.dst, r, m);
}

void reduce_float(Warp& w, const Instr& i, u32 m) {  // redux.sync.{min,max}{.abs}{.NaN}.f32, sm_100a
    must_name_itself(w, i, m);
    const float* a = lanes_in<float>(w, i.src[0]);
    float all = std::nanf("");
    bool nan = false;
    each_lane(m, [&](int l) {
        float x = i.approximate ? std::fabs(a[l]) : a[l];
        nan |= x != x;
        all = i.op == kMin ? std::fmin(all, x) : std::fmax(all, x);
    });
    if (i.flag && nan) all = std::nanf("");
    float r[kLanes];
    std::fill(r, r + kLanes, all);
    lanes_out(w, i.dst, r, m);
}

void elect(Warp& w, const Instr& i, u32 m) {
    must_name_itself(w, i, m);
    const u32 leader = u32(__builtin_ctz(m));
    u32 r[kLanes];
    std::fill(r, r + kLanes, leader);
    lanes_out(w, i.dst, r, m);
    predicate_out(w, i.dst2, 1u << leader, m);
}

void active_mask(Warp& w, const Instr& i, u32 m) {
    u32 r[kLanes];
    std::fill(r, r + kLanes, m);
    lanes_out(w, i.dst, r, m);
}

void results(Decoder& d, const Statement& st, Instr& i) {  // d or d|p
    i.dst = d.result(st.args.at(0));
    if (!st.args[0].parts.empty()) i.dst2 = d.result(st.args[0].parts[0]);
}

void members(Decoder& d, const Arg& arg, Instr& i) {
    i.member_mask = d.value(arg, Type::u32);
    i.converge = Converge::mask;
}

u8 word_of(const Statement& st, std::initializer_list<const char*> words) {
    u8 k = 0;
    for (const char* word : words) {
        if (has(st, word)) return k;
        ++k;
    }
    throw Unsupported("unknown mode: " + st.text);
}

}  // namespace

bool decode_warp(Decoder& d, const Statement& st, Instr& i) {
    const string& base = st.op[0];
    const bool sync = has(st, "sync");
    if (base == "shfl") {
        need_args(st, sync ? 5 : 4);
        if (!sync) throw Unsupported("shfl without .sync is gone since sm_70");
        results(d, st, i);
        for (int k = 0; k < 3; ++k) i.src[k] = d.value(st.args[k + 1], Type::b32);
        members(d, st.args[4], i);
        i.op = word_of(st, {"up", "down", "bfly", "idx"});
        i.run = shuffle;
    } else if (base == "vote") {
        need_args(st, 3);
        results(d, st, i);
        i.src[0] = d.value(st.args[1], Type::pred);
        members(d, st.args[2], i);
        i.op = word_of(st, {"all", "any", "uni", "ballot"});
        i.run = vote;
    } else if (base == "match") {
        need_args(st, 3);
        results(d, st, i);
        i.type = type_at(st, 0);
        i.src[0] = d.value(st.args[1], i.type);
        members(d, st.args[2], i);
        i.op = word_of(st, {"all", "any"});
        i.run = bytes_of(i.type) == 8 ? match<u64> : match<u32>;
    } else if (base == "redux") {
        need_args(st, 3);
        results(d, st, i);
        i.type = type_at(st, 0);
        i.src[0] = d.value(st.args[1], i.type);
        members(d, st.args[2], i);
        i.op = word_of(st, {"add", "min", "max", "and", "or", "xor"});
        i.flag = has(st, "NaN");
        i.approximate = has(st, "abs");
        i.run = i.type == Type::f32 ? reduce_float : i.type == Type::s32 ? reduce<i32> : reduce<u32>;
    } else if (base == "elect") {
        need_args(st, 2);
        results(d, st, i);
        members(d, st.args[1], i);
        i.run = elect;
    } else if (base == "activemask") {
        need_args(st, 1);
        results(d, st, i);
        i.run = active_mask;
    } else {
        return false;
    }
    return true;
}

}  // namespace ptx
