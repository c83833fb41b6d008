// Included first in every source file of a wheel: binds functions to the versions that glibc 2.28
// and GCC 8's libstdc++ have. glibc 2.34 moved libpthread and libdl into libc with new symbol
// versions; the old versions are the same functions. See manylinux.cc.
#pragma once

#if defined(__x86_64__)
#define TC_OLDEST_GLIBC "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define TC_OLDEST_GLIBC "GLIBC_2.17"
#else
#error "torchcall: wheels are built for x86_64 and aarch64"
#endif

#define TC_BIND(name) __asm__(".symver " #name "," #name "@" TC_OLDEST_GLIBC)
TC_BIND(dladdr);
TC_BIND(dlclose);
TC_BIND(dlerror);
TC_BIND(dlopen);
TC_BIND(dlsym);
TC_BIND(pthread_mutex_trylock);
TC_BIND(pthread_once);
TC_BIND(pthread_rwlock_rdlock);
TC_BIND(pthread_rwlock_unlock);
TC_BIND(pthread_rwlock_wrlock);
TC_BIND(pthread_sigmask);
TC_BIND(sem_init);
TC_BIND(sem_post);
TC_BIND(sem_wait);
#undef TC_BIND

// GCC 12 made condition_variable::wait a cancellation point; nothing here cancels threads.
__asm__(
    ".symver _ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE,"
    "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");
