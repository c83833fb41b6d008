// Decoding: from an instruction's words to operations.

#ifndef TORCHCALL_STANDIN_CUDA_PTX_BUILDER_H_
#define TORCHCALL_STANDIN_CUDA_PTX_BUILDER_H_

#include <initializer_list>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "ptx_number.h"
#include "ptx_text.h"
#include "ptx_thread.h"

namespace standin::ptx {

// An instruction whose modifiers are taken one by one: what nobody took is not supported.
class Instruction {
 public:
  explicit Instruction(const Statement& of) : statement(of), left_(of.modifiers) {}
  Instruction& operator=(const Instruction&) = delete;

  bool Take(const std::string& modifier);
  // The one of them that is there, else an empty string.
  std::string TakeOne(std::initializer_list<const char*> modifiers);
  // Takes all of them; a word that ends with :: stands for what starts so.
  void Ignore(std::initializer_list<const char*> prefixes);
  Type TakeType();  // the first that is a type
  const std::string& Opcode() const { return statement.opcode; }
  const Operand& At(size_t index);
  size_t Operands() const { return statement.operands.size(); }
  bool IsDone() const { return left_.empty() && used_ == Operands(); }

  const Statement& statement;

 private:
  std::vector<std::string> left_;
  size_t used_ = 0;  // operands
};

class Builder {
 public:
  Builder(const Text& text, const Function& entry);
  Program Build();

  // The slot of what an operand reads; numbers are taken as of the type.
  uint32_t Read(const Operand& operand, Type type);
  uint32_t Write(const Operand& operand);
  uint32_t Predicate(const Operand& operand);  // read, negation included
  uint32_t Temporary();                        // until the next instruction
  uint32_t Constant(uint64_t bits);
  // An address [base + offset]: the slot of its base.
  uint32_t Base(const Operand& address, Space space, int64_t* offset);
  // A variable's address in its space.
  uint64_t AddressOf(const Variable& variable);

  Op& Emit(Run run, uint32_t d = 0, uint32_t a = 0, uint32_t b = 0, uint32_t c = 0,
           int64_t value = 0);
  void WaitsForOthers() { program_.waits = true; }

  // An operation whose `value` is how far it is to the label, or to the function.
  void EmitJump(Run run, const std::string& label, uint32_t a);
  void EmitCall(Run run, const Function& function);
  const Function* Find(const std::string& name) const;  // null: it has no body
  const Function& InFunction() const { return *function_; }

 private:
  struct Jump {
    size_t at;
    size_t label;
  };
  struct Placed {
    size_t start = 0;
    std::vector<size_t> calls;  // operations that want its start
  };

  void Add(const Function& function);
  void Decode(const Statement& statement);
  uint32_t Special(const std::string& name);
  size_t Label(const std::string& name) const;

  const Text& text_;
  const Function* function_;
  Program program_;
  std::map<const Function*, Placed> placed_;
  std::vector<const Function*> wanted_;
  std::vector<std::pair<const Function*, const Function*>> calls_;  // from, to
  std::map<const Variable*, uint64_t> addresses_;
  std::map<uint64_t, uint32_t> constants_;
  std::vector<Jump> jumps_;
  std::vector<uint32_t> temporaries_;
  size_t taken_ = 0;        // temporaries
  uint32_t registers_ = 0;  // the slots of the function's start here
  uint32_t next_ = kFirstSlot;
  uint32_t guard_ = 0, unless_ = 0;
};

void EmitReturn(Builder& builder);
// What modifiers of floating-point instructions do before and after them.
void EmitFlush(Builder& builder, Type type, uint32_t d, uint32_t a);
void EmitRounding(Builder& builder, const std::string& mode);  // empty: to nearest
void EmitInPlace(Builder& builder, const std::string& name, Type type, uint32_t d);  // sat, relu

// Each: whether the instruction is of this kind. Throws where it is and its form is not supported.
bool DecodeInteger(Builder& builder, Instruction& instruction);
bool DecodeBits(Builder& builder, Instruction& instruction);
bool DecodeFloat(Builder& builder, Instruction& instruction);
bool DecodeCompare(Builder& builder, Instruction& instruction);
bool DecodeConvert(Builder& builder, Instruction& instruction);
bool DecodeMove(Builder& builder, Instruction& instruction);
bool DecodeMemory(Builder& builder, Instruction& instruction);
bool DecodeAtomic(Builder& builder, Instruction& instruction);
bool DecodeFlow(Builder& builder, Instruction& instruction);
bool DecodeTogether(Builder& builder, Instruction& instruction);
bool DecodeMatrix(Builder& builder, Instruction& instruction);

// Operations out of functions on values.
template <typename T, auto F>
bool Unary(Thread& t, const Op& o) {
  return t.Set<T>(o.d, F(t.Get<T>(o.a))), true;
}
template <typename T, auto F>
bool Binary(Thread& t, const Op& o) {
  return t.Set<T>(o.d, F(t.Get<T>(o.a), t.Get<T>(o.b))), true;
}
template <typename T, auto F>
bool Ternary(Thread& t, const Op& o) {
  return t.Set<T>(o.d, F(t.Get<T>(o.a), t.Get<T>(o.b), t.Get<T>(o.c))), true;
}

}  // namespace standin::ptx

#endif  // TORCHCALL_STANDIN_CUDA_PTX_BUILDER_H_
