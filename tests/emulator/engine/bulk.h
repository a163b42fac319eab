// One copy of the bulk engine, and tensor maps.
#pragma once
#include "mbarrier.h"
#include "tensormap.h"

namespace ptx {

struct Tile {
    TensorMap map;
    i64 at[5] = {};          // coordinates of the first element, innermost first
};

class BulkCopy {
public:
    // `reads` and `writes`: what is recorded of the two sides.
    BulkCopy(Warp& w, const Instr& i, int lane, Recorder reads, Recorder writes)
        : w_(w), i_(i), lane_(lane), reads_(reads), writes_(writes) {}
    void plain(Space to_space, u64 to, Space from_space, u64 from, u64 bytes);
    u64 load_tile(const Tile& tile, u64 shared);    // bytes written, those outside the tensor included
    void store_tile(const Tile& tile, u64 shared);

private:
    template <class Row>
    void rows(const Tile& tile, u64 shared, Row row);
    void load_row(const Tile& tile, u64 global, i64 first, bool inside, u64 shared, u64 row);
    void store_row(const Tile& tile, u64 global, i64 first, u64 shared, u64 row);
    void count(u64 address, u64 bytes);
    void finish(bool load);
    Warp& w_;
    const Instr& i_;
    int lane_;
    Recorder reads_, writes_;
    vector<u64> sectors_;
    u64 bytes_ = 0;
};

u8 reduction_of(const Statement& st);
void reduce_bytes(Type type, u8 op, u8* to, const u8* from, u64 bytes);

}  // namespace ptx
