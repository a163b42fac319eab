// See l2.h. A write of part of a sector is taken as a write of all of it: the rest comes with other lanes.
#include "l2.h"

namespace ptx {

void L2::access(u64 sector, bool write) {
    auto at = index_.find(sector);
    if (at != index_.end()) {
        lines_.splice(lines_.begin(), lines_, at->second);
        at->second->dirty |= write;
        return;
    }
    if (!write) read_bytes += 32;
    lines_.push_front({sector, write});
    index_[sector] = lines_.begin();
    if (lines_.size() > capacity_) {
        if (lines_.back().dirty) written_bytes += 32;
        index_.erase(lines_.back().sector);
        lines_.pop_back();
    }
}

void L2::flush() {
    for (const Line& line : lines_) written_bytes += line.dirty ? 32 : 0;
    lines_.clear();
    index_.clear();
}

}  // namespace ptx
