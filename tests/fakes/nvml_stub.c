/* A libnvidia-ml.so.1 that counts PDCTL_STUB_GPUS devices, for the real pynvml to run over. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned long long total, free, used; } memory_t;

static int count(void) { const char *n = getenv("PDCTL_STUB_GPUS"); return n ? atoi(n) : -1; }

int nvmlInit_v2(void) { return count() < 0 ? 9 /* NVML_ERROR_DRIVER_NOT_LOADED */ : 0; }
int nvmlInitWithFlags(unsigned flags) { (void)flags; return nvmlInit_v2(); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { (void)code; return "stub"; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = (unsigned)count(); return 0; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if ((int)index >= count()) return 2;
    *device = (void *)(long)(index + 1);
    return 0;
}

int nvmlDeviceGetUUID(void *device, char *text, unsigned length) {
    snprintf(text, length, "GPU-stub-%ld", (long)device - 1);
    return 0;
}

int nvmlDeviceGetName(void *device, char *text, unsigned length) {
    (void)device;
    snprintf(text, length, "Stub H200");
    return 0;
}

int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) {
    (void)device;
    memory->total = 141ULL << 30;
    memory->free = memory->total;
    memory->used = 0;
    return 0;
}
