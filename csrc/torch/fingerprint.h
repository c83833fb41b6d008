// A hash that is the same in every process.

#ifndef TORCHCALL_TORCH_FINGERPRINT_H_
#define TORCHCALL_TORCH_FINGERPRINT_H_

#include <cstdint>
#include <string_view>

namespace torchcall {

// FNV-1a.
inline uint64_t Fingerprint(std::string_view text) {
  uint64_t hash = 14695981039346656037ULL;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211ULL;
  return hash;
}

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_FINGERPRINT_H_
