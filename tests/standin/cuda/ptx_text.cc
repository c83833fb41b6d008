#include "ptx_text.h"

#include <algorithm>
#include <bit>
#include <cctype>
#include <cstdlib>
#include <optional>

#include "ptx_tokens.h"

namespace standin::ptx {
namespace {

std::optional<Space> SpaceOf(const std::string& word) {
  if (word == ".global") return Space::kGlobal;
  if (word == ".shared") return Space::kShared;
  if (word == ".local") return Space::kLocal;
  if (word == ".param") return Space::kParam;
  if (word == ".const") return Space::kConst;
  return std::nullopt;
}

// Bytes of one element of a type; 0 where the word is no type.
uint64_t Bytes(const std::string& word) {
  const size_t digits = word.find_first_of("0123456789");
  if (digits != 2 && !(digits == 3 && word[1] == 'b')) return 0;
  if (std::string("busf").find(word[1]) == std::string::npos) return 0;
  return std::strtoul(word.c_str() + digits, nullptr, 10) / 8;
}

class Parser {
 public:
  explicit Parser(const std::string& text) : tokens_(Tokens(text)), result_(new Text) {
    scopes_.emplace_back();
  }

  std::unique_ptr<Text> Run() {
    while (!Peek().empty()) TopLevel();
    return std::move(result_);
  }

 private:
  struct Scope {
    std::map<std::string, uint32_t> counts;  // registers by prefix: name<count>
    std::map<std::string, uint32_t> registers;
    std::map<std::string, const Variable*> variables;
  };

  const std::string& Peek(size_t ahead = 0) const {
    return tokens_[std::min(at_ + ahead, tokens_.size() - 1)];
  }
  std::string Next() {
    const std::string token = Peek();
    if (token.empty()) throw Fault("the module ends too early");
    ++at_;
    return token;
  }
  bool Take(const char* token) { return Peek() == token ? (++at_, true) : false; }
  void Expect(const char* token) {
    const std::string found = Next();
    if (found != token) throw Fault("expected " + std::string(token) + ", found " + found);
  }
  void Skip(const char* token) {
    while (Next() != token) continue;
  }
  uint64_t Integer() { return std::strtoull(Next().c_str(), nullptr, 0); }

  void TopLevel() {
    const std::string word = Next();
    if (word == ".version" || word == ".address_size") {
      Next();
    } else if (word == ".target") {
      do Next();
      while (Take(","));
    } else if (word == ".visible" || word == ".weak" || word == ".common" || word == ".internal") {
      // Who may see a name is of no interest.
    } else if (word == ".extern") {
      is_extern_ = true;
    } else if (word == ".pragma") {
      Skip(";");
    } else if (word == ".section") {
      Skip("}");
    } else if (word == ".entry" || word == ".func") {
      ReadFunction(word == ".entry");
      is_extern_ = false;
    } else if (const auto space = SpaceOf(word)) {
      Declare(*space);
      is_extern_ = false;
    } else {
      throw Fault("unknown directive " + word);
    }
  }

  // A variable after its space, without what follows its name.
  Variable* ReadVariable(Space space, uint64_t* element) {
    Variable& variable = result_->variables.emplace_back();
    variable.space = space;
    variable.is_extern = is_extern_;
    uint64_t vector = 1;
    while (Peek()[0] == '.') {
      const std::string word = Next();
      if (word == ".align") {
        variable.align = Integer();
      } else if (word == ".v2" || word == ".v4") {
        vector = word[2] - '0';
      } else if (word == ".attribute") {
        Skip(")");
      } else if (const uint64_t bytes = Bytes(word)) {
        *element = bytes;
        variable.align = std::max(variable.align, bytes * vector);
      } else if (word != ".ptr" && !SpaceOf(word)) {
        throw Fault("unknown type " + word);
      }
    }
    variable.name = Next();
    variable.bytes = *element * vector;
    while (Take("[")) {
      if (Take("]")) {
        variable.bytes = 0;
      } else {
        variable.bytes *= Integer();
        Expect("]");
      }
    }
    scopes_.back().variables[variable.name] = &variable;
    return &variable;
  }

