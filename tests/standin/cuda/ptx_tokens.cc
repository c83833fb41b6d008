#include "ptx_tokens.h"

#include <algorithm>
#include <cctype>

#include "ptx_text.h"

namespace standin::ptx {

std::vector<std::string> Tokens(const std::string& text) {
  std::vector<std::string> tokens;
  const auto is_word = [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' ||
           c == '.';
  };
  for (size_t i = 0; i < text.size();) {
    const size_t start = i;
    if (std::isspace(static_cast<unsigned char>(text[i]))) {
      ++i;
    } else if (text.compare(i, 2, "//") == 0) {
      i = std::min(text.find('\n', i), text.size());
    } else if (text.compare(i, 2, "/*") == 0) {
      const size_t end = text.find("*/", i);
      if (end == std::string::npos) throw Fault("a comment without end");
      i = end + 2;
    } else if (text[i] == '"') {
      const size_t end = text.find('"', i + 1);
      if (end == std::string::npos) throw Fault("a string without end");
      tokens.push_back(text.substr(i, end + 1 - i));
      i = end + 1;
    } else if (is_word(text[i])) {
      while (i < text.size() && (is_word(text[i]) || text.compare(i, 2, "::") == 0)) {
        i += text[i] == ':' ? 2 : 1;
      }
      const std::string word = text.substr(start, i - start);
      if (word == ".loc" || word == ".file") {  // these end with their line
        i = std::min(text.find('\n', i), text.size());
      } else {
        tokens.push_back(word);
      }
    } else {
      tokens.emplace_back(1, text[i++]);
    }
  }
  tokens.emplace_back();  // the end
  return tokens;
}

}  // namespace standin::ptx
