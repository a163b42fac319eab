// A model of the L2 cache: least recently used sectors of 32 bytes go first, dirty ones are written back.
#pragma once
#include <list>
#include <unordered_map>

#include "isa.h"

namespace ptx {

class L2 {
public:
    explicit L2(u64 bytes) : capacity_(bytes / 32) {}
    void access(u64 sector, bool write);
    void flush();            // write back what is dirty
    u64 read_bytes = 0, written_bytes = 0;

private:
    struct Line {
        u64 sector;
        bool dirty;
    };
    u64 capacity_;
    std::list<Line> lines_;  // newest first
    std::unordered_map<u64, std::list<Line>::iterator> index_;
};

}  // namespace ptx
