// As much of NVIDIA's management library as torch and XLA ask before they use a device.

#include <cstdio>

#define ENTRY extern "C" __attribute__((visibility("default"))) int

namespace {
int handle;
int Device(void** device) { return *device = &handle, 0; }
}  // namespace

ENTRY nvmlInit_v2() { return 0; }
ENTRY nvmlInit() { return 0; }
ENTRY nvmlShutdown() { return 0; }
ENTRY nvmlDeviceGetCount_v2(unsigned int* count) { return *count = 2, 0; }
ENTRY nvmlDeviceGetHandleByIndex_v2(unsigned int, void** device) { return Device(device); }
ENTRY nvmlDeviceGetHandleByPciBusId_v2(const char*, void** device) { return Device(device); }
ENTRY nvmlDeviceGetHandleByUUID(const char*, void** device) { return Device(device); }
ENTRY nvmlDeviceGetComputeRunningProcesses_v3(void*, unsigned int* count, void*) {
  return *count = 0, 0;
}
ENTRY nvmlDeviceGetComputeRunningProcesses(void*, unsigned int* count, void*) {
  return *count = 0, 0;
}
ENTRY nvmlSystemGetDriverVersion(char* version, unsigned int size) {
  return std::snprintf(version, size, "580.00"), 0;
}
extern "C" __attribute__((visibility("default"))) const char* nvmlErrorString(int) {
  return "not supported";
}
