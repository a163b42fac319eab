// mbarrier.*: see mbarrier.h.
#include "mbarrier.h"

#include <cstdlib>

#include "copy.h"
#include "sync.h"

namespace ptx {
namespace {

enum Kind : u8 { kExpect, kComplete, kArrive, kArriveExpect };

void touch(Warp& w, const Instr& i, int lane, const Place& p, Access kind, bool strong) {
    Recorder as = recorder(w, lane);
    if (strong) as.stamp |= kStrong;
    check_access(w, i, lane, p, 8, kind, false, as);
}

void settle(Grid& grid, Mbarrier& m) {
    if (m.pending || m.transactions) return;
    m.completed = m.released.take();
    m.completed_proxied = m.proxied.empty() ? KnownRef() : m.proxied.take();
    m.completed_far = m.far.empty() ? KnownRef() : m.far.take();
    ++m.phase;
    ++m.clock;
    m.pending = m.expected;
    ++grid.progress;
    grid.spinning.clear();
}

void create(Warp& w, const Instr& i, int lane, const Place& p, u64 count) {
    if (!count || count >= 1u << 20) fail(w, i, lane, "mbarrier", "the count must be 1 to 2^20 - 1");
    Group& group = *w.block->group;
    auto [at, fresh] = p.owner->mbarriers.try_emplace(p.offset);
    Mbarrier& m = at->second;
    if (fresh) {
        m.actor = group.mbarrier_actors++;
        if (m.actor >= 4096) throw Unsupported("more than 4096 mbarriers in a block");
    }
    m.expected = m.pending = u32(count);
    m.transactions = 0;
    m.phase = 0;
    ++m.clock;
    m.valid = true;
    m.released = m.proxied = m.far = Joiner(group.index);
    m.completed = m.completed_proxied = m.completed_far = {};
    m.creator = w.lanes[lane].id;
    m.created = w.lanes[lane].clock;
    m.published = false;
}

void promise(Warp& w, const Instr& i, int lane, Mbarrier& m, i64 bytes) {
    constexpr i64 kMost = (1 << 20) - 1;
    m.transactions += bytes;
    if (std::abs(bytes) > kMost || std::abs(m.transactions) > kMost) {
        fail(w, i, lane, "mbarrier", "it counts up to 2^20 - 1 bytes of a phase");
    }
}

// An arrival from another block orders nothing unless it is .release.cluster.
void arrive(Warp& w, const Instr& i, int lane, const Place& p, Mbarrier& m, u64 count) {
    if (count > m.pending) fail(w, i, lane, "mbarrier", "more threads arrive than the phase expects");
    const bool near = p.owner == w.block;
    if (i.order != Order::relaxed && (near || i.scope != Scope::cta)) {
        (near ? m.released : m.far).add(w.lanes[lane], w.block->group->grid->threads_per_group());
        m.proxied.add(w.lanes[lane].proxied);
        ++w.lanes[lane].clock;
    }
    m.pending -= u32(count);
    if (i.sat) m.expected -= u32(count);  // arrive_drop
    ++w.block->group->grid->progress;
    settle(*w.block->group->grid, m);
}

struct Arguments {
    u64 at[kLanes], value[kLanes];
};

using OneLane = void (*)(Warp&, const Instr&, int lane, const Place&, Mbarrier&, u64 value);

void each_mbarrier(Warp& w, const Instr& i, u32 mask, OneLane f) {
    Arguments a;
    addresses(w, i, 0, mask, a.at);
    if (i.src[1].exists) lanes_any(w, i.src[1], a.value);
    each_lane(mask, [&](int l) {
        Place p;
        Mbarrier& m = mbarrier_at(w, i, l, i.space, a.at[l], &p);
        f(w, i, l, p, m, i.src[1].exists ? a.value[l] : 1);
    });
}

void run_init(Warp& w, const Instr& i, u32 mask) {
    Arguments a;
    addresses(w, i, 0, mask, a.at);
    lanes_any(w, i.src[1], a.value);
    each_lane(mask, [&](int l) {
        const Place p = find_place(w, i, l, i.space, a.at[l], 8, "mbarrier");
        touch(w, i, l, p, Access::write, false);
        create(w, i, l, p, a.value[l]);
    });
}

void run_invalidate(Warp& w, const Instr& i, u32 mask) {
    each_mbarrier(w, i, mask, [](Warp& w, const Instr& i, int l, const Place& p, Mbarrier& m, u64) {
        touch(w, i, l, p, Access::write, false);
        m.valid = false;
    });
}

void run_expect(Warp& w, const Instr& i, u32 mask) {
    each_mbarrier(w, i, mask, [](Warp& w, const Instr& i, int l, const Place& p, Mbarrier& m, u64 bytes) {
        touch(w, i, l, p, Access::update, true);
        promise(w, i, l, m, i.op == kComplete ? -i64(bytes) : i64(bytes));
        settle(*w.block->group->grid, m);
    });
}

void run_arrive(Warp& w, const Instr& i, u32 mask) {
    u64 state[kLanes] = {};
    Arguments a;
    addresses(w, i, 0, mask, a.at);
    if (i.src[1].exists) lanes_any(w, i.src[1], a.value);
    each_lane(mask, [&](int l) {
        Place p;
        Mbarrier& m = mbarrier_at(w, i, l, i.space, a.at[l], &p);
        touch(w, i, l, p, Access::update, true);
        state[l] = m.phase;
        if (i.op == kArriveExpect) promise(w, i, l, m, i64(a.value[l]));
        arrive(w, i, l, p, m, i.op == kArrive && i.src[1].exists ? a.value[l] : 1);
    });
    if (i.dst.exists) lanes_any_out(w, i.dst, state, mask);
}

void run_test(Warp& w, const Instr& i, u32 mask) {  // flag: by parity
    Arguments a;
    addresses(w, i, 0, mask, a.at);
    lanes_any(w, i.src[1], a.value);
    u32 done = 0;
    Grid& grid = *w.block->group->grid;
    each_lane(mask, [&](int l) {
        Place p;
        Mbarrier& m = mbarrier_at(w, i, l, i.space, a.at[l], &p);
        touch(w, i, l, p, Access::read, true);
        if (!i.flag && m.phase - u32(a.value[l]) > 1) {
            fail(w, i, l, "mbarrier", "a thread can wait for the present phase and for the one before only");
        }
        const bool yes = i.flag ? (m.phase & 1) != (a.value[l] & 1) : m.phase != u32(a.value[l]);
        if (yes) {
            done |= 1u << l;
            if (m.completed && i.order != Order::relaxed) {
                learn(w, l, m.completed, m.completed_proxied);
                if (i.scope != Scope::cta) learn(w, l, m.completed_far);
            }
        } else {
            w.yield = true;
            grid.spinning = "the mbarrier at " + address_name(w, p, 0) + ", where " + std::to_string(m.pending) +
                            " arrivals and " + std::to_string(m.transactions) + " bytes are missing";
        }
    });
    predicate_out(w, i.dst, done, mask);
}

// The arrival of all cp.async the thread has issued; without .noinc it is an arrival more than expected.
void run_cp_async_arrive(Warp& w, const Instr& i, u32 mask) {
    each_mbarrier(w, i, mask, [](Warp& w, const Instr& i, int l, const Place& p, Mbarrier& m, u64) {
        touch(w, i, l, p, Access::update, true);
        land_all(w, l);
        const u32 threads = w.block->group->grid->threads_per_group();
        m.released.add_actor(kCpAsync * threads + w.lanes[l].id, w.copy_groups(l).issued - 1);
        if (!i.flag) ++m.pending;
        if (!m.pending) fail(w, i, l, "mbarrier", "more threads arrive than the phase expects");
        --m.pending;
        settle(*w.block->group->grid, m);
    });
}

void decode_arguments(Decoder& d, const Statement& st, Instr& i, size_t first) {
    d.address(st.args.at(first), i);
    if (first + 1 < st.args.size()) i.src[1] = d.value(st.args[first + 1], Type::u32);
}

}  // namespace

Mbarrier& mbarrier_at(Warp& w, const Instr& i, int lane, Space space, u64 at, Place* place) {
    const Place p = find_place(w, i, lane, space, at, 8, "mbarrier");
    if (place) *place = p;
    if (p.space == Space::shared) {
        auto found = p.owner->mbarriers.find(p.offset);
        if (found != p.owner->mbarriers.end() && found->second.valid) return found->second;
    }
    fail(w, i, lane, "mbarrier", "none has been initialised at " + address_name(w, p, at));
}

void need_published(Warp& w, const Instr& i, int lane, const Mbarrier& m) {
    const KnownRef& proxied = w.lanes[lane].proxied;
    const bool fenced = m.published || (proxied && proxied->at(m.creator) >= m.created);
    if (fenced || !w.block->group->grid->options.strict) return;
    fail(w, i, lane, "missing fence.proxy.async", "the copy completes on an mbarrier whose initialisation "
         "no fence.proxy.async and no fence.mbarrier_init has made visible to it");
}

Recorder completion(const Grid& grid, const Mbarrier& m) {
    return {kMbarrier * grid.threads_per_group() + m.actor, m.clock};
}

namespace {

void arrive_now(Grid& grid, const Arrival& a) {
    a.at->released.add_actor(a.actor, a.clock);
    a.at->transactions -= i64(a.bytes);
    settle(grid, *a.at);
}

}  // namespace

void complete_bytes(Warp& w, Mbarrier& m, u64 bytes) {
    Group& group = *w.block->group;
    const Recorder done = completion(*group.grid, m);
    const Arrival a{&m, done.id, done.stamp, bytes};
    if (group.grid->options.order == 1) group.late.push_back(a);
    else arrive_now(*group.grid, a);
}

bool deliver(Group& group, bool all) {
    const vector<Arrival> waiting = std::move(group.late);
    group.late.clear();
    for (const Arrival& a : waiting) {
        if (all || group.grid->random() % 4 == 0) arrive_now(*group.grid, a);
        else group.late.push_back(a);
    }
    if (!waiting.empty()) ++group.grid->progress;
    return !waiting.empty();
}

bool decode_mbarrier(Decoder& d, const Statement& st, Instr& i) {
    const bool copies = st.op[0] == "cp" && st.op.size() > 3 && st.op[1] == "async" && st.op[2] == "mbarrier";
    if (st.op[0] != "mbarrier" && !copies) return false;
    i.space = space_of(st);
    i.order = order_of(st, Order::acq_rel);
    i.scope = scope_of(st, Scope::cta);
    if (copies) {
        i.flag = has(st, "noinc");
        i.run = run_cp_async_arrive;
        decode_arguments(d, st, i, 0);
        return true;
    }
    const string& kind = st.op[1];
    if (kind == "init" || kind == "inval" || kind == "expect_tx" || kind == "complete_tx") {
        i.op = kind == "complete_tx" ? kComplete : kExpect;
        i.run = kind == "init" ? run_init : kind == "inval" ? run_invalidate : run_expect;
        decode_arguments(d, st, i, 0);
    } else if (kind == "arrive" || kind == "arrive_drop") {
        i.op = has(st, "expect_tx") ? kArriveExpect : kArrive;
        i.sat = kind == "arrive_drop";
        const bool has_result = st.args.at(0).kind != Arg::address;
        if (has_result) i.dst = d.result(st.args[0]);
        decode_arguments(d, st, i, has_result);
        i.run = run_arrive;
    } else if (kind == "test_wait" || kind == "try_wait") {
        need_args(st, 3);
        i.dst = d.result(st.args[0]);
        i.flag = has(st, "parity");
        d.address(st.args[1], i);
        i.src[1] = d.value(st.args[2], i.flag ? Type::u32 : Type::b64);
        i.run = run_test;
    }
    return i.run != nullptr;
}

}  // namespace ptx
