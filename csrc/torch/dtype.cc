#include "dtype.h"

#include "../float8.h"

namespace torchcall {
namespace {

struct Entry {
  uint8_t code;
  uint8_t bits;
  c10::ScalarType torch;
  const char* name;
};

constexpr Entry kTable[] = {
    {kDLBool, 8, c10::ScalarType::Bool, "bool"},
    {kDLUInt, 8, c10::ScalarType::Byte, "uint8"},
    {kDLInt, 8, c10::ScalarType::Char, "int8"},
    {kDLInt, 16, c10::ScalarType::Short, "int16"},
    {kDLInt, 32, c10::ScalarType::Int, "int32"},
    {kDLInt, 64, c10::ScalarType::Long, "int64"},
    {kDLUInt, 16, c10::ScalarType::UInt16, "uint16"},
    {kDLUInt, 32, c10::ScalarType::UInt32, "uint32"},
    {kDLUInt, 64, c10::ScalarType::UInt64, "uint64"},
    {kFloat8E4m3fn, 8, c10::ScalarType::Float8_e4m3fn, "float8_e4m3fn"},
    {kFloat8E4m3fnuz, 8, c10::ScalarType::Float8_e4m3fnuz, "float8_e4m3fnuz"},
    {kFloat8E5m2, 8, c10::ScalarType::Float8_e5m2, "float8_e5m2"},
    {kFloat8E5m2fnuz, 8, c10::ScalarType::Float8_e5m2fnuz, "float8_e5m2fnuz"},
    {kFloat8E8m0fnu, 8, c10::ScalarType::Float8_e8m0fnu, "float8_e8m0fnu"},
    {kDLFloat, 16, c10::ScalarType::Half, "float16"},
    {kDLBfloat, 16, c10::ScalarType::BFloat16, "bfloat16"},
    {kDLFloat, 32, c10::ScalarType::Float, "float32"},
    {kDLFloat, 64, c10::ScalarType::Double, "float64"},
    {kDLComplex, 64, c10::ScalarType::ComplexFloat, "complex64"},
    {kDLComplex, 128, c10::ScalarType::ComplexDouble, "complex128"},
};

}  // namespace

std::optional<c10::ScalarType> ScalarTypeFromDl(DLDataType dtype) {
  for (const Entry& entry : kTable) {
    if (entry.code == dtype.code && entry.bits == dtype.bits && dtype.lanes == 1) {
      return entry.torch;
    }
  }
  return std::nullopt;
}

std::optional<c10::ScalarType> ScalarTypeFromName(const std::string& name) {
  for (const Entry& entry : kTable) {
    if (entry.name == name) return entry.torch;
  }
  return std::nullopt;
}

std::string DtypeName(c10::ScalarType dtype) {
  for (const Entry& entry : kTable) {
    if (entry.torch == dtype) return entry.name;
  }
  return c10::toString(dtype);
}

std::string ShapeText(c10::IntArrayRef shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

std::string TypeAndShape(c10::ScalarType dtype, c10::IntArrayRef shape) {
  return DtypeName(dtype) + " " + ShapeText(shape);
}

}  // namespace torchcall
