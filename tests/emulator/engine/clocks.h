// Happens-before between threads: what each thread knows of the others.
//
// Every thread has a clock that grows at each synchronisation. A `Known` holds, for the threads of one
// group (a block, or a cluster of blocks), the newest clock whose accesses are ordered before now, and
// the same for foreign groups heard of through acquire and release. Values are shared and never change
// once a thread holds them, so that a barrier of the whole block costs one join.
//
// Asynchronous engines are actors with clocks of their own: cp.async of a thread, wgmma of a warp, bulk
// copies of a thread (reads and writes apart) and whatever completes on an mbarrier. That of a warp bears
// the id of its first thread.
#pragma once
#include <utility>

#include "isa.h"

namespace ptx {

class Known;

class KnownRef {
public:
    KnownRef() = default;
    explicit KnownRef(Known* known);
    KnownRef(const KnownRef& other);
    KnownRef(KnownRef&& other) noexcept : known_(other.known_) { other.known_ = nullptr; }
    KnownRef& operator=(KnownRef other) noexcept {
        std::swap(known_, other.known_);
        return *this;
    }
    ~KnownRef();
    Known* get() const { return known_; }
    Known* operator->() const { return known_; }
    explicit operator bool() const { return known_; }
    bool operator==(const KnownRef& other) const { return known_ == other.known_; }

private:
    Known* known_ = nullptr;
};

class Known {
public:
    u32 refs = 0;
    u32 group = 0;
    vector<u32> own;                               // by local id
    vector<std::pair<u32, KnownRef>> foreign;      // sorted by group

    void set(u32 id, u32 clock) {
        if (id >= own.size()) own.resize(id + 1, 0);
        if (own[id] < clock) own[id] = clock;
    }
    u32 at(u32 id) const { return id < own.size() ? own[id] : 0; }
    void merge(const Known& other);                // elementwise maximum
    u32 foreign_at(u32 group, u32 id) const;

private:
    void merge_foreign(u32 from, const KnownRef& known);
};

inline KnownRef::KnownRef(Known* known) : known_(known) {
    if (known_) ++known_->refs;
}
inline KnownRef::KnownRef(const KnownRef& other) : known_(other.known_) {
    if (known_) ++known_->refs;
}
inline KnownRef::~KnownRef() {
    if (known_ && --known_->refs == 0) delete known_;
}

// The kinds of actors; local id = kind * threads + thread, for mbarriers 5 * threads + number.
enum Actor : u32 { kThread, kCpAsync, kBulkRead, kBulkWrite, kWgmma, kMbarrier };

// The clocks of one thread.
struct LaneClock {
    u32 id = 0;                  // in its group
    u32 clock = 1;
    u32 done[4] = {0, 0, 0, 0};  // completed clocks of its own engines: cp.async, bulk reads, bulk writes, wgmma
    KnownRef known;
    KnownRef proxied;            // what was ordered before the last fence.proxy.async on the way
    KnownRef mapped;             // what was ordered before its last acquiring fence.proxy.tensormap
    KnownRef fenced[3];          // what the last fence released: to the block, the cluster, the device
    KnownRef heard[3];           // what relaxed reads have seen, acquired by the next fence
};

// Collects what several threads know, to hand it to others.
class Joiner {
public:
    explicit Joiner(u32 group = 0) : group_(group) {}
    void add(const LaneClock& lane, u32 threads);
    void add(const KnownRef& known);
    void add_actor(u32 id, u32 clock);
    bool empty() const { return !joined_; }
    KnownRef take();             // and start anew

private:
    Known& joined();
    u32 group_;
    KnownRef joined_;
    vector<KnownRef> merged_;    // already in joined_
};

}  // namespace ptx
