#include "conduit.h"

#include <cstring>
#include <typeinfo>

namespace torchcall {
namespace {

namespace nb = nanobind;

// Names the C++ ABI that both sides must share, as pybind11 spells it for GCC's and Clang's
// libstdc++ since GCC 5. Another spelling (libc++, the old std::string) gets no answer, and the
// caller falls back on serialising.
constexpr const char* kPlatformAbi = "system_libstdcpp_gxx_abi_1xxx_use_cxx11_abi_1";

}  // namespace

const void* ConduitPointer(nb::handle object, const void* type_info) {
  if (!nb::hasattr(object, "_pybind11_conduit_v1_")) return nullptr;
  const nb::capsule type(type_info, typeid(std::type_info).name());
  const nb::object answer = object.attr("_pybind11_conduit_v1_")(
      nb::bytes(kPlatformAbi, std::strlen(kPlatformAbi)), type,
      nb::bytes("raw_pointer_ephemeral", std::strlen("raw_pointer_ephemeral")));
  if (!PyCapsule_CheckExact(answer.ptr())) return nullptr;
  return PyCapsule_GetPointer(answer.ptr(), PyCapsule_GetName(answer.ptr()));
}

}  // namespace torchcall
