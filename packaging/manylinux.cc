// Functions that glibc 2.28 or GCC 8's libstdc++ lack, for wheels that run with both. Linked into
// each library, and visible in it alone. libstdc++ itself stays shared: torch's exceptions pass
// through it.

#include <sys/stat.h>

#include <new>
#include <sstream>

// std::shared_ptr skips atomic operations where this is true.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

int __xstat(int version, const char* path, struct stat* result);
#if defined(__x86_64__)
__asm__(".symver __xstat,__xstat@GLIBC_2.2.5");
constexpr int kStatVersion = 1;
#else
__asm__(".symver __xstat,__xstat@GLIBC_2.17");
constexpr int kStatVersion = 0;
#endif
__attribute__((visibility("hidden"))) int stat(const char* path, struct stat* result) noexcept {
  return __xstat(kStatVersion, path, result);
}

// std::exception_ptr's copy constructor and destructor are inline since GCC 11 and call these two.
void TcCopyExceptionPtr(void* to,
                        const void* from) __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void TcDestroyExceptionPtr(void* pointer) __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");
__attribute__((visibility("hidden"))) void TcAddReference(void* pointer) __asm__(
    "_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
__attribute__((visibility("hidden"))) void TcRelease(void* pointer) __asm__(
    "_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");

void TcAddReference(void* pointer) {
  void* copy;  // never destroyed: its reference is the added one
  TcCopyExceptionPtr(&copy, pointer);
}

void TcRelease(void* pointer) {
  TcDestroyExceptionPtr(pointer);
  *static_cast<void**>(pointer) = nullptr;
}
}

namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
template basic_stringstream<char>::basic_stringstream();
template basic_ostringstream<char>::basic_ostringstream();
template basic_istringstream<char>::basic_istringstream();
template basic_string<char> basic_stringbuf<char>::str() const&;
}  // namespace std
