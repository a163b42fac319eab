// The names of PTX: types, spaces, orders, scopes, and the plain structures the parser produces.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;
using std::string;
using std::vector;

constexpr int kLanes = 32;
constexpr u32 kAll = 0xffffffffu;

enum class Type : u8 {
    none, pred,
    b8, b16, b32, b64, b128,
    u8, u16, u32, u64,
    s8, s16, s32, s64,
    f16, f16x2, bf16, bf16x2, f32, f64, tf32,
    e4m3, e5m2, e4m3x2, e5m2x2,
};

Type type_of(const string& name);  // Type::none if it is no type
int bytes_of(Type type);
bool is_signed(Type type);
bool is_float(Type type);

enum class Space : u8 { generic, global, shared, local, param, constant };

// What the program asks cannot be done: bad PTX, or an instruction that is not modelled.
struct Unsupported : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A rule of the machine was broken by the kernel.
struct Violation : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// An operand as written. `parts` are the elements of a {vector}, or base of an [address].
struct Arg {
    enum Kind : u8 { reg, integer, single, real, special, symbol, address, vector_, paren } kind = integer;
    string name;            // special register or symbol
    int reg_id = -1;        // index into Function::regs
    u64 bits = 0;           // integer value, or the bits of a float/double literal
    i64 offset = 0;         // of an address or symbol+offset
    bool negated = false;   // !%p
    vector<Arg> parts;
};

struct Symbol {
    string name;
    Space space = Space::generic;
    u64 bytes = 0;
    u64 align = 1;
    bool external = false;   // .extern .shared: takes the dynamic part
    u64 address = 0;         // host address of a global or constant variable
    int param_index = -1;    // kernel or function parameter
};

struct Statement {
    string text;             // for messages
    vector<string> op;       // mnemonic split at dots; "shared::cta" stays whole
    vector<Arg> args;
    int guard = -1;          // register id of the predicate
    bool guard_negated = false;
    int target = -1;         // of a branch: statement index
    int file = 0, line = 0;
    vector<int> targets;     // of brx.idx
};

struct Function {
    string name;
    bool entry = false;
    vector<Symbol> params, returns;      // in declaration order
    vector<Arg> register_params, register_returns;  // of .func with .reg parameters
    vector<Type> regs;
    vector<Symbol> symbols;              // .shared, .local and .param declared inside
    vector<Statement> body;
    u32 required_threads = 0;
    u32 cluster[3] = {0, 0, 0};
};

struct Module {
    std::map<string, std::unique_ptr<Function>> functions;
    std::map<string, Symbol> symbols;
    std::map<int, string> files;
    vector<std::unique_ptr<u8[]>> storage;   // of global and constant variables
    int arch = 80;
};

std::unique_ptr<Module> parse(const string& text);

}  // namespace ptx
