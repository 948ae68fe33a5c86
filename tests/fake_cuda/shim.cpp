// Stands in for NVIDIA's driver where there is none: preloaded under the name libcuda.so.1, it answers the questions that
// torch asks before it computes on fake CUDA tensors. No kernel can be started with it.
static int devices = 0;

#define ANSWER __attribute__((visibility("default")))

extern "C" {
ANSWER void pretend_devices(int count) { devices = count; }
ANSWER int cudaGetDeviceCount(int *count) { return *count = 0; }
ANSWER int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *greatest = -5, *least = 0; }
ANSWER int cudaGetDevice(int *device) { return *device = 0; }
ANSWER int cudaSetDevice(int) { return 0; }
ANSWER int cudaStreamIsCapturing(void *, int *status) { return *status = 0; }
ANSWER int cuDevicePrimaryCtxGetState(int, unsigned *flags, int *active) { return *flags = 0, *active = 0; }
}

namespace c10::cuda {
ANSWER bool hasPrimaryContext(signed char) { return false; }
ANSWER signed char device_count() noexcept { return devices; }
ANSWER signed char device_count_ensure_non_zero() { return devices; }
}  // namespace c10::cuda
