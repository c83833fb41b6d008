// Branches, calls, ends, and what has no effect here.

#include "ptx_space.h"

namespace standin::ptx {
namespace {

constexpr uint32_t kPatience = 1 << 16;

bool Branch(Thread& t, const Op& o) {
  t.next += o.value;
  if (o.value >= 0 || --t.patience > 0) return true;
  t.patience = kPatience;  // it may wait for another thread
  return false;
}
// One of the jumps that follow: the one that slot `a` says, of `value`.
bool Switch(Thread& t, const Op& o) {
  const uint32_t which = t.Get<uint32_t>(o.a);
  if (which >= static_cast<uint64_t>(o.value)) throw Fault("a branch outside its table");
  return t.next += which, true;
}
bool Call(Thread& t, const Op& o) {
  if (t.calls.size() > 1000) throw Fault("too many calls");
  t.calls.push_back(t.next);
  return t.next += o.value, true;
}
bool End(Thread& t, const Op&) { return t.state = Thread::kEnded, false; }
bool Return(Thread& t, const Op& o) {
  if (t.calls.empty()) return End(t, o);
  t.next = t.calls.back();
  return t.calls.pop_back(), true;
}
bool Trap(Thread&, const Op&) { throw Fault("the kernel trapped"); }
bool Missing(Thread&, const Op&) { throw Fault("the kernel called a function that has no body"); }
bool Yield(Thread&, const Op&) { return false; }

bool CopyLocal(Thread& t, const Op& o) {
  return std::memcpy(t.local + o.d, t.local + o.a, static_cast<size_t>(o.value)), true;
}

std::vector<Operand> ListAt(Instruction& i, size_t* at) {
  if (*at >= i.Operands() || i.At(*at).kind != Operand::kList) return {};
  return i.At((*at)++).parts;
}

void CopyParameters(Builder& b, const std::vector<Operand>& given,
                    const std::vector<const Variable*>& of, bool is_result) {
  if (given.size() != of.size()) throw Fault("so many parameters");
  for (size_t n = 0; n < of.size(); ++n) {
    if (given[n].kind != Operand::kVariable) throw Fault("a parameter that is no .param");
    const Variable& here = *given[n].variable;
    if (here.bytes != of[n]->bytes) throw Fault("a parameter of another size");
    const auto mine = static_cast<uint32_t>(b.AddressOf(here));
    const auto its = static_cast<uint32_t>(b.AddressOf(*of[n]));
    b.Emit(CopyLocal, is_result ? mine : its, is_result ? its : mine, 0, 0,
           static_cast<int64_t>(here.bytes));
  }
}

void DecodeCall(Builder& b, Instruction& i) {
  i.Take("uni");
  size_t at = 0;
  const std::vector<Operand> results = ListAt(i, &at);
  const Operand& callee = i.At(at++);
  const std::vector<Operand> arguments = ListAt(i, &at);
  if (callee.kind != Operand::kName) throw Fault("a call of what a register says");
  const Function* function = b.Find(callee.name);
  if (function == nullptr) {  // such as a failed assertion's
    b.Emit(Missing);
    return;
  }
  if (function->is_entry) throw Fault("such a call");
  CopyParameters(b, arguments, function->parameters, false);
  b.EmitCall(Call, *function);
  CopyParameters(b, results, function->results, true);
}

void DecodeSwitch(Builder& b, Instruction& i) {
  i.Take("idx");
  i.Take("uni");
  const auto& tables = b.InFunction().branch_targets;
  const auto table = tables.find(i.At(1).name);
  if (table == tables.end()) throw Fault("no table of branches");
  b.Emit(Switch, 0, b.Read(i.At(0), Type::kU32), 0, 0, static_cast<int64_t>(table->second.size()));
  for (const std::string& label : table->second) b.EmitJump(Branch, label, 0);
}

bool HasNoEffect(const Instruction& i) {
  for (const char* known : {"membar", "fence", "griddepcontrol", "prefetch", "prefetchu", "discard",
                            "applypriority", "setmaxnreg", "pmevent", "createpolicy"}) {
    if (i.Opcode() == known) return true;
  }
  return false;
}

}  // namespace

void EmitReturn(Builder& b) { b.Emit(Return); }

bool DecodeFlow(Builder& b, Instruction& i) {
  const std::string& opcode = i.Opcode();
  if (opcode == "bra") {
    i.Take("uni");
    if (i.At(0).kind != Operand::kName) throw Fault("no label");
    return b.EmitJump(Branch, i.At(0).name, 0), true;
  }
  if (opcode == "brx") return DecodeSwitch(b, i), true;
  if (opcode == "call") return DecodeCall(b, i), true;
  if (opcode == "ret") return i.Take("uni"), b.Emit(Return), true;
  if (opcode == "exit") return b.Emit(End), true;
  if (opcode == "trap" || opcode == "brkpt") return b.Emit(Trap), true;
  if (opcode == "nanosleep") {
    i.TakeType();
    b.Read(i.At(0), Type::kU32);
    return b.Emit(Yield), true;
  }
  if (HasNoEffect(i)) {
    for (size_t n = 0; n < i.Operands(); ++n) i.At(n);
    for (const std::string& modifier : i.statement.modifiers) i.Take(modifier);
    return true;
  }
  return false;
}

}  // namespace standin::ptx
