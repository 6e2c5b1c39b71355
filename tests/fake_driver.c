// A driver without a GPU: keeps what it is asked to launch, so that tests can look at it. By CUDA's names and by HIP's.
#include <string.h>

enum { MAX_PARAMETERS = 64 };

int fake_sizes[MAX_PARAMETERS];  // bytes of each parameter of the next launch, 0 behind the last; set by the test
unsigned long long fake_values[MAX_PARAMETERS];
unsigned fake_grid[3], fake_block[3], fake_shared;
void* fake_stream;
char fake_name[256];
const void* fake_image;
int fake_attribute, fake_attribute_value, fake_launches, fake_error;
int fake_retained, fake_device;

enum { INVALID_CONTEXT = 201 };
static _Thread_local void* context;  // CUDA's; a thread begins without one

static int load(void** module, const void* image) {
  fake_image = image;
  *module = (void*)0x10;
  return fake_error;
}

static int function(void** result, void* module, const char* name) {
  strncpy(fake_name, name, sizeof fake_name - 1);
  *result = module == (void*)0x10 ? (void*)0x20 : 0;
  return 0;
}

static int launch(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                  unsigned shared, void* stream, void** parameters, void** extra) {
  if (f != (void*)0x20 || extra) return 1;
  const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  memcpy(fake_grid, grid, sizeof grid);
  memcpy(fake_block, block, sizeof block);
  fake_shared = shared;
  fake_stream = stream;
  memset(fake_values, 0, sizeof fake_values);
  for (int i = 0; i < MAX_PARAMETERS && fake_sizes[i]; ++i) memcpy(&fake_values[i], parameters[i], fake_sizes[i]);
  ++fake_launches;
  return fake_error;
}

int cuDeviceGet(int* handle, int device) {
  *handle = device + 100;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** result, int handle) {
  fake_device = handle - 100;
  *result = (void*)0x30;
  ++fake_retained;
  return 0;
}
int cuCtxGetCurrent(void** result) {
  *result = context;
  return 0;
}
int cuCtxSetCurrent(void* other) {
  context = other;
  return 0;
}
int cuGetErrorName(int status, const char** name) {
  *name = status == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : 0;
  return *name ? 0 : 1;
}

int cuModuleLoadData(void** module, const void* image) { return context ? load(module, image) : INVALID_CONTEXT; }
int cuModuleGetFunction(void** result, void* module, const char* name) { return function(result, module, name); }
int cuFuncSetAttribute(void* f, int attribute, int value) {
  (void)f;
  fake_attribute = attribute;
  fake_attribute_value = value;
  return 0;
}
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  if (!context) return INVALID_CONTEXT;
  return launch(f, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra);
}

const char* hipGetErrorName(int status) { return status == 700 ? "hipErrorIllegalAddress" : "unrecognized"; }
int hipModuleLoadData(void** module, const void* image) { return load(module, image); }
int hipModuleGetFunction(void** result, void* module, const char* name) { return function(result, module, name); }
int hipModuleLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, void* stream, void** parameters, void** extra) {
  return launch(f, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra);
}
