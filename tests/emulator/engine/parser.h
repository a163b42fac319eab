// Splits PTX into functions and variables, and the bodies of functions into statements.
#pragma once
#include "isa.h"

namespace ptx {

class Parser {
public:
    explicit Parser(Module& module) : module_(module) {}
    void run(const string& source);

private:
    struct Scope {
        int parent;
        std::map<string, int> regs, labels, symbols;
    };
    void line_directive(const string& line);
    void function(const string& header, const string& body);
    void parameters(const string& list, vector<Symbol>& symbols, vector<Arg>& registers, Space space);
    Symbol variable(string text, vector<u8>* initial);
    void module_variable(const string& text);
    void body(const string& text);
    void statement(string text);
    void declare_registers(const string& text);
    void instruction(string text);
    void resolve_labels();
    int find(const string& name, std::map<string, int> Scope::* table, int scope) const;
    Arg operand(string text);
    Arg address(const string& inside);
    Arg number(const string& text) const;

    Module& module_;
    Function* f_ = nullptr;
    vector<Scope> scopes_;
    int scope_ = 0;
    int file_ = 0, line_ = 0;
    struct Jump {
        int statement, scope;
        vector<string> labels;
    };
    vector<Jump> jumps_;
    std::map<string, vector<string>> tables_;  // .branchtargets
    string last_label_;
};

}  // namespace ptx
