#include "index_checks.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "dtype.h"

namespace torchcall {
namespace {

bool IsMember(const TcIndexCheck& check, uint64_t entry) {
  return entry < 128 && (check.allowed[entry / 64] >> (entry % 64) & 1) != 0;
}

// As "1-94, 96": three or more in a row are a range.
std::string Listed(const TcIndexCheck& check) {
  std::string text;
  for (uint64_t first = 0; first < 128; ++first) {
    if (!IsMember(check, first)) continue;
    uint64_t last = first;
    while (IsMember(check, last + 1)) ++last;
    text += (text.empty() ? "" : ", ") + std::to_string(first);
    if (last < first + 2) continue;
    text += "-" + std::to_string(last);
    first = last;
  }
  return text;
}

}  // namespace

IndexChecks::IndexChecks(const TcPlanSpec& spec, const CallForm& form)
    : checks_(spec.index_checks, spec.index_checks + spec.num_index_checks) {
  for (const TcIndexCheck& check : checks_) {
    const CallForm::Input& input = form.inputs.at(check.input);
    if (check.rows_of >= 0) form.inputs.at(check.rows_of);
    const c10::ScalarType dtype = input.cast.value_or(input.dtype);
    if (!c10::isIntegralType(dtype, /*includeBool=*/false)) {
      throw std::invalid_argument(input.name + ": expected an integer dtype, got " +
                                  DtypeName(dtype));
    }
  }
}

void IndexChecks::Run(const CallForm& form, const std::function<at::Tensor(int64_t)>& input) const {
  for (const TcIndexCheck& check : checks_) {
    // Neither call copies a contiguous int64 tensor, the usual case.
    const at::Tensor indices = input(check.input).to(c10::ScalarType::Long).contiguous();
    // Unsigned, so that a negative entry is too large.
    const auto* entries = reinterpret_cast<const uint64_t*>(indices.const_data_ptr<int64_t>());
    const int64_t count = indices.numel();
    const auto refuse = [&](const std::string& expected, int64_t i) {
      throw std::invalid_argument(form.inputs[check.input].name + ": expected " + expected +
                                  ", got " + std::to_string(static_cast<int64_t>(entries[i])) +
                                  " at entry " + std::to_string(i));
    };
    if (check.rows_of < 0) {
      for (int64_t i = 0; i < count; ++i) {
        if (!IsMember(check, entries[i])) refuse("one of " + Listed(check), i);
      }
      continue;
    }
    const auto rows = static_cast<uint64_t>(input(check.rows_of).size(0));
    // The sign bit is set after a negative entry, or a negative distance from the last row.
    // Compilers vectorise this loop, but not one of comparisons: SSE2 has none of 64 bits.
    uint64_t outside = 0;
    for (int64_t i = 0; i < count; ++i) outside |= entries[i] | (rows - 1 - entries[i]);
    if (static_cast<int64_t>(outside) >= 0) continue;
    int64_t i = 0;
    while (entries[i] < rows) ++i;
    refuse("indices from 0 to " + std::to_string(static_cast<int64_t>(rows) - 1), i);
  }
}

}  // namespace torchcall
