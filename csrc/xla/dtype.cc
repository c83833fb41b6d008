#include "dtype.h"

#include "../float8.h"

namespace torchcall {
namespace {

using xla::ffi::DataType;

constexpr DtypeEntry kTable[] = {
    {DataType::PRED, {kDLBool, 8, 1}, "bool", 1},
    {DataType::U8, {kDLUInt, 8, 1}, "uint8", 1},
    {DataType::S8, {kDLInt, 8, 1}, "int8", 1},
    {DataType::S16, {kDLInt, 16, 1}, "int16", 2},
    {DataType::S32, {kDLInt, 32, 1}, "int32", 4},
    {DataType::S64, {kDLInt, 64, 1}, "int64", 8},
    {DataType::U16, {kDLUInt, 16, 1}, "uint16", 2},
    {DataType::U32, {kDLUInt, 32, 1}, "uint32", 4},
    {DataType::U64, {kDLUInt, 64, 1}, "uint64", 8},
    {DataType::F8E4M3FN, {kFloat8E4m3fn, 8, 1}, "float8_e4m3fn", 1},
    {DataType::F8E4M3FNUZ, {kFloat8E4m3fnuz, 8, 1}, "float8_e4m3fnuz", 1},
    {DataType::F8E5M2, {kFloat8E5m2, 8, 1}, "float8_e5m2", 1},
    {DataType::F8E5M2FNUZ, {kFloat8E5m2fnuz, 8, 1}, "float8_e5m2fnuz", 1},
    {DataType::F8E8M0FNU, {kFloat8E8m0fnu, 8, 1}, "float8_e8m0fnu", 1},
    {DataType::F16, {kDLFloat, 16, 1}, "float16", 2},
    {DataType::BF16, {kDLBfloat, 16, 1}, "bfloat16", 2},
    {DataType::F32, {kDLFloat, 32, 1}, "float32", 4},
    {DataType::F64, {kDLFloat, 64, 1}, "float64", 8},
    {DataType::C64, {kDLComplex, 64, 1}, "complex64", 8},
    {DataType::C128, {kDLComplex, 128, 1}, "complex128", 16},
};

}  // namespace

const DtypeEntry* FindDtype(std::string_view numpy_name) {
  for (const DtypeEntry& entry : kTable) {
    if (numpy_name == entry.name) return &entry;
  }
  return nullptr;
}

std::string DtypeName(DataType dtype) {
  for (const DtypeEntry& entry : kTable) {
    if (entry.xla == dtype) return entry.name;
  }
  return "XLA dtype " + std::to_string(static_cast<int>(dtype));
}

std::vector<std::string> SharedDtypeNames() {
  std::vector<std::string> names;
  for (const DtypeEntry& entry : kTable) names.emplace_back(entry.name);
  return names;
}

std::string ShapeText(const int64_t* dims, size_t rank) {
  std::string text = "(";
  for (size_t i = 0; i < rank; ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(dims[i]);
  }
  return text + (rank == 1 ? ",)" : ")");
}

}  // namespace torchcall
