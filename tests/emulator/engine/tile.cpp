// Moving the bytes of a bulk copy: rows of a tile, swizzled in shared memory, cut at the tensor's edges.
#include <algorithm>

#include "bulk.h"
#include "descriptor.h"
#include "rounding.h"

namespace ptx {

void BulkCopy::count(u64 address, u64 bytes) {
    for (u64 s = address / 32; s <= (address + bytes - 1) / 32; ++s) sectors_.push_back(s);
    bytes_ += bytes;
}

void BulkCopy::finish(bool load) {
    if (!sectors_.empty()) count_sectors(*w_.block->group->grid, sectors_, bytes_, load, !load || i_.flag);
    sectors_.clear();
    bytes_ = 0;
}

void BulkCopy::plain(Space to_space, u64 to, Space from_space, u64 from, u64 bytes) {
    if (!bytes) return;
    const Place source = find_place(w_, i_, lane_, from_space, from, u32(bytes), "bulk read", 16);
    const Place target = find_place(w_, i_, lane_, to_space, to, u32(bytes), "bulk write", 16);
    check_range(w_, i_, lane_, source, bytes, Access::read, reads_, true);
    check_range(w_, i_, lane_, target, bytes, i_.flag ? Access::update : Access::write, writes_, true);
    if (i_.flag) reduce_bytes(i_.type, i_.bytes, target.host, source.host, bytes);
    else memcpy(target.host, source.host, bytes);
    if (from_space == Space::global) count(from, bytes);
    if (to_space == Space::global) count(to, bytes);
    finish(from_space == Space::global);
}

// Calls row(global address, first coordinate, inside the other dimensions, number of the row).
template <class Row>
void BulkCopy::rows(const Tile& tile, u64 shared, Row row) {
    const TensorMap& map = tile.map;
    if ((shared & ((1u << kRankShift) - 1)) % 128) {
        fail(w_, i_, lane_, "misaligned", "the tile in shared memory must be aligned to 128 bytes");
    }
    u64 count = 1;
    for (int k = 1; k < map.rank(); ++k) count *= map.box[k];
    for (u64 r = 0; r < count; ++r) {
        u64 rest = r, address = map.address;
        bool inside = true;
        for (int k = 1; k < map.rank(); ++k) {
            const i64 at = tile.at[k] + i64(rest % map.box[k]);
            rest /= map.box[k];
            inside &= at >= 0 && at < i64(map.sizes[k]);
            address += u64(at) * map.strides[k - 1];
        }
        row(address, tile.at[0], inside, r);
    }
}

void BulkCopy::load_row(const Tile& tile, u64 global, i64 first, bool inside, u64 shared, u64 row) {
    const TensorMap& map = tile.map;
    const u64 size = u64(map.element_bytes()), bytes = map.box[0] * size;
    const i64 from = std::max<i64>(first, 0), end = std::min<i64>(first + map.box[0], map.sizes[0]);
    vector<u8> data(bytes, 0);
    if (map.fill) {  // not-a-number outside
        const u32 nan = size == 4 ? 0x7fffffff : size == 2 ? 0x7fff7fff : 0;
        for (u64 b = 0; b < bytes; b += 4) memcpy(&data[b], &nan, std::min<u64>(4, bytes - b));
    }
    if (inside && from < end) {
        const u64 at = global + u64(from) * size, length = u64(end - from) * size;
        const Place p = find_place(w_, i_, lane_, Space::global, at, u32(length), "tensor read", 1);
        check_range(w_, i_, lane_, p, length, Access::read, reads_, true);
        memcpy(&data[u64(from - first) * size], p.host, length);
        count(at, length);
    }
    for (u64 b = 0; b < bytes; b += 16) {
        const u64 at = swizzled(shared + row * bytes + b, map.swizzle_bytes());
        const Place p = find_place(w_, i_, lane_, Space::shared, at, 16, "tensor write");
        check_access(w_, i_, lane_, p, 16, Access::write, false, writes_, true);
        memcpy(p.host, &data[b], 16);
    }
}

void BulkCopy::store_row(const Tile& tile, u64 global, i64 first, u64 shared, u64 row) {
    const TensorMap& map = tile.map;
    const u64 size = u64(map.element_bytes()), bytes = map.box[0] * size;
    const i64 from = std::max<i64>(first, 0), end = std::min<i64>(first + map.box[0], map.sizes[0]);
    vector<u8> data(bytes);
    for (u64 b = 0; b < bytes; b += 16) {
        const u64 at = swizzled(shared + row * bytes + b, map.swizzle_bytes());
        const Place p = find_place(w_, i_, lane_, Space::shared, at, 16, "tensor read");
        // what lies outside the tensor goes nowhere, and may be anything
        const i64 low = first + i64(b / size), high = first + i64((b + 16) / size);
        if (high > from && low < end) check_access(w_, i_, lane_, p, 16, Access::read, false, reads_, true);
        memcpy(&data[b], p.host, 16);
    }
    if (from >= end) return;
    const u64 at = global + u64(from) * size, length = u64(end - from) * size;
    const Place p = find_place(w_, i_, lane_, Space::global, at, u32(length), "tensor write", 1);
    const u8* source = &data[u64(from - first) * size];
    const bool equal = !memcmp(p.host, source, length);
    check_range(w_, i_, lane_, p, length, i_.flag ? Access::update : Access::write, writes_, true, equal);
    if (i_.flag) reduce_bytes(map.element_type(), i_.bytes, p.host, source, length);
    else memcpy(p.host, source, length);
    count(at, length);
}

u64 BulkCopy::load_tile(const Tile& tile, u64 shared) {
    u64 total = 0;
    rows(tile, shared, [&](u64 address, i64 first, bool inside, u64 r) {
        load_row(tile, address, first, inside, shared, r);
        total += u64(tile.map.box[0]) * u64(tile.map.element_bytes());
    });
    finish(true);
    return total;
}

void BulkCopy::store_tile(const Tile& tile, u64 shared) {
    rows(tile, shared, [&](u64 address, i64 first, bool inside, u64 r) {
        if (inside) store_row(tile, address, first, shared, r);
    });
    finish(false);
}

// ---- reductions ----

namespace {

enum Reduction : u8 { kAdd, kMin, kMax, kAnd, kOr, kXor };

template <class T>
void reduce_integers(u8 op, u8* to, const u8* from, u64 bytes) {
    for (u64 b = 0; b < bytes; b += sizeof(T)) {
        T x, y;
        memcpy(&x, to + b, sizeof x);
        memcpy(&y, from + b, sizeof y);
        T r = op == kAdd   ? T(u64(x) + u64(y))
              : op == kMin ? std::min(x, y)
              : op == kMax ? std::max(x, y)
              : op == kAnd ? T(x & y)
              : op == kOr  ? T(x | y)
                           : T(x ^ y);
        memcpy(to + b, &r, sizeof r);
    }
}

template <class Load, class Store>
void reduce_floats(u8 op, u8* to, const u8* from, u64 bytes, u64 size, Load load, Store store) {
    for (u64 b = 0; b < bytes; b += size) {
        const double x = load(to + b), y = load(from + b);
        store(to + b, op == kAdd ? x + y : op == kMin ? std::fmin(x, y) : std::fmax(x, y));
    }
}

template <class T>
T taken(const u8* at) {
    T value;
    memcpy(&value, at, sizeof value);
    return value;
}

template <class T>
void put(u8* at, T value) { memcpy(at, &value, sizeof value); }

}  // namespace

u8 reduction_of(const Statement& st) {
    const char* names[] = {"add", "min", "max", "and", "or", "xor"};
    for (u8 k = 0; k < 6; ++k) {
        if (has(st, names[k])) return k;
    }
    throw Unsupported("this bulk reduction is not modelled: " + st.text);
}

void reduce_bytes(Type type, u8 op, u8* to, const u8* from, u64 n) {
    switch (type) {
    case Type::u32: case Type::b32: return reduce_integers<u32>(op, to, from, n);
    case Type::s32: return reduce_integers<i32>(op, to, from, n);
    case Type::u64: case Type::b64: return reduce_integers<u64>(op, to, from, n);
    case Type::s64: return reduce_integers<i64>(op, to, from, n);
    case Type::f32:
        return reduce_floats(op, to, from, n, 4, taken<float>, [](u8* at, double d) { put(at, float(d)); });
    case Type::f64: return reduce_floats(op, to, from, n, 8, taken<double>, put<double>);
    case Type::f16:
        return reduce_floats(op, to, from, n, 2, [](const u8* at) { return half_to_float(taken<u16>(at)); },
                             [](u8* at, double d) { put(at, double_to_half(d)); });
    case Type::bf16:
        return reduce_floats(op, to, from, n, 2, [](const u8* at) { return bfloat_to_float(taken<u16>(at)); },
                             [](u8* at, double d) { put(at, double_to_bfloat(d)); });
    default: throw Unsupported("a bulk reduction of this type");
    }
}

}  // namespace ptx
