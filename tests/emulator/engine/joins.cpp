// Where paths join: an order of the instructions in which what all paths lead to comes last.
#include <algorithm>

#include "program.h"

namespace ptx {
namespace {

// The instructions from which each is reached in one step; the last entry: those that leave the kernel.
vector<vector<int>> predecessors(const vector<Instr>& code) {
    const int n = int(code.size());
    vector<vector<int>> from(n + 1);
    for (int at = 0; at < n; ++at) {
        const Instr& i = code[at];
        const bool falls = i.flow == Flow::plain || i.guard.exists;
        if (falls) from[std::min(at + 1, n)].push_back(at);
        if (i.flow == Flow::exit) from[n].push_back(at);
        if (i.flow == Flow::branch && i.target >= 0) from[std::min(i.target, n)].push_back(at);
        if (i.flow == Flow::table) {
            for (int target : i.targets) from[std::min(target, n)].push_back(at);
        }
    }
    return from;
}

}  // namespace

// Walks back from the exit, depth first: an instruction gets its place once all that it can be reached from
// have theirs, loops aside. So the body of a loop stands before what follows it, however the code lies.
void order_by_joins(vector<Instr>& code) {
    const vector<vector<int>> from = predecessors(code);
    vector<u8> seen(from.size());
    vector<std::pair<int, size_t>> path{{int(code.size()), 0}};
    u32 rank = 1;  // 0: never reaches the exit
    while (!path.empty()) {
        auto& [at, next] = path.back();
        if (next < from[at].size()) {
            const int before = from[at][next++];
            if (!seen[before]) {
                seen[before] = 1;
                path.push_back({before, 0});
            }
        } else {
            if (at < int(code.size())) code[at].rank = rank++;
            path.pop_back();
        }
    }
}

}  // namespace ptx
