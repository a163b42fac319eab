// A kernel, decoded: instructions with resolved operands and the functions that run them.
#pragma once
#include "isa.h"

namespace ptx {

struct Warp;
struct Instr;

// Where an operand's 32 lanes lie. Predicates are one 32-bit mask.
struct Operand {
    u32 offset = 0;
    u8 bank = 0;             // 0: the warp's registers, 1: constants of the program
    u8 width = 0;            // bytes a lane; 0: predicate
    bool negated = false;
    bool exists = false;
};

enum class Flow : u8 { plain, branch, table, exit };
enum class Converge : u8 { none, mask, live, all };  // which lanes must be at the instruction together
enum class Order : u8 { weak, relaxed, acquire, release, acq_rel };
enum class Scope : u8 { cta, cluster, gpu, sys };
enum class Round : u8 { nearest, zero, down, up };

struct Instr {
    void (*run)(Warp&, const Instr&, u32 mask) = nullptr;
    Operand dst, dst2, src[4];
    Operand guard;
    Flow flow = Flow::plain;
    Converge converge = Converge::none;
    Operand member_mask;
    Type type = Type::none, from = Type::none;
    Space space = Space::generic;
    Order order = Order::weak;
    Scope scope = Scope::sys;
    Round round = Round::nearest;
    u8 op = 0;               // sub-operation of a family
    u8 count = 1;            // elements of a vector access, matrices of ldmatrix
    u8 bytes = 0;            // of one element
    bool ftz = false, sat = false, approximate = false, integer = false, flag = false;
    i64 offset = 0;          // of the address
    i64 immediate = 0;
    int m = 0, n = 0, k = 0; // tile of mma
    int target = -1;
    u32 pc = 0;
    u32 rank = 0;            // of the lanes of a warp, those at the lowest go first; see joins.cpp
    vector<Operand> list, list2;          // vector operands that are read
    vector<Operand> reads_c;              // the accumulator of mma
    vector<Operand> list3;                // vector results
    vector<int> targets;
    vector<Operand> reads, writes;        // every register, for the check of registers in flight
    const Statement* source = nullptr;
};

struct SharedSymbol {
    string name;
    u64 offset, bytes;
};

struct SpecialUse {
    string name;
    Operand where;
};

// A kernel, decoded.
struct Program {
    const Module* module = nullptr;
    const Function* function = nullptr;
    vector<Instr> code;
    vector<u8> constants;
    u32 register_bytes = 0;
    vector<SpecialUse> specials;          // filled in when a warp starts
    vector<SharedSymbol> shared;          // without the dynamic part
    u64 shared_base = 0, static_end = 0, dynamic_align = 16;
    bool has_dynamic = false;
    bool has_wgmma = false;
    bool has_async = false;               // bulk copies or wgmma
    u64 dynamic_offset() const { return (static_end + dynamic_align - 1) / dynamic_align * dynamic_align; }
    u64 local_bytes = 0;
    vector<u64> param_offsets;
    u64 param_bytes = 0;
    vector<u64> executed;                 // times each instruction was issued, of the running launch
    u8* constant_base() { return reinterpret_cast<u8*>((u64(constants.data()) + 63) / 64 * 64); }
    void align_constants();               // once, when decoded
};

void order_by_joins(vector<Instr>& code);

std::unique_ptr<Program> decode(const Module& module, const Function& function);

}  // namespace ptx
