// The race checker: for every 4-byte word, who wrote it last and who has read it since.
#pragma once
#include "clocks.h"

namespace ptx {

// Clocks in cells carry flags in their upper bits.
constexpr u32 kClockMask = 0x0fffffff;
constexpr u32 kStrong = 0x80000000;      // atomic, volatile, relaxed, acquire or release
constexpr u32 kBlockScope = 0x40000000;  // strong within the block only
constexpr u32 kClusterScope = 0x20000000;  // within the cluster only
constexpr u32 kReadSet = 0xffffffff;     // the reader is the number of a set of readers
constexpr u32 kSplit = 0xfffffffe;       // the reader is the number of four cells, one a byte

struct Cell {
    u32 writer, written;     // global id and clock with flags; 0 if never written
    u32 reader, read;
    u32 write_pc, read_pc;   // instructions, for messages
};

struct Shadow {
    Cell* cells = nullptr;   // one a word
    u8* valid = nullptr;     // one a word: a bit for each initialised byte; null if all are
    u8* touched = nullptr;   // one a word: low half bytes read, high half bytes written; may be null
};

// One thread, as the checker sees it.
struct Agent {
    const LaneClock* lane;
    u32 threads, base, span; // ids of its group: [base, base + span)
    u32 block;               // threads of a block
    u32 id, stamp;           // what to record: global id, clock with flags
    u32 pc;
    u32 self;                // global id of the thread itself
    bool async_proxy;        // sees what the generic proxy wrote only through a fence.proxy.async
};

enum class Access : u8 { read, write, update };  // update: an atomic that reads and writes

struct Conflict {
    const char* kind = nullptr;  // null: none
    u32 other = 0, other_pc = 0;
};

class RaceChecker {
public:
    // Record an access to `bytes` at `offset`; returns the first conflict. `equal`: a write that changes
    // nothing, which may meet an unordered write.
    Conflict access(const Agent& me, Cell* cells, u64 offset, u32 bytes, Access kind, bool equal);
    static bool ordered(const Agent& me, u32 other, u32 stamp);
    // The first access to `words` cells that is not ordered before me.
    Conflict pending(const Agent& me, const Cell* cells, u64 words);
    void release(Cell* cells, u64 words);  // the cells are going away
    u64 benign = 0;

private:
    struct Reader {
        u32 id, stamp, pc, next;  // next: number of the rest of the set, 0 at its end
    };
    struct Transition {       // `set`, joined by the reader, becomes `result`
        u32 set, id, stamp, result;
        bool same(const Transition& t) const { return set == t.set && id == t.id && stamp == t.stamp; }
    };
    Transition& transition(const Transition& key);
    Conflict word(const Agent& me, Cell& cell, Access kind, bool equal);
    Conflict unordered_reader(const Agent& me, const Cell& cell);
    void add_reader(const Agent& me, Cell& cell);
    u32 add_to_set(const Agent& me, u32 set);
    void split(Cell& cell);
    vector<Reader> readers_{1};
    vector<Transition> transitions_{1024};  // a hash table; stamp 0 is an empty place
    size_t transition_count_ = 0;
    Transition last_{};
    vector<Cell> bytes_;
    vector<u32> free_;
};

}  // namespace ptx