  void Declare(Space space) {
    uint64_t element = 0;
    Variable* variable = ReadVariable(space, &element);
    if (Take("=")) {
      Initial(variable, element);
      variable->bytes = std::max<uint64_t>(variable->bytes, variable->initial.size());
    }
    if (space == Space::kGlobal || space == Space::kConst) result_->globals.push_back(variable);
    Expect(";");
  }

  void Initial(Variable* variable, uint64_t element) {
    if (Take("{")) {
      do Initial(variable, element);
      while (Take(","));
      return Expect("}");
    }
    uint64_t bits = 0;
    const bool is_generic = Take("generic");
    if (is_generic) Expect("(");
    if (Peek() == "-" || std::isdigit(static_cast<unsigned char>(Peek()[0]))) {
      bits = Number().bits;
      if (Peek() == "(") throw Fault("unknown initial value of " + variable->name);
    } else {
      const Operand of = ReadOperand();
      if (of.kind != Operand::kVariable) throw Fault("unknown initial value of " + variable->name);
      variable->references.push_back(
          {variable->initial.size(), of.variable, of.offset, is_generic});
    }
    if (is_generic) Expect(")");
    for (uint64_t i = 0; i < element; ++i) variable->initial.push_back(bits >> (8 * i));
  }

  std::vector<const Variable*> Parameters() {
    std::vector<const Variable*> parameters;
    Expect("(");
    while (!Take(")")) {
      const std::string word = Next();
      if (word != ".param") throw Fault("a parameter that is no .param: " + word);
      uint64_t element = 0;
      parameters.push_back(ReadVariable(Space::kParam, &element));
      Take(",");
    }
    return parameters;
  }

  void ReadFunction(bool is_entry) {
    Function function;
    function.is_entry = is_entry;
    scopes_.emplace_back();
    if (Peek() == "(") function.results = Parameters();
    function.name = Next();
    if (Peek() == "(") function.parameters = Parameters();
    while (Peek() != "{" && Peek() != ";") {
      if (Next() != ".reqntid") continue;
      function.required_block = {static_cast<uint32_t>(Integer()), 1, 1};
      for (int i = 1; i < 3 && Take(","); ++i) function.required_block[i] = Integer();
    }
    function.has_body = Next() == "{";
    if (function.has_body) {
      function_ = &function;
      Body();
    }
    scopes_.pop_back();
    Function& known = result_->functions[function.name];
    if (!known.has_body) known = std::move(function);
  }

  void Body() {
    while (!Take("}")) {
      if (Take("{")) {
        scopes_.emplace_back();
        Body();
        scopes_.pop_back();
      } else if (Take(".reg")) {
        Registers();
      } else if (const auto space = SpaceOf(Peek())) {
        Next();
        Declare(*space);
      } else if (Take(".pragma")) {
        Skip(";");
      } else if (Peek(1) == ":") {
        const std::string label = Next();
        Next();
        if (Take(".branchtargets")) {
          auto& targets = function_->branch_targets[label];
          do targets.push_back(Next());
          while (Take(","));
          Expect(";");
        } else if (!function_->labels.emplace(label, function_->body.size()).second) {
          throw Fault("label " + label + " twice");
        }
      } else {
        ReadStatement();
      }
    }
  }

  void Registers() {
    while (Peek()[0] == '.') {
      if (Next() == ".v2") throw Fault("a register that is a vector");
    }
    do {
      const std::string name = Next();
      if (Take("<")) {
        scopes_.back().counts[name] = Integer();
        Expect(">");
      } else {
        scopes_.back().registers[name] = function_->registers++;
      }
    } while (Take(","));
    Expect(";");
  }

  void ReadStatement() {
    Statement statement;
    const size_t start = at_;
    if (Take("@")) {
      statement.has_guard = true;
      statement.guard = ReadOperand();
    }
    const std::string word = Next();
    size_t dot = word.find('.');
    statement.opcode = word.substr(0, dot);
    while (dot != std::string::npos) {
      const size_t end = word.find('.', dot + 1);
      statement.modifiers.push_back(
          word.substr(dot + 1, end == std::string::npos ? end : end - dot - 1));
      dot = end;
    }
    while (!Take(";")) {
      statement.operands.push_back(ReadOperand());
      Take(",");
    }
    for (size_t i = start; i + 1 < at_; ++i) {
      const bool glued = tokens_[i] == "," || tokens_[i] == "]" || i == start;
      statement.text += (glued ? "" : " ") + tokens_[i];
    }
    function_->body.push_back(std::move(statement));
  }

