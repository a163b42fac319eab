// Statements -> instructions with resolved operands and the function that runs them.
#pragma once
#include <map>

#include "machine.h"

namespace ptx {

// Where a symbol's storage is.
struct Location {
    Space space = Space::generic;
    u64 address = 0;         // in its space; of `frame` storage: offset in the lane's local memory
    bool frame = false;      // a parameter of a call, which lies in local memory
};

class Decoder {
public:
    Decoder(const Module& module, Program& program) : module_(module), program_(program) {}
    void run(const Function& function);

    // For the families of instructions:
    Operand result(const Arg& arg);                     // a register, or nothing for _
    Operand value(const Arg& arg, Type type);           // register, constant, special register or address
    vector<Operand> values(const Arg& arg, Type type);  // elements of a vector, or the one operand
    vector<Operand> results(const Arg& arg);
    void address(const Arg& arg, Instr& i, int slot = 0);  // base into src[slot], offset added up
    Location location(const Arg& symbol);
    Operand constant(u64 bits, u8 width);
    void uses_wgmma() { program_.has_wgmma = program_.has_async = true; }
    void uses_async() { program_.has_async = true; }

private:
    struct Frame {
        const Function* function;
        vector<Operand> regs;
        vector<Location> symbols;                       // of Function::symbols
        std::map<string, Location> params;
    };
    void enter(Frame& frame);
    void body(Frame& frame);
    void call(const Statement& st);
    void emit(const Statement& st);
    void layout_shared(const Function& function);
    Operand allocate(Type type);
    Operand special(const string& name);
    void bind(const Arg& actual, const Symbol& formal, Frame& callee);
    u64 local(u64 bytes, u64 align);
    Location shared(const Symbol& symbol);

    const Module& module_;
    Program& program_;
    Frame* frame_ = nullptr;
    vector<string> calling_;
    std::map<std::pair<u64, int>, Operand> constants_;
    std::map<string, Operand> specials_;
    std::map<string, Location> shared_;
    int returns_to_ = -1;    // statement count marker of an inlined function
    vector<u32> return_jumps_;
};

bool has(const Statement& st, const char* word);
Space space_of(const Statement& st, Space otherwise = Space::generic);
Order order_of(const Statement& st, Order otherwise);
Scope scope_of(const Statement& st, Scope otherwise);
Round round_of(const Statement& st);
Type type_at(const Statement& st, int from_end);        // the types among the words, counted from the end
void need_args(const Statement& st, size_t least);

// Each family takes the mnemonics it knows and returns false for the others.
bool decode_integer(Decoder& d, const Statement& st, Instr& i);
bool decode_bits(Decoder& d, const Statement& st, Instr& i);
bool decode_float(Decoder& d, const Statement& st, Instr& i);
bool decode_half(Decoder& d, const Statement& st, Instr& i);
bool decode_special(Decoder& d, const Statement& st, Instr& i);
bool decode_compare(Decoder& d, const Statement& st, Instr& i);
bool decode_convert(Decoder& d, const Statement& st, Instr& i);
bool decode_move(Decoder& d, const Statement& st, Instr& i);
bool decode_memory(Decoder& d, const Statement& st, Instr& i);
bool decode_atomic(Decoder& d, const Statement& st, Instr& i);
bool decode_sync(Decoder& d, const Statement& st, Instr& i);
bool decode_warp(Decoder& d, const Statement& st, Instr& i);
bool decode_copy(Decoder& d, const Statement& st, Instr& i);
bool decode_bulk(Decoder& d, const Statement& st, Instr& i);
bool decode_mbarrier(Decoder& d, const Statement& st, Instr& i);
bool decode_tensormap(Decoder& d, const Statement& st, Instr& i);
bool decode_matrix(Decoder& d, const Statement& st, Instr& i);
bool decode_wgmma(Decoder& d, const Statement& st, Instr& i);

}  // namespace ptx
