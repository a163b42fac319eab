// Facts about PTX types.
#include "isa.h"

namespace ptx {

namespace {
struct Fact {
    const char* name;
    Type type;
    int bytes;
};
const Fact kFacts[] = {
    {"pred", Type::pred, 1},      {"b8", Type::b8, 1},          {"b16", Type::b16, 2},
    {"b32", Type::b32, 4},        {"b64", Type::b64, 8},        {"b128", Type::b128, 16},
    {"u8", Type::u8, 1},          {"u16", Type::u16, 2},        {"u32", Type::u32, 4},
    {"u64", Type::u64, 8},        {"s8", Type::s8, 1},          {"s16", Type::s16, 2},
    {"s32", Type::s32, 4},        {"s64", Type::s64, 8},        {"f16", Type::f16, 2},
    {"f16x2", Type::f16x2, 4},    {"bf16", Type::bf16, 2},      {"bf16x2", Type::bf16x2, 4},
    {"f32", Type::f32, 4},        {"f64", Type::f64, 8},        {"tf32", Type::tf32, 4},
    {"e4m3", Type::e4m3, 1},      {"e5m2", Type::e5m2, 1},      {"e4m3x2", Type::e4m3x2, 2},
    {"e5m2x2", Type::e5m2x2, 2},
};
}  // namespace

Type type_of(const string& name) {
    for (const Fact& fact : kFacts) {
        if (name == fact.name) return fact.type;
    }
    return Type::none;
}

int bytes_of(Type type) {
    for (const Fact& fact : kFacts) {
        if (type == fact.type) return fact.bytes;
    }
    return 0;
}

bool is_signed(Type type) { return type >= Type::s8 && type <= Type::s64; }

bool is_float(Type type) { return type >= Type::f16; }

}  // namespace ptx