  std::vector<Operand> Until(const char* end) {
    std::vector<Operand> parts;
    while (!Take(end)) {
      parts.push_back(ReadOperand());
      Take(",");
    }
    return parts;
  }

  Operand ReadOperand() {
    Operand operand = Single();
    if (!Take("|")) return operand;
    Operand pair;
    pair.kind = Operand::kPair;
    pair.parts = {operand, Single()};
    return pair;
  }

  Operand Single() {
    Operand operand;
    if (Take("{")) {
      operand.kind = Operand::kVector;
      operand.parts = Until("}");
    } else if (Take("(")) {
      operand.kind = Operand::kList;
      operand.parts = Until(")");
    } else if (Take("[")) {
      operand.kind = Operand::kAddress;
      operand.parts = {Single()};
      operand.offset = Offset();
      Expect("]");
    } else if (Take("!")) {
      operand = Single();
      operand.is_negated = !operand.is_negated;
    } else if (Peek() == "-" || std::isdigit(static_cast<unsigned char>(Peek()[0]))) {
      operand = Number();
    } else {
      Named(Next(), &operand);
      if (operand.kind == Operand::kVariable) operand.offset = Offset();
    }
    return operand;
  }

  int64_t Offset() {
    int64_t offset = 0;
    while (Peek() == "+" || Peek() == "-") {
      const bool is_minus = Next() == "-";
      const auto value = static_cast<int64_t>(Number().bits);
      offset += is_minus ? -value : value;
    }
    return offset;
  }

  Operand Number() {
    Operand operand;
    operand.kind = Operand::kNumber;
    const bool is_negative = Take("-");
    const std::string word = Next();
    const char kind = word.size() > 1 && word[0] == '0' ? std::tolower(word[1]) : ' ';
    if (kind == 'f' || kind == 'd') {
      operand.literal = kind;
      operand.bits = std::stoull(word.substr(2), nullptr, 16);
      if (is_negative) operand.bits ^= kind == 'f' ? uint64_t{1} << 31 : uint64_t{1} << 63;
      return operand;
    }
    if (kind == 'b') {
      operand.bits = std::stoull(word.substr(2), nullptr, 2);
    } else if (word.find('.') != std::string::npos) {
      operand.literal = 'd';
      const double value = std::strtod(word.c_str(), nullptr);
      operand.bits = std::bit_cast<uint64_t>(is_negative ? -value : value);
      return operand;
    } else {
      operand.bits = std::stoull(word, nullptr, 0);
    }
    if (is_negative) operand.bits = -operand.bits;
    return operand;
  }

  void Named(const std::string& name, Operand* operand) {
    if (name == "_") return;
    const size_t last = name.find_last_not_of("0123456789");
    const std::string prefix = name.substr(0, last + 1);
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      auto found = scope->registers.find(name);
      if (found == scope->registers.end() && prefix.size() < name.size()) {
        const auto count = scope->counts.find(prefix);
        if (count != scope->counts.end() && std::stoull(name.substr(last + 1)) < count->second) {
          found = scope->registers.emplace(name, function_->registers++).first;
        }
      }
      if (found != scope->registers.end()) {
        operand->kind = Operand::kRegister;
        operand->index = found->second;
        return;
      }
      const auto variable = scope->variables.find(name);
      if (variable != scope->variables.end()) {
        operand->kind = Operand::kVariable;
        operand->variable = variable->second;
        return;
      }
    }
    operand->kind = name[0] == '%' || name == "WARP_SZ" ? Operand::kSpecial : Operand::kName;
    operand->name = name;
  }

  std::vector<std::string> tokens_;
  size_t at_ = 0;
  std::unique_ptr<Text> result_;
  std::vector<Scope> scopes_;
  Function* function_ = nullptr;
  bool is_extern_ = false;
};

}  // namespace

std::unique_ptr<Text> Parse(const std::string& text) { return Parser(text).Run(); }

}  // namespace standin::ptx
