// Barriers of the block, of the warp and of the cluster.
#include "sync.h"

namespace ptx {
namespace {

enum Kind : u8 { kSync, kArrive, kPopc, kAnd, kOr, kClusterArrive, kClusterWait };

void wake(Warp& w, u32 mask) {
    for (int f = 0; f < w.count; ++f) {
        if (w.fragments[f].state == Fragment::blocked && (w.fragments[f].mask & mask)) {
            w.fragments[f].state = Fragment::ready;
        }
    }
}

void finish(Block& block, Barrier& b) {
    const KnownRef known = b.released.take();
    const KnownRef proxied = b.proxied.empty() ? KnownRef() : b.proxied.take();
    for (const Barrier::Waiter& waiter : b.waiting) {
        Warp& w = *waiter.warp;
        each_lane(waiter.mask, [&](int l) {
            w.lanes[l].known = known;
            if (proxied) w.lanes[l].proxied = proxied;
            ++w.lanes[l].clock;
        });
        const Instr& i = *waiter.instr;
        if (i.op == kPopc) {
            u32 ones[kLanes];
            std::fill(ones, ones + kLanes, b.ones);
            lanes_out(w, i.dst, ones, waiter.mask);
        } else if (i.op == kAnd || i.op == kOr) {
            bool yes = i.op == kAnd ? b.ones == b.threads : b.ones > 0;
            predicate_out(w, i.dst, yes ? kAll : 0, waiter.mask);
        }
        wake(w, waiter.mask);
    }
    b.waiting.clear();
    b.arrived = b.expected = b.ones = b.threads = 0;
    ++block.group->grid->stats.barriers;
    ++block.group->grid->progress;
}

void settle(Block& block, Barrier& b) {
    const u32 expected = b.expected ? b.expected : block.live_threads;
    if (b.arrived && b.arrived >= expected) finish(block, b);
}

void note(Barrier& b, Warp& w, u32 m) {
    const u32 threads = w.block->group->grid->threads_per_group();
    each_lane(m, [&](int l) {
        b.released.add(w.lanes[l], threads);
        b.proxied.add(w.lanes[l].proxied);
    });
}

void block_barrier(Warp& w, const Instr& i, u32 m) {
    const int lane = __builtin_ctz(m);
    u64 number[kLanes], count[kLanes];
    lanes_any(w, i.src[0], number);
    if (number[lane] > 15) fail(w, i, lane, "barrier", "there is no barrier " + std::to_string(number[lane]));
    Barrier& b = w.block->barriers[number[lane]];
    u32 expected = 0;
    if (i.src[1].exists) {
        lanes_any(w, i.src[1], count);
        expected = u32(count[lane]);
        if (expected % kLanes || !expected) {
            fail(w, i, lane, "barrier", "the thread count " + std::to_string(expected) + " is no multiple of 32");
        }
    }
    if (b.arrived && b.expected != expected) {
        fail(w, i, lane, "barrier", "barrier " + std::to_string(number[lane]) + " is used with " +
             std::to_string(b.expected) + " and with " + std::to_string(expected) + " threads (0: all)");
    }
    b.expected = expected;
    note(b, w, m);
    b.arrived += expected && i.converge == Converge::live ? kLanes : u32(__builtin_popcount(m));
    if (i.src[2].exists) b.ones += u32(__builtin_popcount(predicate(w, i.src[2]) & m));
    b.threads += u32(__builtin_popcount(m));
    if (expected && b.arrived > expected) {
        fail(w, i, lane, "barrier", "more than " + std::to_string(expected) + " threads arrived at barrier " +
             std::to_string(number[lane]));
    }
    w.at_barrier = true;
    if (i.op == kArrive) {
        each_lane(m, [&](int l) { ++w.lanes[l].clock; });
    } else {
        b.waiting.push_back({&w, m, &i});
        w.blocked = m;
    }
}

void warp_barrier(Warp& w, const Instr&, u32 m) {
    const Group& group = *w.block->group;
    Joiner known(group.index), proxied(group.index);
    each_lane(m, [&](int l) {
        known.add(w.lanes[l], group.grid->threads_per_group());
        proxied.add(w.lanes[l].proxied);
    });
    const KnownRef all = known.take();
    const KnownRef all_proxied = proxied.empty() ? KnownRef() : proxied.take();
    each_lane(m, [&](int l) {
        w.lanes[l].known = all;
        if (all_proxied) w.lanes[l].proxied = all_proxied;
        ++w.lanes[l].clock;
    });
}

// ---- cluster: arrive and wait are apart, each phase of all threads of all blocks ----

u32 live_in(const Group& group) {
    u32 live = 0;
    for (const auto& block : group.blocks) live += block->live_threads;
    return live;
}

void settle_cluster(Group& group) {
    Barrier& b = group.cluster_barrier;
    if (!b.arrived || b.arrived < live_in(group)) return;
    b.arrived = 0;
    ++group.cluster_phase;
    group.cluster_known = b.released.take();
    group.cluster_proxied = b.proxied.empty() ? KnownRef() : b.proxied.take();
    for (const Barrier::Waiter& waiter : b.waiting) {
        each_lane(waiter.mask, [&](int l) { learn(*waiter.warp, l, group.cluster_known, group.cluster_proxied); });
        wake(*waiter.warp, waiter.mask);
    }
    b.waiting.clear();
    ++group.grid->progress;
}

void cluster_arrive(Warp& w, const Instr& i, u32 m) {
    Group& group = *w.block->group;
    const u32 threads = group.grid->threads_per_group();
    each_lane(m, [&](int l) {
        if (w.cluster_arrived >> l & 1) fail(w, i, l, "barrier", "the thread arrives twice at the cluster barrier");
        w.cluster_phase[l] = group.cluster_phase;
        if (!i.flag) {  // .relaxed releases nothing
            group.cluster_barrier.released.add(w.lanes[l], threads);
            group.cluster_barrier.proxied.add(w.lanes[l].proxied);
        }
        ++w.lanes[l].clock;
    });
    w.at_barrier = true;
    w.cluster_arrived |= m;
    group.cluster_barrier.arrived += u32(__builtin_popcount(m));
}

void cluster_wait(Warp& w, const Instr& i, u32 m) {
    Group& group = *w.block->group;
    u32 waiting = 0;
    each_lane(m, [&](int l) {
        if (!(w.cluster_arrived >> l & 1)) {
            fail(w, i, l, "barrier", "the thread waits at the cluster barrier and has not arrived");
        }
        if (w.cluster_phase[l] == group.cluster_phase) waiting |= 1u << l;
        else learn(w, l, group.cluster_known, group.cluster_proxied);
    });
    w.cluster_arrived &= ~m;
    if (waiting) {
        group.cluster_barrier.waiting.push_back({&w, waiting, &i});
        w.blocked = waiting;
        w.at_barrier = true;
    }
}

void decode_block(Decoder& d, const Statement& st, Instr& i, size_t first) {
    // arguments: [result,] number [, count] [, predicate]
    size_t last = st.args.size();
    if (i.op >= kPopc) i.src[2] = d.value(st.args.at(--last), Type::pred);
    i.src[0] = d.value(st.args.at(first), Type::u32);
    if (first + 1 < last) i.src[1] = d.value(st.args[first + 1], Type::u32);
    i.run = block_barrier;
}

}  // namespace

void settle_barriers(Block& block) {
    for (Barrier& b : block.barriers) settle(block, b);
    settle_cluster(*block.group);
}

bool decode_barrier(Decoder& d, const Statement& st, Instr& i) {
    // bar is barrier.aligned; everything aligned wants the whole warp
    const bool aligned = st.op[0] == "bar" || has(st, "aligned");
    i.converge = aligned ? Converge::live : Converge::none;
    if (has(st, "warp")) {
        need_args(st, 1);
        i.converge = Converge::mask;
        i.member_mask = d.value(st.args[0], Type::u32);
        i.run = warp_barrier;
    } else if (has(st, "cluster")) {
        i.op = has(st, "wait") ? kClusterWait : kClusterArrive;
        i.flag = has(st, "relaxed");
        i.run = i.op == kClusterWait ? cluster_wait : cluster_arrive;
    } else if (has(st, "red")) {
        i.op = has(st, "popc") ? kPopc : has(st, "and") ? kAnd : kOr;
        i.dst = d.result(st.args.at(0));
        decode_block(d, st, i, 1);
    } else {
        need_args(st, 1);
        i.op = has(st, "arrive") ? kArrive : kSync;
        decode_block(d, st, i, 0);
    }
    return true;
}

}  // namespace ptx
