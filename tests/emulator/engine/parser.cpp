// PTX text -> Module: statements with scopes and labels, functions, the file as a whole.
#include "parser.h"

#include <cstdlib>
#include <cstring>

#include "text.h"

namespace ptx {

void Parser::instruction(string text) {
    Statement st;
    st.text = text;
    st.file = file_;
    st.line = line_;
    if (text[0] == '@') {
        size_t end = text.find_first_of(" \t");
        string name = text.substr(1, end - 1);
        st.guard_negated = name[0] == '!';
        if (st.guard_negated) name = name.substr(1);
        st.guard = find(name, &Scope::regs, scope_);
        if (st.guard < 0) throw Unsupported("unknown predicate " + name);
        text = trim(text.substr(end));
    }
    size_t end = text.find_first_of(" \t{[(");
    st.op = split_dots(text.substr(0, end));
    string rest = end == string::npos ? "" : trim(text.substr(end));
    const string& base = st.op[0];
    int index = int(f_->body.size());
    if (base == "bra") {
        jumps_.push_back({index, scope_, {rest}});
    } else if (base == "brx") {
        vector<string> pieces = split(rest, ',');
        st.args.push_back(operand(pieces[0]));
        auto table = pieces.size() > 1 ? tables_.find(pieces[1]) : tables_.end();
        if (table == tables_.end()) throw Unsupported("no .branchtargets for " + rest);
        jumps_.push_back({index, scope_, table->second});
    } else if (!rest.empty()) {
        for (const string& piece : split(rest, ',')) {
            size_t bar = piece[0] == '[' || piece[0] == '{' ? string::npos : piece.find('|');
            st.args.push_back(operand(piece.substr(0, bar)));
            if (bar != string::npos) st.args.back().parts.push_back(operand(piece.substr(bar + 1)));
        }
    }
    f_->body.push_back(std::move(st));
}

void Parser::line_directive(const string& line) {
    if (starts_with(line, ".loc")) {
        sscanf(line.c_str(), ".loc %d %d", &file_, &line_);
    } else if (starts_with(line, ".file")) {
        int number = atoi(line.c_str() + 5);
        size_t open = line.find('"'), close = line.find('"', open + 1);
        if (close != string::npos) module_.files[number] = line.substr(open + 1, close - open - 1);
    } else if (starts_with(line, ".target")) {
        size_t at = line.find("sm_");
        if (at != string::npos) module_.arch = atoi(line.c_str() + at + 3);
    }
}

void Parser::statement(string text) {
    text = trim(text);
    for (size_t colon; (colon = text.find(':')) != string::npos;) {
        // a label ends in one colon and has no blank, dot or comma in it
        if (text.find_first_of(" \t,.[{") < colon || text[colon + 1] == ':') break;
        string label = text.substr(0, colon);
        text = trim(text.substr(colon + 1));
        scopes_[scope_].labels[label] = int(f_->body.size());
        last_label_ = label;
    }
    if (starts_with(text, ".callprototype")) return;
    if (starts_with(text, ".branchtargets")) {  // of the label before it, on its line or above
        tables_[last_label_] = split(text.substr(14), ',');
        return;
    }
    if (text.empty()) return;
    if (text[0] != '.') return instruction(text);
    if (starts_with(text, ".reg")) return declare_registers(text);
    if (has_word(text, ".shared") || has_word(text, ".local") || has_word(text, ".param")) {
        scopes_[scope_].symbols[variable(text, nullptr).name] = int(f_->symbols.size());
        f_->symbols.push_back(variable(text, nullptr));
    } else if (has_word(text, ".global") || has_word(text, ".const")) {
        module_variable(text);
    }
}

void Parser::body(const string& text) {
    string current;
    for (size_t i = 0; i < text.size(); ++i) {
        char c = text[i];
        bool blank = c == '\n' || c == '{' || c == '}' ? trim(current).empty() : false;
        if (c == ';') {
            statement(current);
            current.clear();
        } else if (c == '\n') {
            string line = trim(current);
            if (starts_with(line, ".loc") || starts_with(line, ".file")) {
                line_directive(line);
                current.clear();
            } else if (!line.empty() && line.back() == ':') {
                statement(line);
                current.clear();
            } else {
                current += ' ';
            }
        } else if (c == '{' && blank) {
            scopes_.push_back({scope_, {}, {}, {}});
            scope_ = int(scopes_.size()) - 1;
            current.clear();
        } else if (c == '}' && blank) {
            scope_ = scopes_[scope_].parent;
            current.clear();
        } else {
            current += c;
        }
    }
}

void Parser::resolve_labels() {
    for (const Jump& jump : jumps_) {
        for (const string& label : jump.labels) {
            int at = find(label, &Scope::labels, jump.scope);
            if (at < 0) throw Unsupported("no label " + label + " in " + f_->name);
            f_->body[jump.statement].target = at;
            f_->body[jump.statement].targets.push_back(at);
        }
    }
    jumps_.clear();
    tables_.clear();
}

void Parser::function(const string& header, const string& text) {
    auto owned = std::make_unique<Function>();
    f_ = owned.get();
    scopes_.assign(1, {-1, {}, {}, {}});
    scope_ = 0;
    f_->entry = has_word(header, ".entry");
    size_t at = header.find(f_->entry ? ".entry" : ".func") + (f_->entry ? 6 : 5);
    size_t name = header.find_first_not_of(" \t\n", at);
    if (header[name] == '(') {  // the result comes before the name
        size_t close = header.find(')', name);
        parameters(header.substr(name + 1, close - name - 1), f_->returns, f_->register_returns, Space::param);
        name = header.find_first_not_of(" \t\n", close + 1);
    }
    size_t end = header.find_first_of(" \t\n(", name);
    f_->name = header.substr(name, end - name);
    size_t open = header.find_first_not_of(" \t\n", end);
    string tail = open == string::npos ? "" : header.substr(open);
    if (!tail.empty() && tail[0] == '(') {
        size_t close = header.find(')', open);
        parameters(header.substr(open + 1, close - open - 1), f_->params, f_->register_params, Space::param);
        tail = header.substr(close + 1);
    }
    size_t threads = tail.find(".reqntid");
    if (threads != string::npos) {
        u32 n[3] = {1, 1, 1};
        sscanf(tail.c_str() + threads + 8, "%u , %u , %u", &n[0], &n[1], &n[2]);
        f_->required_threads = n[0] * n[1] * n[2];
    }
    size_t cluster = tail.find(".reqnctapercluster");
    if (cluster != string::npos) {
        u32* n = f_->cluster;
        n[0] = n[1] = n[2] = 1;
        sscanf(tail.c_str() + cluster + 18, "%u , %u , %u", &n[0], &n[1], &n[2]);
    }
    file_ = line_ = 0;
    body(text);
    resolve_labels();
    module_.functions[f_->name] = std::move(owned);
}

void Parser::run(const string& source) {
    const string text = without_comments(source);
    size_t pos = 0;
    while ((pos = text.find_first_not_of(" \t\r\n;", pos)) != string::npos) {
        size_t eol = std::min(text.find('\n', pos), text.size());
        string line = trim(text.substr(pos, eol - pos));
        if (starts_with(line, ".version") || starts_with(line, ".target") || starts_with(line, ".address_size") ||
            starts_with(line, ".file")) {
            line_directive(line);
            pos = eol;
            continue;
        }
        size_t stop = text.find_first_of(";{", pos);
        if (stop == string::npos) break;
        string head = text.substr(pos, stop - pos);
        bool code = has_word(head, ".entry") || has_word(head, ".func");
        if (text[stop] == '{' && (code || starts_with(line, ".section"))) {
            size_t close = matching_brace(text, stop);
            if (code) function(head, text.substr(stop + 1, close - stop - 1));
            pos = close + 1;
            continue;
        }
        size_t end = text.find(';', pos);
        if (!code && text[pos] == '.') module_variable(trim(text.substr(pos, end - pos)));
        pos = end;
    }
}

std::unique_ptr<Module> parse(const string& text) {
    auto module = std::make_unique<Module>();
    Parser(*module).run(text);
    return module;
}

}  // namespace ptx
