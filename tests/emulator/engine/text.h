// Cutting text into pieces, for the parser.
#pragma once
#include <string>
#include <vector>

namespace ptx {

inline std::string trim(const std::string& s) {
    size_t a = s.find_first_not_of(" \t\n\r"), b = s.find_last_not_of(" \t\n\r");
    return a == std::string::npos ? "" : s.substr(a, b - a + 1);
}

inline bool starts_with(const std::string& s, const char* head) { return s.rfind(head, 0) == 0; }

// Split at `mark`, not inside brackets of any kind.
inline std::vector<std::string> split(const std::string& s, char mark) {
    std::vector<std::string> pieces;
    std::string current;
    int depth = 0;
    for (char c : s) {
        depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
        if (c == mark && depth == 0) {
            pieces.push_back(trim(current));
            current.clear();
        } else {
            current += c;
        }
    }
    if (!trim(current).empty()) pieces.push_back(trim(current));
    return pieces;
}

inline std::vector<std::string> split_dots(const std::string& s) {
    std::vector<std::string> pieces(1);
    for (char c : s) {
        if (c == '.') pieces.emplace_back();
        else pieces.back() += c;
    }
    return pieces;
}

inline std::vector<std::string> words(const std::string& s) {
    std::vector<std::string> list;
    for (size_t a = 0; (a = s.find_first_not_of(" \t\n\r", a)) != std::string::npos;) {
        size_t b = std::min(s.find_first_of(" \t\n\r", a), s.size());
        list.push_back(s.substr(a, b - a));
        a = b;
    }
    return list;
}

inline bool has_word(const std::string& s, const std::string& word) {
    for (size_t at = 0; (at = s.find(word, at)) != std::string::npos; ++at) {
        char next = at + word.size() < s.size() ? s[at + word.size()] : ' ';
        if (!isalnum(next) && next != '_') return true;
    }
    return false;
}

// The same text without comments; line breaks stay.
inline std::string without_comments(const std::string& s) {
    std::string out;
    for (size_t i = 0; i < s.size(); ++i) {
        if (s.compare(i, 2, "//") == 0) {
            while (i < s.size() && s[i] != '\n') ++i;
            out += '\n';
        } else if (s.compare(i, 2, "/*") == 0) {
            i = std::min(s.find("*/", i), s.size()) + 1;
            out += ' ';
        } else {
            out += s[i];
        }
    }
    return out;
}

inline size_t matching_brace(const std::string& s, size_t open) {
    int depth = 0;
    for (size_t i = open; i < s.size(); ++i) {
        depth += (s[i] == '{') - (s[i] == '}');
        if (depth == 0) return i;
    }
    return s.size();
}

}  // namespace ptx
