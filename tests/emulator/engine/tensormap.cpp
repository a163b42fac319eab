// tensormap.replace and tensormap.cp_fenceproxy; see tensormap.h.
#include "tensormap.h"

#include <cstddef>

namespace ptx {

int TensorMap::element_bytes() const { return element < 13 ? bytes_of(element_type()) : 0; }

Type TensorMap::element_type() const {
    const Type types[] = {Type::u8,  Type::u16, Type::u32, Type::s32,  Type::u64, Type::s64, Type::f16,
                          Type::f32, Type::f32, Type::f64, Type::bf16, Type::f32, Type::f32};
    return types[element];
}

namespace {

// A map written by this kernel is seen behind a fence.proxy.tensormap that acquires it.
void need_acquired(Warp& w, const Instr& i, int lane, const Place& p) {
    const Group& group = *w.block->group;
    const Grid& grid = *group.grid;
    if (p.space != Space::global || !grid.options.check) return;
    const KnownRef& mapped = w.lanes[lane].mapped;
    for (const Cell* cell = p.shadow->cells + p.offset / 4; cell < p.shadow->cells + p.offset / 4 + 32; ++cell) {
        if (!cell->written) continue;
        const u32 from = cell->writer / grid.ids_per_group(), id = cell->writer % grid.ids_per_group();
        const u32 seen = !mapped ? 0 : from == group.index ? mapped->at(id) : mapped->foreign_at(from, id);
        if (seen < (cell->written & kClockMask)) {
            fail(w, i, lane, "missing fence.proxy.tensormap", "the tensor map is read as " +
                 thread_name(grid, cell->writer) + " wrote it at " + place_of(*grid.program, cell->write_pc));
        }
    }
}

}  // namespace

TensorMap read_tensor_map(Warp& w, const Instr& i, int lane, u64 at) {
    const Place p = find_place(w, i, lane, Space::generic, at, 128, "tensor map", 64);
    check_range(w, i, lane, p, 128, Access::read, recorder(w, lane));
    need_acquired(w, i, lane, p);
    TensorMap map;
    memcpy(&map, p.host, sizeof map);
    auto wrong = [&](const string& what) { fail(w, i, lane, "tensor map", what); };
    if (map.rank() > 5 || !map.element_bytes()) wrong("it does not hold one");
    if (map.interleave) throw Unsupported("interleaved tensor maps are not modelled");
    if (map.address % 16) wrong("the global address must be a multiple of 16");
    for (int k = 0; k < map.rank(); ++k) {
        if (!map.box[k] || map.box[k] > 256) wrong("sizes of the box must be 1 to 256");
        if (map.element_strides[k] != 1) throw Unsupported("element strides of tensor maps are not modelled");
        if (k && map.strides[k - 1] % 16) wrong("strides must be multiples of 16 bytes");
    }
    const u64 inner = u64(map.box[0]) * u64(map.element_bytes());
    if (inner % 16) wrong("the inner size of the box must be a multiple of 16 bytes");
    if (map.swizzle && inner > map.swizzle_bytes()) wrong("the inner size of the box must fit the swizzle");
    return map;
}

namespace {

struct Field {
    const char* name;
    size_t offset, bytes;
    bool indexed;
};
const Field kFields[] = {
    {"global_address", offsetof(TensorMap, address), 8, false},
    {"rank", offsetof(TensorMap, rank_minus_one), 1, false},
    {"box_dim", offsetof(TensorMap, box), 4, true},
    {"global_dim", offsetof(TensorMap, sizes), 4, true},
    {"global_stride", offsetof(TensorMap, strides), 8, true},
    {"element_stride", offsetof(TensorMap, element_strides), 4, true},
    {"elemtype", offsetof(TensorMap, element), 1, false},
    {"interleave_layout", offsetof(TensorMap, interleave), 1, false},
    {"swizzle_mode", offsetof(TensorMap, swizzle), 1, false},
    {"fill_mode", offsetof(TensorMap, fill), 1, false},
};

// immediate: where the field lies; bytes: its size.
void replace(Warp& w, const Instr& i, u32 mask) {
    u64 at[kLanes], value[kLanes];
    addresses(w, i, 0, mask, at);
    lanes_any(w, i.src[1], value);
    each_lane(mask, [&](int l) {
        const Place p = find_place(w, i, l, i.space, at[l], 128, "tensor map");
        check_range(w, i, l, p, 128, Access::update, recorder(w, l));
        memcpy(p.host + i.immediate, &value[l], i.bytes);
    });
}

// The warp copies the map to global memory and releases it.
void copy_and_fence(Warp& w, const Instr& i, u32 mask) {
    u64 to[kLanes], from[kLanes];
    addresses(w, i, 0, mask, to);
    Instr second = {};
    second.src[0] = i.src[1];
    second.offset = i.immediate;
    addresses(w, second, 0, mask, from);
    const int l = __builtin_ctz(mask);
    const Place source = find_place(w, i, l, Space::shared, from[l], 128, "tensor map");
    const Place target = find_place(w, i, l, Space::global, to[l], 128, "tensor map");
    check_range(w, i, l, source, 128, Access::read, recorder(w, l));
    check_range(w, i, l, target, 128, Access::write, recorder(w, l));
    memcpy(target.host, source.host, 128);
}

}  // namespace

bool decode_tensormap(Decoder& d, const Statement& st, Instr& i) {
    if (st.op[0] != "tensormap" || st.op.size() < 2) return false;
    need_args(st, 2);
    d.address(st.args[0], i);
    i.space = space_of(st);
    if (st.op[1] == "replace") {
        for (const Field& field : kFields) {
            if (!has(st, field.name)) continue;
            const u64 index = field.indexed ? st.args.at(1).bits : 0;
            i.bytes = u8(field.bytes);
            i.immediate = i64(field.offset + index * field.bytes);
            i.src[1] = d.value(st.args.at(field.indexed ? 2 : 1), field.bytes == 8 ? Type::b64 : Type::b32);
            i.run = replace;
        }
    } else if (st.op[1] == "cp_fenceproxy") {
        const i64 offset = i.offset;
        d.address(st.args[1], i, 1);
        i.immediate = i.offset;
        i.offset = offset;
        i.converge = Converge::all;
        i.run = copy_and_fence;
    }
    return i.run != nullptr;
}

}  // namespace ptx
