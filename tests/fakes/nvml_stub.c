/* A libnvidia-ml.so.1 that counts PDCTL_STUB_GPUS devices, for the real pynvml to run over.
 *
 * PDCTL_STUB_USE names a file that says what computes there now, a line each: GPU number, pid, bytes. It is read anew at
 * every call, so that a test can change it. PDCTL_STUB_HEALTH names one of lines `GPU key value`, for what else a card says
 * of itself; what stands nowhere is not supported. PDCTL_STUB_INIT is what nvmlInit answers. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } pci_t;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } process_t;

enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, NOT_LOADED = 9, LOST = 15 };
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

/* What the health file says of a GPU; 0 where it says nothing. */
static int health(void *device, const char *key, long *value) {
    const char *path = getenv("PDCTL_STUB_HEALTH");
    FILE *file = path ? fopen(path, "r") : NULL;
    long gpu, found;
    char name[64];
    int known = 0;
    if (!file) return 0;
    while (!known && fscanf(file, "%ld %63s %ld", &gpu, name, &found) == 3)
        if (gpu == (long)device - 1 && !strcmp(name, key)) { *value = found; known = 1; }
    fclose(file);
    return known;
}

static int answer(void *device, const char *key, unsigned *into) {
    long value;
    if (!health(device, key, &value)) return NOT_SUPPORTED;
    *into = (unsigned)value;
    return OK;
}

int nvmlInit_v2(void) {
    const char *refusal = getenv("PDCTL_STUB_INIT");
    return refusal ? atoi(refusal) : count() < 0 ? NOT_LOADED : OK;
}
int nvmlInitWithFlags(unsigned flags) { (void)flags; return nvmlInit_v2(); }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { (void)code; return "stub"; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = (unsigned)count(); return OK; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if ((int)index >= count()) return INVALID;
    *device = (void *)(long)(index + 1);
    return OK;
}

int nvmlDeviceGetUUID(void *device, char *text, unsigned length) {
    long lost;
    if (health(device, "lost", &lost)) return LOST;
    snprintf(text, length, "GPU-stub-%ld", (long)device - 1);
    return OK;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    long index;
    if (sscanf(uuid, "GPU-stub-%ld", &index) != 1 || index >= count()) return NOT_FOUND;
    *device = (void *)(index + 1);
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

int nvmlSystemGetDriverVersion(char *text, unsigned length) { snprintf(text, length, "550.54.15"); return OK; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    const char *given = getenv("PDCTL_STUB_CUDA");
    *version = given ? atoi(given) : 12040;
    return OK;
}

int nvmlDeviceGetTotalEccErrors(void *device, unsigned type, unsigned counter, unsigned long long *errors) {
    long value;
    if (type != 1 || counter != 0) return INVALID; /* uncorrected, volatile */
    if (!health(device, "ecc", &value)) return NOT_SUPPORTED;
    *errors = (unsigned long long)value;
    return OK;
}

int nvmlDeviceGetRemappedRows(void *device, unsigned *corrected, unsigned *uncorrected, unsigned *pending,
                              unsigned *failure) {
    *pending = *failure = *corrected = 0;
    answer(device, "rows_pending", pending);
    answer(device, "rows_failed", failure);
    return answer(device, "rows", uncorrected);
}

int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *reasons) {
    unsigned found = 0;
    int code = answer(device, "throttle", &found);
    *reasons = found;
    return code;
}
/* Lines "GPU nvlinkN 1" and "GPU farN LEVEL" of the health file say how a GPU reaches a later one, N. */
static int pair(void *one, void *other, const char *what, unsigned *into) {
    char key[64];
    void *low = one < other ? one : other, *high = one < other ? other : one;
    snprintf(key, sizeof key, "%s%ld", what, (long)high - 1);
    return answer(low, key, into);
}
int nvmlDeviceGetP2PStatus(void *one, void *other, unsigned index, unsigned *status) {
    unsigned known;
    if (index != 2) return NOT_SUPPORTED;
    *status = pair(one, other, "nvlink", &known) == OK && known ? 0 : 5;
    return OK;
}
int nvmlDeviceGetTopologyCommonAncestor(void *one, void *other, unsigned *level) { return pair(one, other, "far", level); }

int nvmlDeviceGetComputeMode(void *device, unsigned *mode) { return answer(device, "mode", mode); }
int nvmlDeviceGetPersistenceMode(void *device, unsigned *mode) { return answer(device, "persistence", mode); }
int nvmlDeviceGetMigMode(void *device, unsigned *now, unsigned *next) {
    int code = answer(device, "mig", now);
    *next = code == OK ? *now : 0;
    return code;
}
int nvmlDeviceGetCurrPcieLinkWidth(void *device, unsigned *lanes) { return answer(device, "lanes", lanes); }
int nvmlDeviceGetMaxPcieLinkWidth(void *device, unsigned *lanes) { (void)device; *lanes = 16; return OK; }

/* `links` has so many, of which `links_down` is a mask. */
int nvmlDeviceGetNvLinkState(void *device, unsigned link, unsigned *state) {
    unsigned links = 0, down = 0;
    answer(device, "links", &links);
    answer(device, "links_down", &down);
    if (link >= links) return INVALID;
    *state = !(down >> link & 1);
    return OK;
}
