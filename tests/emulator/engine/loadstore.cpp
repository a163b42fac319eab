// ld and st of every space and width, and what else looks like one.
#include "memory.h"
#include "sync.h"

namespace ptx {
namespace {

u64 extended(u64 bits, Type type) {
    switch (type) {
    case Type::s8: return u64(i64(i8(bits)));
    case Type::s16: return u64(i64(i16(bits)));
    case Type::s32: return u64(i64(i32(bits)));
    default: return bits;
    }
}

template <class T>
void spread(Warp& w, const Instr& i, const Request& r) {  // elements as wide as their registers
    for (size_t k = 0; k < i.list3.size(); ++k) {
        if (!i.list3[k].exists) continue;
        T* to = reinterpret_cast<T*>(w.bank[0] + i.list3[k].offset);
        each_lane(r.mask, [&](int l) { memcpy(&to[l], r.place[l].host + k * sizeof(T), sizeof(T)); });
    }
}

struct Sixteen {
    u64 part[2];
};

void deliver(Warp& w, const Instr& i, const Request& r) {
    bool same = true;
    for (const Operand& o : i.list3) same &= !o.exists || o.width == i.bytes;
    if (same && i.bytes == 4) return spread<u32>(w, i, r);
    if (same && i.bytes == 8) return spread<u64>(w, i, r);
    if (same && i.bytes == 2) return spread<u16>(w, i, r);
    if (same && i.bytes == 16) return spread<Sixteen>(w, i, r);
    for (size_t k = 0; k < i.list3.size(); ++k) {
        u64 out[kLanes] = {};
        each_lane(r.mask, [&](int l) {
            u64 bits = 0;
            memcpy(&bits, r.place[l].host + k * i.bytes, i.bytes);
            out[l] = extended(bits, i.type);
        });
        if (i.list3[k].exists) lanes_any_out(w, i.list3[k], out, r.mask);
    }
}

Request request(const Instr& i, u32 m, Access kind) {
    Request r;
    r.mask = m;
    r.bytes = i.bytes * i.count;
    r.kind = kind;
    r.space = i.space;
    r.strong = i.order != Order::weak;
    r.scope = i.scope;
    return r;
}

// Reads past the coherent cache want memory that the kernel does not write.
void need_read_only(Warp& w, const Instr& i, const Request& r) {
    each_lane(r.mask, [&](int l) {
        const Place& p = r.place[l];
        if (!p.shadow || !p.shadow->touched) return;
        for (u64 byte = p.offset; byte < p.offset + r.bytes; ++byte) {
            if (!(p.shadow->touched[byte / 4] >> (4 + byte % 4) & 1)) continue;
            fail(w, i, l, "race", "read without coherence (.nc) of " + address_name(w, p, r.at[l]) +
                 ", which the kernel has written");
        }
    });
}

void load(Warp& w, const Instr& i, u32 m) {
    Request r = request(i, m, Access::read);
    addresses(w, i, 0, m, r.at);
    open_request(w, i, r);
    if (r.strong) {
        acquire_from(w, i, r);
        w.yield = true;  // perhaps a poll
    }
    if (i.flag && w.block->group->grid->options.check) need_read_only(w, i, r);
    check_request(w, i, r);
    deliver(w, i, r);
}

void load_param(Warp& w, const Instr& i, u32 m) {
    const u8* from = w.block->group->grid->params.data() + i.immediate;
    for (size_t k = 0; k < i.list3.size(); ++k) {
        u64 bits = 0, out[kLanes];
        memcpy(&bits, from + k * i.bytes, std::min<size_t>(8, i.bytes));
        std::fill(out, out + kLanes, extended(bits, i.type));
        if (i.list3[k].exists) lanes_any_out(w, i.list3[k], out, m);
    }
}

void gather(const Warp& w, const Instr& i, u8 (*data)[kMostBytes]) {
    for (size_t k = 0; k < i.list.size(); ++k) {
        if (i.bytes == 16) {
            const Sixteen* from = lanes_in<Sixteen>(w, i.list[k]);
            for (int l = 0; l < kLanes; ++l) memcpy(data[l] + k * 16, &from[l], 16);
        } else if (i.bytes == 4 && i.list[k].width == 4) {
            const u32* from = lanes_in<u32>(w, i.list[k]);
            for (int l = 0; l < kLanes; ++l) memcpy(data[l] + k * 4, &from[l], 4);
        } else {
            u64 from[kLanes];
            lanes_any(w, i.list[k], from);
            for (int l = 0; l < kLanes; ++l) memcpy(data[l] + k * i.bytes, &from[l], i.bytes);
        }
    }
}

void store(Warp& w, const Instr& i, u32 m) {
    Request r = request(i, m, Access::write);
    addresses(w, i, 0, m, r.at);
    alignas(16) u8 data[kLanes][kMostBytes];
    gather(w, i, data);
    open_request(w, i, r);
    if (r.strong) release_to(w, i, r);
    ++w.block->group->grid->progress;
    // lane after lane, as a later lane may write the same place
    const u32 flags = strength(r);
    each_lane(m, [&](int l) {
        if (r.place[l].shadow) {
            Recorder as = recorder(w, l);
            as.stamp |= flags;
            bool equal = !memcmp(r.place[l].host, data[l], r.bytes);
            check_access(w, i, l, r.place[l], r.bytes, Access::write, equal, as);
        }
        memcpy(r.place[l].host, data[l], r.bytes);
    });
}

int count_of(const Statement& st) { return has(st, "v8") ? 8 : has(st, "v4") ? 4 : has(st, "v2") ? 2 : 1; }

void decode_access(Decoder& d, const Statement& st, Instr& i, const Arg& address) {
    i.type = type_at(st, 0);
    i.bytes = u8(bytes_of(i.type));
    i.count = u8(count_of(st));
    i.space = space_of(st);
    i.order = order_of(st, Order::weak);
    i.flag = has(st, "nc");
    i.scope = scope_of(st, Scope::sys);
    d.address(address, i);
}

}  // namespace

bool decode_memory(Decoder& d, const Statement& st, Instr& i) {
    const string& base = st.op[0];
    if (base == "ld" || base == "ldu") {
        need_args(st, 2);
        decode_access(d, st, i, st.args[1]);
        i.list3 = d.results(st.args[0]);
        i.run = load;
        const Arg& symbol = st.args[1].parts[0];
        if (i.space == Space::param && symbol.kind == Arg::symbol) {
            Location place = d.location(symbol);
            i.immediate = i64(place.address) + i.offset;
            if (place.frame) i.space = Space::local;
            else i.run = load_param;
        }
    } else if (base == "st") {
        need_args(st, 2);
        decode_access(d, st, i, st.args[0]);
        i.list = d.values(st.args[1], i.type);
        i.run = store;
        if (i.space == Space::param) i.space = Space::local;  // an argument or a result of a call
        if (has(st, "async")) return false;
    } else {
        return false;
    }
    if ((i.list.size() + i.list3.size()) != i.count) throw Unsupported("vector of another size: " + st.text);
    return true;
}

}  // namespace ptx
