/* A libnvidia-ml.so.1 that counts PDCTL_STUB_GPUS devices, for the real pynvml to run over.
 *
 * PDCTL_STUB_USE names a file that says what computes there now, a line each: GPU number, pid, bytes. It is read anew at
 * every call, so that a test can change it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } pci_t;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } process_t;

enum { OK = 0, INVALID = 2, NOT_FOUND = 6, TOO_SMALL = 7, NOT_LOADED = 9 };
enum { MOST = 64 };

static int count(void) { const char *n = getenv("PDCTL_STUB_GPUS"); return n ? atoi(n) : -1; }

static unsigned users(long gpu, process_t *found) {
    const char *path = getenv("PDCTL_STUB_USE");
    FILE *file = path ? fopen(path, "r") : NULL;
    unsigned number = 0, pid;
    unsigned long long bytes;
    long which;
    if (!file) return 0;
    while (number < MOST && fscanf(file, "%ld %u %llu", &which, &pid, &bytes) == 3)
        if (which == gpu) found[number++] = (process_t){pid, bytes, ~0u, ~0u};
    fclose(file);
    return number;
}

int nvmlInit_v2(void) { return count() < 0 ? NOT_LOADED : OK; }
int nvmlInitWithFlags(unsigned flags) { (void)flags; return nvmlInit_v2(); }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { (void)code; return "stub"; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = (unsigned)count(); return OK; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if ((int)index >= count()) return INVALID;
    *device = (void *)(long)(index + 1);
    return OK;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    long index;
    if (sscanf(uuid, "GPU-stub-%ld", &index) != 1 || index >= count()) return NOT_FOUND;
    *device = (void *)(index + 1);
    return OK;
}

int nvmlDeviceGetUUID(void *device, char *text, unsigned length) {
    snprintf(text, length, "GPU-stub-%ld", (long)device - 1);
    return OK;
}

int nvmlDeviceGetName(void *device, char *text, unsigned length) {
    (void)device;
    snprintf(text, length, "Stub H200");
    return OK;
}

int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) {
    process_t found[MOST];
    unsigned number = users((long)device - 1, found);
    memory->total = 141ULL << 30;
    memory->used = 0;
    for (unsigned i = 0; i < number; i++) memory->used += found[i].used;
    memory->free = memory->total - memory->used;
    return OK;
}

int nvmlDeviceGetPciInfo_v3(void *device, pci_t *pci) {
    memset(pci, 0, sizeof *pci);
    snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:%02lX:00.0", 0x10 + (long)device - 1);
    return OK;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *number, process_t *into) {
    process_t found[MOST];
    unsigned there = users((long)device - 1, found), room = *number;
    *number = there;
    if (room < there) return TOO_SMALL;
    memcpy(into, found, there * sizeof *found);
    return OK;
}
