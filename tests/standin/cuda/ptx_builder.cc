#include "ptx_builder.h"

#include <algorithm>
#include <chrono>

namespace standin::ptx {
namespace {

bool Not(Thread& t, const Op& o) { return t.slots[o.d] = t.slots[o.a] ^ 1, true; }
bool Keep(Thread& t, const Op& o) { return t.slots[o.d] = t.slots[o.a], true; }
bool Clock(Thread& t, const Op& o) {
  t.slots[o.d] = std::chrono::steady_clock::now().time_since_epoch().count();
  return true;
}

constexpr struct {
  const char* name;
  uint32_t slot;
} kSpecials[] = {
    {"%tid.x", kTid},
    {"%tid.y", kTid + 1},
    {"%tid.z", kTid + 2},
    {"%ntid.x", kNtid},
    {"%ntid.y", kNtid + 1},
    {"%ntid.z", kNtid + 2},
    {"%ctaid.x", kCtaid},
    {"%ctaid.y", kCtaid + 1},
    {"%ctaid.z", kCtaid + 2},
    {"%nctaid.x", kNctaid},
    {"%nctaid.y", kNctaid + 1},
    {"%nctaid.z", kNctaid + 2},
    {"%laneid", kLane},
    {"%warpid", kWarp},
    {"%nwarpid", kWarps},
    {"%lanemask_eq", kLanesEqual},
    {"%lanemask_lt", kLanesLess},
    {"%lanemask_le", kLanesLessEqual},
    {"%lanemask_gt", kLanesGreater},
    {"%lanemask_ge", kLanesGreaterEqual},
    {"%dynamic_smem_size", kDynamicShared},
    {"%total_smem_size", kTotalShared},
    {"%smid", kZero},
    {"%nsmid", kOne},
    {"%gridid", kZero},
    // A cluster is one block.
    {"%cluster_ctaid.x", kZero},
    {"%cluster_ctaid.y", kZero},
    {"%cluster_ctaid.z", kZero},
    {"%cluster_nctaid.x", kOne},
    {"%cluster_nctaid.y", kOne},
    {"%cluster_nctaid.z", kOne},
    {"%cluster_ctarank", kZero},
    {"%cluster_nctarank", kOne},
    {"%clusterid.x", kCtaid},
    {"%clusterid.y", kCtaid + 1},
    {"%clusterid.z", kCtaid + 2},
    {"%nclusterid.x", kNctaid},
    {"%nclusterid.y", kNctaid + 1},
    {"%nclusterid.z", kNctaid + 2},
    {"WARP_SZ", kWarpSize},
};

uint64_t Place(uint64_t* end, const Variable& variable) {
  const uint64_t align = std::max<uint64_t>(variable.align, 1);
  const uint64_t at = (*end + align - 1) / align * align;
  *end = at + variable.bytes;
  return at;
}

}  // namespace

bool Instruction::Take(const std::string& modifier) {
  const auto found = std::find(left_.begin(), left_.end(), modifier);
  if (found == left_.end()) return false;
  return left_.erase(found), true;
}

std::string Instruction::TakeOne(std::initializer_list<const char*> modifiers) {
  for (const char* modifier : modifiers) {
    if (Take(modifier)) return modifier;
  }
  return "";
}

void Instruction::Ignore(std::initializer_list<const char*> words) {
  std::erase_if(left_, [&](const std::string& modifier) {
    return std::any_of(words.begin(), words.end(), [&](const std::string& word) {
      return word.ends_with("::") ? modifier.starts_with(word) : modifier == word;
    });
  });
}

Type Instruction::TakeType() {
  for (const std::string& modifier : left_) {
    const Type type = TypeOf(modifier.c_str());
    if (type == Type::kNone) continue;
    Take(std::string(modifier));
    return type;
  }
  return Type::kNone;
}

const Operand& Instruction::At(size_t index) {
  if (index >= Operands()) throw Fault("too few operands");
  used_ = std::max(used_, index + 1);
  return statement.operands[index];
}

Builder::Builder(const Text& text, const Function& entry) : text_(text), function_(&entry) {
  program_.name = entry.name;
  program_.required_block = entry.required_block;
  for (const Variable* parameter : entry.parameters) {
    const uint64_t at = Place(&program_.local, *parameter);
    addresses_[parameter] = at;
    program_.parameter_offsets.push_back(at);
    program_.parameter_bytes.push_back(parameter->bytes);
  }
  program_.parameters = program_.local;
  wanted_.push_back(&entry);
}

Program Builder::Build() {
  for (size_t i = 0; i < wanted_.size(); ++i) Add(*wanted_[i]);
  for (const auto& [function, placed] : placed_) {
    for (const size_t call : placed.calls) {
      program_.ops[call].value =
          static_cast<int64_t>(placed.start) - static_cast<int64_t>(call) - 1;
    }
  }
  // The slots of a function are the same in each of its calls.
  for (size_t left = calls_.size() + 1; left != calls_.size();) {
    left = calls_.size();
    std::erase_if(calls_, [&](const auto& call) {
      return std::none_of(calls_.begin(), calls_.end(),
                          [&](const auto& other) { return other.first == call.second; });
    });
  }
  if (!calls_.empty()) throw Fault("a function that calls itself, " + calls_[0].first->name);
  program_.slots.assign(next_, 0);
  for (const auto& [bits, slot] : constants_) program_.slots[slot] = bits;
  return std::move(program_);
}

void Builder::Add(const Function& function) {
  function_ = &function;
  placed_[&function].start = program_.ops.size();
  registers_ = next_;
  next_ += function.registers;
  jumps_.clear();
  std::vector<size_t> starts;
  for (const Statement& statement : function.body) {
    starts.push_back(program_.ops.size());
    try {
      Decode(statement);
    } catch (const Fault& fault) {
      throw Fault(std::string(fault.what()) + ": \"" + statement.text + "\" in " + function.name);
    }
  }
  starts.push_back(program_.ops.size());
  guard_ = 0;
  EmitReturn(*this);
  for (const Jump& jump : jumps_) {
    program_.ops[jump.at].value =
        static_cast<int64_t>(starts[jump.label]) - static_cast<int64_t>(jump.at) - 1;
  }
}

void Builder::Decode(const Statement& statement) {
  taken_ = 0;
  guard_ = unless_ = 0;
  if (statement.has_guard) {
    if (statement.guard.kind != Operand::kRegister) throw Fault("a guard that is no register");
    guard_ = registers_ + statement.guard.index;
    unless_ = statement.guard.is_negated ? 1 : 0;
    if (statement.opcode == "setp") {  // one of its results may be its guard
      const uint32_t guard = std::exchange(guard_, 0), kept = Temporary();
      Emit(Keep, kept, guard);
      guard_ = kept;
    }
  }
  for (const auto decode :
       {DecodeInteger, DecodeFloat, DecodeMove, DecodeMemory, DecodeCompare, DecodeBits,
        DecodeConvert, DecodeFlow, DecodeTogether, DecodeMatrix, DecodeAtomic}) {
    Instruction instruction(statement);
    if (!decode(*this, instruction)) continue;
    if (!instruction.IsDone()) throw Fault("a form of an instruction that is not supported");
    return;
  }
  throw Fault("an instruction that is not supported");
}

uint32_t Builder::Temporary() {
  if (taken_ == temporaries_.size()) temporaries_.push_back(next_++);
  return temporaries_[taken_++];
}

uint32_t Builder::Constant(uint64_t bits) {
  const auto [found, is_new] = constants_.emplace(bits, next_);
  if (is_new) ++next_;
  return found->second;
}

uint32_t Builder::Special(const std::string& name) {
  for (const auto& special : kSpecials) {
    if (name == special.name) return special.slot;
  }
  if (name == "%clock" || name == "%clock64" || name == "%globaltimer") {
    const uint32_t now = Temporary();
    return Emit(Clock, now), now;
  }
  throw Fault("a register that is not supported, " + name);
}

uint64_t Builder::AddressOf(const Variable& variable) {
  if (variable.space == Space::kGlobal || variable.space == Space::kConst) {
    if (variable.address == 0) throw Fault("a variable of another module, " + variable.name);
    return variable.address;
  }
  const auto found = addresses_.find(&variable);
  if (found != addresses_.end()) return found->second;
  if (variable.space == Space::kShared && variable.is_extern) {  // the launch's own: after all else
    for (const Variable& other : text_.variables) {
      if (other.space == Space::kShared && !other.is_extern) AddressOf(other);
    }
  }
  uint64_t* const end = variable.space == Space::kShared ? &program_.shared : &program_.local;
  return addresses_[&variable] = Place(end, variable);
}

uint32_t Builder::Read(const Operand& operand, Type type) {
  if (operand.is_negated) throw Fault("a number negated");
  switch (operand.kind) {
    case Operand::kRegister:
      return registers_ + operand.index;
    case Operand::kSpecial:
      return Special(operand.name);
    case Operand::kVariable:
      return Constant(AddressOf(*operand.variable) + operand.offset);
    case Operand::kNumber:
      break;
    default:
      throw Fault("such an operand");
  }
  if (operand.literal == 'd' && type == Type::kF32) {
    const auto value = static_cast<float>(std::bit_cast<double>(operand.bits));
    return Constant(std::bit_cast<uint32_t>(value));
  }
  if (operand.literal == 'f' && type == Type::kF64) {
    const double value = std::bit_cast<float>(static_cast<uint32_t>(operand.bits));
    return Constant(std::bit_cast<uint64_t>(value));
  }
  if (operand.literal != 'i' && operand.literal == (BitsOf(type) == 64 ? 'f' : 'd')) {
    throw Fault("a number of another type");
  }
  return Constant(operand.bits);
}

uint32_t Builder::Write(const Operand& operand) {
  if (operand.kind == Operand::kSink) return 0;
  if (operand.kind != Operand::kRegister || operand.is_negated) throw Fault("such a result");
  return registers_ + operand.index;
}

uint32_t Builder::Predicate(const Operand& operand) {
  if (operand.kind == Operand::kNumber) return Constant(operand.bits != 0 ? 1 : 0);
  if (operand.kind != Operand::kRegister) throw Fault("such a predicate");
  const uint32_t slot = registers_ + operand.index;
  if (!operand.is_negated) return slot;
  const uint32_t negated = Temporary();
  return Emit(Not, negated, slot), negated;
}

uint32_t Builder::Base(const Operand& address, Space space, int64_t* offset) {
  if (address.kind != Operand::kAddress) throw Fault("no address");
  const Operand& base = address.parts.at(0);
  *offset = address.offset;
  if (base.kind != Operand::kVariable) return Read(base, Type::kB64);
  const Space of = base.variable->space == Space::kParam   ? Space::kLocal
                   : base.variable->space == Space::kConst ? Space::kGlobal
                                                           : base.variable->space;
  if (of != space && !(space == Space::kGeneric && of == Space::kGlobal)) {
    throw Fault("a variable of another space");
  }
  return Read(base, Type::kB64);
}

size_t Builder::Label(const std::string& name) const {
  const auto found = function_->labels.find(name);
  if (found == function_->labels.end()) throw Fault("no label " + name);
  return found->second;
}

Op& Builder::Emit(Run run, uint32_t d, uint32_t a, uint32_t b, uint32_t c, int64_t value) {
  if (run == nullptr) throw Fault("a form of an instruction that is not supported");
  Op op;
  op.run = run;
  op.guard = guard_;
  op.unless = unless_;
  op.d = d;
  op.a = a;
  op.b = b;
  op.c = c;
  op.value = value;
  program_.ops.push_back(op);
  return program_.ops.back();
}

void Builder::EmitJump(Run run, const std::string& label, uint32_t a) {
  Emit(run, 0, a);
  jumps_.push_back({program_.ops.size() - 1, Label(label)});
}

const Function* Builder::Find(const std::string& name) const {
  const auto found = text_.functions.find(name);
  return found == text_.functions.end() || !found->second.has_body ? nullptr : &found->second;
}

void Builder::EmitCall(Run run, const Function& function) {
  Emit(run);
  if (std::find(wanted_.begin(), wanted_.end(), &function) == wanted_.end()) {
    wanted_.push_back(&function);
  }
  calls_.emplace_back(function_, &function);
  placed_[&function].calls.push_back(program_.ops.size() - 1);
}

}  // namespace standin::ptx
