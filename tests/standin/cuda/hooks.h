// What the operators of torch ask the played devices for, beside the driver's entry points.

#ifndef TORCHCALL_STANDIN_CUDA_HOOKS_H_
#define TORCHCALL_STANDIN_CUDA_HOOKS_H_

#include <cstddef>

extern "C" {

// What happened, a line each: its size, and as much of it as there is room for.
size_t standin_cuda_log(char* to, size_t size);
void standin_cuda_clear_log();
void standin_cuda_note(const char* line);

// The memory of an address as the host may touch it; null where it is no device's.
void* standin_cuda_host(const void* address);

// For operators that are computed when they are called. Waits for what the stream has to do before,
// which a program cannot see and a capture does not forbid.
int standin_cuda_drain(void* stream);
// Where the stream is captured, makes a node that calls `run(data)`. `drop(data)` comes after that.
int standin_cuda_node(void* stream, const char* name, void (*run)(void*), void* data,
                      void (*drop)(void*));

// From now on everything fails with that error, as after a fault on the device.
void standin_cuda_fault(int error);
// The runtime's name of an error and its words.
const char* standin_cuda_error_name(int error);
const char* standin_cuda_error_words(int error);

}  // extern "C"

#endif  // TORCHCALL_STANDIN_CUDA_HOOKS_H_
