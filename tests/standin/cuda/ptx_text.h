// The text of a PTX module as a tree: variables, functions, statements. Names of registers and
// variables are resolved here, since they follow braces; what instructions mean is not known here.

#ifndef TORCHCALL_STANDIN_CUDA_PTX_TEXT_H_
#define TORCHCALL_STANDIN_CUDA_PTX_TEXT_H_

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace standin::ptx {

// What cannot be parsed, decoded or run.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kLocal, kParam, kConst };

struct Variable {
  struct Reference {  // an initial value that is another variable's address
    uint64_t at;
    const Variable* to;
    int64_t offset;
    bool is_generic;
  };
  std::string name;
  Space space = Space::kGlobal;
  uint64_t align = 1;
  uint64_t bytes = 0;
  bool is_extern = false;
  std::vector<uint8_t> initial;
  std::vector<Reference> references;
  uint64_t address = 0;  // of globals and constants, once they are loaded
};

struct Operand {
  enum Kind {
    kRegister,
    kSpecial,
    kNumber,
    kVariable,
    kName,
    kSink,
    kAddress,
    kVector,
    kPair,
    kList
  };
  Kind kind = kSink;
  uint32_t index = 0;       // kRegister
  bool is_negated = false;  // kRegister
  char literal = 'i';       // kNumber: an integer, or the bits of an 'f'loat or a 'd'ouble
  uint64_t bits = 0;        // kNumber
  int64_t offset = 0;       // kVariable, kAddress
  const Variable* variable = nullptr;
  std::string name;            // kName, kSpecial
  std::vector<Operand> parts;  // kAddress: its base
};

struct Statement {
  std::string text;  // for messages
  std::string opcode;
  std::vector<std::string> modifiers;
  bool has_guard = false;
  Operand guard;
  std::vector<Operand> operands;
};

struct Function {
  std::string name;
  bool is_entry = false;
  bool has_body = false;
  std::vector<const Variable*> results, parameters;
  std::array<uint32_t, 3> required_block = {0, 0, 0};  // zeros: any
  uint32_t registers = 0;
  std::vector<Statement> body;
  std::map<std::string, size_t> labels;
  std::map<std::string, std::vector<std::string>> branch_targets;
};

struct Text {
  std::deque<Variable> variables;  // a deque's elements stay where they are
  std::vector<Variable*> globals;
  std::map<std::string, Function> functions;
};

std::unique_ptr<Text> Parse(const std::string& text);

}  // namespace standin::ptx

#endif  // TORCHCALL_STANDIN_CUDA_PTX_TEXT_H_
