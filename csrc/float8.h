// DLPack's codes of 8-bit floats, which the older DLPack header that torch may bundle lacks.

#ifndef TORCHCALL_FLOAT8_H_
#define TORCHCALL_FLOAT8_H_

#include <cstdint>

namespace torchcall {

inline constexpr uint8_t kFloat8E4m3fn = 10;
inline constexpr uint8_t kFloat8E4m3fnuz = 11;
inline constexpr uint8_t kFloat8E5m2 = 12;
inline constexpr uint8_t kFloat8E5m2fnuz = 13;
inline constexpr uint8_t kFloat8E8m0fnu = 14;

}  // namespace torchcall

#endif  // TORCHCALL_FLOAT8_H_
