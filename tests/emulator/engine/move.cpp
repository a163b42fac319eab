// mov, packing and unpacking, cvta, isspacep, mapa, clocks.
#include "lanewise.h"

namespace ptx {
namespace {

template <class T>
void copy(Warp& w, const Instr& i, u32 m) { lanes_out(w, i.dst, lanes_in<T>(w, i.src[0]), m); }

void copy_pred(Warp& w, const Instr& i, u32 m) { predicate_out(w, i.dst, predicate(w, i.src[0]), m); }

struct Wide {
    u64 part[2];
};

void pack(Warp& w, const Instr& i, u32 m) {  // the first element lies lowest
    Wide out[kLanes] = {};
    const int bits = i.bytes * 8;
    int shift = 0;
    for (const Operand& o : i.list) {
        u64 in[kLanes];
        lanes_any(w, o, in);
        const u64 keep = bits == 64 ? ~0ull : (1ull << bits) - 1;
        for (int l = 0; l < kLanes; ++l) out[l].part[shift / 64] |= (in[l] & keep) << shift % 64;
        shift += bits;
    }
    if (i.dst.width == 16) return lanes_out(w, i.dst, out, m);
    u64 narrow[kLanes];
    for (int l = 0; l < kLanes; ++l) narrow[l] = out[l].part[0];
    lanes_any_out(w, i.dst, narrow, m);
}

void unpack(Warp& w, const Instr& i, u32 m) {
    Wide in[kLanes] = {};
    if (i.src[0].width == 16) {
        memcpy(in, lanes_in<Wide>(w, i.src[0]), sizeof in);
    } else {
        u64 narrow[kLanes];
        lanes_any(w, i.src[0], narrow);
        for (int l = 0; l < kLanes; ++l) in[l].part[0] = narrow[l];
    }
    const int bits = i.bytes * 8;
    int shift = 0;
    for (const Operand& o : i.list3) {
        u64 out[kLanes];
        const u64 keep = bits == 64 ? ~0ull : (1ull << bits) - 1;
        for (int l = 0; l < kLanes; ++l) out[l] = in[l].part[shift / 64] >> shift % 64 & keep;
        if (o.exists) lanes_any_out(w, o, out, m);
        shift += bits;
    }
}

void read_clock(Warp& w, const Instr& i, u32 m) {
    u64 now[kLanes];
    std::fill(now, now + kLanes, w.block->group->grid->issued);
    lanes_any_out(w, i.dst, now, m);
}

// Shared addresses fit 32 bits within their window; immediate is the window, flag: into the space.
void convert_address(Warp& w, const Instr& i, u32 m) {
    u64 in[kLanes];
    lanes_any(w, i.src[0], in);
    for (int l = 0; l < kLanes; ++l) in[l] = i.flag ? in[l] - u64(i.immediate) : in[l] + u64(i.immediate);
    lanes_any_out(w, i.dst, in, m);
}

void is_space(Warp& w, const Instr& i, u32 m) {
    u64 in[kLanes];
    lanes_any(w, i.src[0], in);
    u32 r = 0;
    for (int l = 0; l < kLanes; ++l) {
        bool special = in[l] >= kSharedWindow && in[l] < kParamWindow + kWindow;
        bool yes = i.immediate ? in[l] - u64(i.immediate) < kWindow : !special;
        r |= u32(yes) << l;
    }
    predicate_out(w, i.dst, r, m);
}

// The address of the same shared variable in another block of the cluster.
void map_address(Warp& w, const Instr& i, u32 m) {
    u64 in[kLanes], rank[kLanes];
    lanes_any(w, i.src[0], in);
    lanes_any(w, i.src[1], rank);
    const u64 window = i.space == Space::generic ? kSharedWindow : 0;
    for (int l = 0; l < kLanes; ++l) {
        u64 offset = (in[l] - window) & ((1u << kRankShift) - 1);
        in[l] = window + ((rank[l] + 1) << kRankShift | offset);
    }
    lanes_any_out(w, i.dst, in, m);
}

void rank_of(Warp& w, const Instr& i, u32 m) {
    u64 in[kLanes];
    lanes_any(w, i.src[0], in);
    const u64 window = i.space == Space::generic ? kSharedWindow : 0;
    for (int l = 0; l < kLanes; ++l) {
        u64 rank = (in[l] - window) >> kRankShift;
        in[l] = rank ? rank - 1 : w.block->rank;
    }
    lanes_any_out(w, i.dst, in, m);
}

i64 window_of(Space space) {
    switch (space) {
    case Space::shared: return i64(kSharedWindow);
    case Space::local: return i64(kLocalWindow);
    case Space::param: return i64(kParamWindow);
    default: return 0;
    }
}

void decode_mov(Decoder& d, const Statement& st, Instr& i) {
    need_args(st, 2);
    const Arg &to = st.args[0], &from = st.args[1];
    i.type = type_at(st, 0);
    if (to.kind == Arg::vector_) {
        i.list3 = d.results(to);
        i.src[0] = d.value(from, i.type);
        i.bytes = u8(bytes_of(i.type) / i.list3.size());
        i.run = unpack;
        return;
    }
    i.dst = d.result(to);
    if (from.kind == Arg::vector_) {
        i.bytes = u8(bytes_of(i.type) / from.parts.size());
        const Type part = i.bytes == 8 ? Type::b64 : i.bytes == 4 ? Type::b32 : i.bytes == 2 ? Type::b16 : Type::b8;
        i.list = d.values(from, part);
        i.run = pack;
        return;
    }
    if (from.kind == Arg::special &&
        (from.name.find("clock") != string::npos || from.name.find("timer") != string::npos)) {
        i.run = read_clock;
        return;
    }
    i.src[0] = d.value(from, i.type);
    if (from.kind == Arg::symbol && d.location(from).frame) {  // of a parameter: where it lies in local memory
        i.src[0] = d.constant(d.location(from).address + kLocalWindow - kParamWindow, i.src[0].width);
    }
    switch (i.type == Type::pred ? 0 : std::max(2, bytes_of(i.type))) {
    case 0: i.run = copy_pred; break;
    case 2: i.run = copy<u16>; break;
    case 4: i.run = copy<u32>; break;
    case 8: i.run = copy<u64>; break;
    case 16: i.run = copy<Wide>; break;
    }
    if (i.src[0].width != i.dst.width && i.dst.exists) i.run = nullptr;
}

}  // namespace

bool decode_move(Decoder& d, const Statement& st, Instr& i) {
    const string& base = st.op[0];
    if (base == "mov") {
        decode_mov(d, st, i);
    } else if (base == "cvta") {
        need_args(st, 2);
        i.space = space_of(st);
        i.flag = has(st, "to");
        i.immediate = window_of(i.space);
        i.dst = d.result(st.args[0]);
        i.src[0] = d.value(st.args[1], Type::u64);
        i.run = convert_address;
    } else if (base == "isspacep") {
        need_args(st, 2);
        i.space = space_of(st);
        i.immediate = window_of(i.space);
        i.dst = d.result(st.args[0]);
        i.src[0] = d.value(st.args[1], Type::u64);
        i.run = is_space;
    } else if (base == "mapa" || base == "getctarank") {
        need_args(st, base == "mapa" ? 3 : 2);
        i.space = space_of(st);
        i.dst = d.result(st.args[0]);
        i.src[0] = d.value(st.args[1], type_at(st, 0));
        if (base == "mapa") i.src[1] = d.value(st.args[2], Type::u32);
        i.run = base == "mapa" ? map_address : rank_of;
    } else {
        return false;
    }
    return true;
}

}  // namespace ptx
