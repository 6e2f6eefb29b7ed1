/* A CUDA driver without a device. Its functions answer, its launches run nothing and are kept for whoever asks.

   bench/host.py builds it as libcuda.so.1 with the cuda.h of triton, so that Triton's own launcher runs for real. */

#include <cuda.h>
#include <string.h>

enum { MOST = 256 };
static unsigned char sizes[MOST]; /* of the parameters of the next launches, in bytes */
static unsigned parameters;
static unsigned char kept[8 * MOST + 64]; /* of the last launch: function, stream, grid, block, shared memory, parameters */
static unsigned long kept_bytes, launches, modules;

void stub_parameters(const unsigned char *bytes, unsigned count) {
  parameters = count < MOST ? count : MOST;
  memcpy(sizes, bytes, parameters);
}

unsigned long stub_last_launch(unsigned char *out) {
  memcpy(out, kept, kept_bytes);
  return kept_bytes;
}

unsigned long stub_launches(void) { return launches; }
unsigned long stub_modules(void) { return modules; }

static void keep(const void *value, unsigned long bytes) {
  memcpy(kept + kept_bytes, value, bytes);
  kept_bytes += bytes;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **params, void **extra) {
  unsigned shape[] = {config->gridDimX,  config->gridDimY,  config->gridDimZ,      config->blockDimX,
                      config->blockDimY, config->blockDimZ, config->sharedMemBytes};
  kept_bytes = 0;
  keep(&f, sizeof f);
  keep(&config->hStream, sizeof config->hStream);
  keep(shape, sizeof shape);
  for (unsigned i = 0; i < parameters; i++) keep(params[i], sizes[i]);
  launches++;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)++modules;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) {
  *f = (CUfunction)module;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? 9
           : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? 0
                                                                       : 200 * 1024;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "an error of the stub";
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 2, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice d) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
