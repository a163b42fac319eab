// Decoding a kernel: registers and symbols get their places, device functions are inlined.
#include "decoder.h"

#include <algorithm>

namespace ptx {

bool has(const Statement& st, const char* word) {
    return std::find(st.op.begin() + 1, st.op.end(), word) != st.op.end();
}

Type type_at(const Statement& st, int from_end) {
    for (size_t at = st.op.size(); at-- > 1;) {
        Type type = type_of(st.op[at]);
        if (type != Type::none && from_end-- == 0) return type;
    }
    return Type::none;
}

void need_args(const Statement& st, size_t least) {
    if (st.args.size() < least) throw Unsupported("too few operands: " + st.text);
}

Space space_of(const Statement& st, Space otherwise) {
    for (size_t at = 1; at < st.op.size(); ++at) {
        const string word = st.op[at].substr(0, st.op[at].find(':'));
        if (word == "shared") return Space::shared;
        if (word == "global") return Space::global;
        if (word == "const") return Space::constant;
        if (word == "local") return Space::local;
        if (word == "param") return Space::param;
    }
    return otherwise;
}

Order order_of(const Statement& st, Order otherwise) {
    if (has(st, "acq_rel") || has(st, "sc")) return Order::acq_rel;
    if (has(st, "acquire")) return Order::acquire;
    if (has(st, "release")) return Order::release;
    if (has(st, "relaxed") || has(st, "volatile") || has(st, "mmio")) return Order::relaxed;
    return has(st, "weak") ? Order::weak : otherwise;
}

Scope scope_of(const Statement& st, Scope otherwise) {
    if (has(st, "cta")) return Scope::cta;
    if (has(st, "cluster")) return Scope::cluster;
    if (has(st, "gpu") || has(st, "gl")) return Scope::gpu;
    return has(st, "sys") ? Scope::sys : otherwise;
}

Round round_of(const Statement& st) {
    if (has(st, "rz")) return Round::zero;
    if (has(st, "rm")) return Round::down;
    return has(st, "rp") ? Round::up : Round::nearest;
}

// ---- storage ----

Operand Decoder::allocate(Type type) {
    Operand o;
    o.exists = true;
    o.width = type == Type::pred ? 0 : u8(std::max(2, bytes_of(type)));
    u32 bytes = o.width ? o.width * kLanes : 4;
    u32 align = o.width ? 64 : 4;
    o.offset = (program_.register_bytes + align - 1) / align * align;
    program_.register_bytes = o.offset + bytes;
    return o;
}

u64 Decoder::local(u64 bytes, u64 align) {
    u64 at = (program_.local_bytes + align - 1) / align * align;
    program_.local_bytes = at + bytes;
    return at;
}

// Static symbols lie 128 bytes apart, so that running past the end of one is seen.
Location Decoder::shared(const Symbol& symbol) {
    auto known = shared_.find(symbol.name);
    if (known != shared_.end()) return known->second;
    Location place{Space::shared, 0, false};
    if (symbol.external || symbol.bytes == 0) {
        program_.has_dynamic = true;
        program_.dynamic_align = std::max(program_.dynamic_align, symbol.align);
        place.address = ~0ull;  // known when all static symbols are
    } else {
        u64 align = std::max<u64>(128, symbol.align);
        place.address = (program_.static_end + align - 1) / align * align;
        program_.static_end = place.address + symbol.bytes + 128;
        program_.shared.push_back({symbol.name, place.address, symbol.bytes});
    }
    shared_[symbol.name] = place;
    return place;
}

namespace {

void used_symbols(const Arg& arg, vector<const Arg*>& list) {
    if (arg.kind == Arg::symbol) list.push_back(&arg);
    for (const Arg& part : arg.parts) used_symbols(part, list);
}

}  // namespace

// Static shared memory of the kernel and of everything it calls must be known before any address is.
void Decoder::layout_shared(const Function& function) {
    if (std::find(calling_.begin(), calling_.end(), function.name) != calling_.end()) {
        throw Unsupported("recursive calls are not modelled: " + function.name);
    }
    calling_.push_back(function.name);
    for (const Symbol& symbol : function.symbols) {
        if (symbol.space == Space::shared) shared(symbol);
    }
    for (const Statement& st : function.body) {
        vector<const Arg*> used;
        for (const Arg& arg : st.args) used_symbols(arg, used);
        for (const Arg* arg : used) {
            auto symbol = module_.symbols.find(arg->name);
            if (arg->reg_id < 0 && symbol != module_.symbols.end() && symbol->second.space == Space::shared) {
                shared(symbol->second);
            }
            auto callee = module_.functions.find(arg->name);
            if (st.op[0] == "call" && callee != module_.functions.end()) layout_shared(*callee->second);
        }
    }
    calling_.pop_back();
}

Location Decoder::location(const Arg& arg) {
    Location place;
    auto param = frame_->params.find(arg.name);
    auto symbol = module_.symbols.find(arg.name);
    if (arg.reg_id >= 0) {
        place = frame_->symbols[arg.reg_id];
    } else if (param != frame_->params.end()) {
        place = param->second;
    } else if (symbol != module_.symbols.end()) {
        place = symbol->second.space == Space::shared ? shared(symbol->second)
                                                      : Location{symbol->second.space, symbol->second.address, false};
    } else {
        throw Unsupported("unknown symbol " + arg.name);
    }
    if (place.space == Space::shared && place.address == ~0ull) place.address = program_.dynamic_offset();
    place.address += arg.offset;
    return place;
}

// ---- operands ----

Operand Decoder::constant(u64 bits, u8 width) {
    auto [at, fresh] = constants_.try_emplace({bits, width});
    if (fresh) {
        vector<u8>& pool = program_.constants;
        pool.resize((pool.size() + 63) / 64 * 64);
        at->second = {u32(pool.size()), 1, width, false, true};
        if (width == 0) {
            u32 mask = bits ? kAll : 0;
            pool.insert(pool.end(), reinterpret_cast<u8*>(&mask), reinterpret_cast<u8*>(&mask) + 4);
        }
        u64 sixteen[2] = {bits, 0};
        for (int l = 0; l < kLanes && width; ++l) {
            const u8* from = reinterpret_cast<u8*>(sixteen);
            pool.insert(pool.end(), from, from + width);
        }
    }
    return at->second;
}

Operand Decoder::special(const string& name) {
    auto [at, fresh] = specials_.try_emplace(name);
    if (fresh) {
        bool wide = name.find("64") != string::npos || name == "%globaltimer" || name == "%gridid";
        Type type = name == "%is_explicit_cluster" ? Type::pred : wide ? Type::b64 : Type::b32;
        at->second = allocate(type);
        program_.specials.push_back({name, at->second});
    }
    return at->second;
}

Operand Decoder::result(const Arg& arg) {
    if (arg.kind != Arg::reg) throw Unsupported("the result must be a register");
    return arg.reg_id < 0 ? Operand{} : frame_->regs[arg.reg_id];
}

Operand Decoder::value(const Arg& arg, Type type) {
    u8 width = type == Type::pred ? 0 : u8(std::max(2, bytes_of(type)));
    Operand o;
    float narrow;
    double wide;
    switch (arg.kind) {
    case Arg::reg:
        if (arg.reg_id < 0) return constant(0, width);
        o = frame_->regs[arg.reg_id];
        break;
    case Arg::integer: {
        const bool whole = width == 8 || width == 0;
        o = constant(whole ? arg.bits : arg.bits & ((1ull << 8 * width) - 1), width);
        break;
    }
    case Arg::single: {
        u64 bits = arg.bits;
        if (type == Type::f64) {
            memcpy(&narrow, &bits, 4);
            wide = narrow;
            memcpy(&bits, &wide, 8);
        }
        o = constant(bits, width);
        break;
    }
    case Arg::real: {
        u64 bits = arg.bits;
        if (type == Type::f32) {
            memcpy(&wide, &bits, 8);
            narrow = float(wide);
            bits = 0;
            memcpy(&bits, &narrow, 4);
        }
        o = constant(bits, width);
        break;
    }
    case Arg::special:
        if (arg.name == "WARP_SZ") return constant(32, width);
        o = special(arg.name);
        break;
    case Arg::symbol: {
        Location place = location(arg);
        o = constant(place.address, width ? width : 8);
        break;
    }
    default: throw Unsupported("operand of an unexpected kind");
    }
    o.negated = arg.negated;
    return o;
}

vector<Operand> Decoder::values(const Arg& arg, Type type) {
    if (arg.kind != Arg::vector_) return {value(arg, type)};
    vector<Operand> list;
    for (const Arg& part : arg.parts) list.push_back(value(part, type));
    return list;
}

vector<Operand> Decoder::results(const Arg& arg) {
    if (arg.kind != Arg::vector_) return {result(arg)};
    vector<Operand> list;
    for (const Arg& part : arg.parts) list.push_back(result(part));
    return list;
}

void Decoder::address(const Arg& arg, Instr& i, int slot) {
    if (arg.kind != Arg::address) throw Unsupported("an address must stand in brackets");
    const Arg& base = arg.parts[0];
    i.src[slot] = value(base, Type::b64);
    i.offset = arg.offset;
}

}  // namespace ptx
