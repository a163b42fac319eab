// ldmatrix, stmatrix and movmatrix: 8x8 tiles of 16-bit elements, one row an address.
#include "memory.h"

namespace ptx {

bool decode_mma(Decoder& d, const Statement& st, Instr& i);

namespace {

struct Tile {
    u16 at[8][8];
};

// Lane l holds elements (l/4, 2(l%4)) and the one after, or the same of the transpose.
u32 fragment(const Tile& t, int lane, bool transposed) {
    const int row = lane / 4, col = 2 * (lane % 4);
    u16 a = transposed ? t.at[col][row] : t.at[row][col];
    u16 b = transposed ? t.at[col + 1][row] : t.at[row][col + 1];
    return a | u32(b) << 16;
}

void put_fragment(Tile& t, int lane, u32 value, bool transposed) {
    const int row = lane / 4, col = 2 * (lane % 4);
    (transposed ? t.at[col][row] : t.at[row][col]) = u16(value);
    (transposed ? t.at[col + 1][row] : t.at[row][col + 1]) = u16(value >> 16);
}

u32 row_lanes(const Instr& i) { return i.count == 4 ? kAll : (1u << 8 * i.count) - 1; }

Request rows(Warp& w, const Instr& i, Access kind) {
    Request r;
    r.mask = row_lanes(i);
    r.bytes = 16;
    r.kind = kind;
    r.space = i.space;
    addresses(w, i, 0, r.mask, r.at);
    open_request(w, i, r);
    return r;
}

void load_matrix(Warp& w, const Instr& i, u32 m) {
    Request r = rows(w, i, Access::read);
    check_request(w, i, r);
    for (int k = 0; k < i.count; ++k) {
        Tile tile;
        for (int row = 0; row < 8; ++row) memcpy(tile.at[row], r.place[8 * k + row].host, 16);
        u32 out[kLanes];
        for (int l = 0; l < kLanes; ++l) out[l] = fragment(tile, l, i.flag);
        lanes_out(w, i.list3[k], out, m);
    }
}

void store_matrix(Warp& w, const Instr& i, u32) {
    Request r = rows(w, i, Access::write);
    ++w.block->group->grid->progress;
    for (int k = 0; k < i.count; ++k) {
        const u32* in = lanes_in<u32>(w, i.list[k]);
        Tile tile;
        for (int l = 0; l < kLanes; ++l) put_fragment(tile, l, in[l], i.flag);
        for (int row = 0; row < 8; ++row) {
            const int lane = 8 * k + row;
            const Place& p = r.place[lane];
            const bool equal = !memcmp(p.host, tile.at[row], 16);
            check_access(w, i, lane, p, 16, Access::write, equal, recorder(w, lane));
            memcpy(p.host, tile.at[row], 16);
        }
    }
}

void move_matrix(Warp& w, const Instr& i, u32 m) {
    const u32* in = lanes_in<u32>(w, i.src[0]);
    Tile tile;
    u32 out[kLanes];
    for (int l = 0; l < kLanes; ++l) put_fragment(tile, l, in[l], false);
    for (int l = 0; l < kLanes; ++l) out[l] = fragment(tile, l, true);
    lanes_out(w, i.dst, out, m);
}

}  // namespace

bool decode_matrix(Decoder& d, const Statement& st, Instr& i) {
    const string& base = st.op[0];
    if (base == "mma") return decode_mma(d, st, i);
    if (base != "ldmatrix" && base != "stmatrix" && base != "movmatrix") return false;
    need_args(st, 2);
    i.converge = Converge::all;
    i.flag = has(st, "trans");
    i.space = space_of(st);
    if (base == "movmatrix") {
        i.dst = d.result(st.args[0]);
        i.src[0] = d.value(st.args[1], Type::b32);
        i.run = move_matrix;
        return true;
    }
    if (!has(st, "m8n8") || !has(st, "b16")) throw Unsupported("matrix shape is not modelled: " + st.text);
    const bool load = base == "ldmatrix";
    i.count = has(st, "x4") ? 4 : has(st, "x2") ? 2 : 1;
    d.address(st.args[load ? 1 : 0], i);
    if (load) i.list3 = d.results(st.args[0]);
    else i.list = d.values(st.args[1], Type::b32);
    if (i.list.size() + i.list3.size() != i.count) throw Unsupported("registers do not match: " + st.text);
    i.run = load ? load_matrix : store_matrix;
    return true;
}

}  // namespace ptx
