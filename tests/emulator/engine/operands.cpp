// Operands and declarations of PTX as written: numbers, addresses, vectors, registers, variables.
#include "parser.h"

#include <cstdlib>
#include <cstring>

#include "text.h"

namespace ptx {

int Parser::find(const string& name, std::map<string, int> Scope::* table, int scope) const {
    for (int s = scope; s >= 0; s = scopes_[s].parent) {
        auto hit = (scopes_[s].*table).find(name);
        if (hit != (scopes_[s].*table).end()) return hit->second;
    }
    return -1;
}

Arg Parser::number(const string& text) const {
    Arg arg;
    if (text.size() > 2 && text[0] == '0' && strchr("fFdD", text[1])) {
        arg.kind = strchr("fF", text[1]) ? Arg::single : Arg::real;
        arg.bits = strtoull(text.c_str() + 2, nullptr, 16);
    } else if (text.find('.') != string::npos) {
        double value = atof(text.c_str());
        arg.kind = Arg::real;
        memcpy(&arg.bits, &value, 8);
    } else {
        arg.bits = text[0] == '-' ? u64(strtoll(text.c_str(), nullptr, 0)) : strtoull(text.c_str(), nullptr, 0);
    }
    return arg;
}

// [base], [base+offset], and TMA's [map, {x, y}]
Arg Parser::address(const string& inside) {
    Arg arg;
    arg.kind = Arg::address;
    vector<string> pieces = split(inside, ',');
    string base = pieces.empty() ? "" : pieces[0];
    size_t cut = base.find_first_of("+-", 1);
    if (cut != string::npos && base[0] != '{') {
        string tail = trim(base.substr(cut + 1));
        arg.offset = strtoll(tail.c_str(), nullptr, 0);
        if (base[cut] == '-') arg.offset = -arg.offset;
        base = trim(base.substr(0, cut));
    }
    arg.parts.push_back(operand(base));
    for (size_t i = 1; i < pieces.size(); ++i) arg.parts.push_back(operand(pieces[i]));
    return arg;
}

Arg Parser::operand(string text) {
    text = trim(text);
    if (text.empty()) throw Unsupported("an operand is missing");
    Arg arg;
    if (text[0] == '!') {
        arg = operand(text.substr(1));
        arg.negated = true;
        return arg;
    }
    if (text[0] == '{' || text[0] == '(') {
        arg.kind = text[0] == '{' ? Arg::vector_ : Arg::paren;
        for (const string& part : split(text.substr(1, text.find_last_of("})") - 1), ',')) {
            arg.parts.push_back(operand(part));
        }
        return arg;
    }
    if (text[0] == '[') return address(trim(text.substr(1, text.rfind(']') - 1)));
    int reg = find(text, &Scope::regs, scope_);
    if (reg >= 0 || text == "_") {
        arg.kind = Arg::reg;
        arg.reg_id = reg;  // -1: the result is not wanted
        return arg;
    }
    if (text[0] == '%' || text == "WARP_SZ") {
        arg.kind = Arg::special;
        arg.name = text;
        return arg;
    }
    if (isdigit(text[0]) || text[0] == '-') return number(text);
    arg.kind = Arg::symbol;
    size_t cut = text.find_first_of("+[");
    if (cut != string::npos) {
        arg.offset = strtoll(trim(text.substr(cut + 1)).c_str(), nullptr, 0);
        text = trim(text.substr(0, cut));
    }
    int local = find(text, &Scope::symbols, scope_);
    arg.name = text;
    arg.reg_id = local;  // index into Function::symbols, -1 for module scope and parameters
    return arg;
}

void Parser::declare_registers(const string& text) {
    // .reg .b32 %r<10>, %x, {..}
    size_t at = text.find('.', 4);
    size_t end = text.find_first_of(" \t", at);
    Type type = type_of(text.substr(at + 1, end - at - 1));
    for (const string& name : split(text.substr(end), ',')) {
        size_t open = name.find('<');
        int count = open == string::npos ? 1 : atoi(name.c_str() + open + 1);
        for (int i = 0; i < count; ++i) {
            string own = open == string::npos ? name : name.substr(0, open) + std::to_string(i);
            scopes_[scope_].regs[own] = int(f_->regs.size());
            f_->regs.push_back(type);
        }
    }
}

Symbol Parser::variable(string text, vector<u8>* initial) {
    Symbol symbol;
    string values;
    size_t equals = text.find('=');
    if (equals != string::npos) {
        values = text.substr(equals + 1);
        text = trim(text.substr(0, equals));
    }
    symbol.external = has_word(text, ".extern");
    symbol.space = has_word(text, ".shared")  ? Space::shared
                   : has_word(text, ".local") ? Space::local
                   : has_word(text, ".param") ? Space::param
                   : has_word(text, ".const") ? Space::constant
                                              : Space::global;
    size_t bracket = text.find('[');
    string head = trim(text.substr(0, bracket));
    size_t gap = head.find_last_of(" \t");
    symbol.name = head.substr(gap + 1);
    u64 elements = 1;
    for (size_t b = bracket; b != string::npos; b = text.find('[', b + 1)) {
        elements *= strtoull(text.c_str() + b + 1, nullptr, 0);
    }
    Type type = Type::b8;
    for (const string& word : words(head.substr(0, gap))) {
        if (type_of(word.substr(1)) != Type::none) type = type_of(word.substr(1));
        if (word == ".v2") elements *= 2;
        if (word == ".v4") elements *= 4;
    }
    u64 size = bytes_of(type);
    symbol.bytes = elements * size;
    size_t align = text.find(".align");
    symbol.align = align != string::npos ? strtoull(text.c_str() + align + 6, nullptr, 0) : size;
    if (initial && !values.empty()) {
        initial->assign(symbol.bytes, 0);
        size_t open = values.find('{');
        if (open != string::npos) values = values.substr(open + 1, values.rfind('}') - open - 1);
        u64 i = 0;
        for (const string& value : split(values, ',')) {
            u64 bits = number(value).bits;
            if (i + size <= symbol.bytes) memcpy(initial->data() + i, &bits, size);
            i += size;
        }
    }
    return symbol;
}

void Parser::module_variable(const string& text) {
    vector<u8> initial;
    Symbol symbol = variable(text, &initial);
    if (symbol.space == Space::global || symbol.space == Space::constant) {
        module_.storage.emplace_back(new u8[symbol.bytes + 32]());
        u64 base = u64(module_.storage.back().get());
        symbol.address = (base + 15) / 16 * 16;
        if (!initial.empty()) memcpy(reinterpret_cast<void*>(symbol.address), initial.data(), initial.size());
    }
    module_.symbols[symbol.name] = symbol;
}

void Parser::parameters(const string& list, vector<Symbol>& symbols, vector<Arg>& registers, Space space) {
    for (const string& text : split(list, ',')) {
        if (has_word(text, ".reg")) {
            declare_registers(text);
            Arg arg = operand(text.substr(text.find_last_of(" \t") + 1));
            registers.push_back(arg);
            continue;
        }
        // `.ptr .align n` describes the pointee, not the parameter
        size_t ptr = text.find(".ptr");
        string own = ptr == string::npos ? text : text.substr(0, ptr) + text.substr(text.find_last_of(" \t"));
        Symbol symbol = variable(own, nullptr);
        symbol.space = space;
        symbol.param_index = int(symbols.size());
        symbols.push_back(symbol);
    }
}

}  // namespace ptx
