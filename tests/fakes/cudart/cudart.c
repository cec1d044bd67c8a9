// A CUDA runtime over host memory: the calls that pdctl's transport cuda_ipc makes. "Device memory" is a mapped memory
// file, and its handle says whose descriptor it is. Compiled by tests/fakes/cudart/__init__.py.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct { char reserved[64]; } Handle;
typedef struct { int pid, fd; long size; char mark[8]; } Content;

enum { OK = 0, INVALID = 1, NOT_READY = 600 };

// The mapping that holds `pointer`, and its inode.
static int mapping(void *pointer, unsigned long *start, unsigned long *end, unsigned long *inode) {
  FILE *maps = fopen("/proc/self/maps", "r");
  char line[512];
  int found = 0;
  while (maps && !found && fgets(line, sizeof line, maps))
    found = sscanf(line, "%lx-%lx %*s %*s %*s %lu", start, end, inode) == 3 && *inode &&
            *start <= (unsigned long)pointer && (unsigned long)pointer < *end;
  if (maps) fclose(maps);
  return found;
}

int cuMemGetAddressRange_v2(void **base, size_t *size, void *pointer) {
  unsigned long start, end, inode;
  if (!mapping(pointer, &start, &end, &inode)) return INVALID;
  *base = (void *)start;
  *size = end - start;
  return OK;
}

int cudaIpcGetMemHandle(Handle *handle, void *pointer) {
  unsigned long start, end, inode;
  if (!mapping(pointer, &start, &end, &inode)) return INVALID;
  for (int fd = 0; fd < 4096; fd++) {
    struct stat found;
    if (fstat(fd, &found) || found.st_ino != inode) continue;
    Content content = {getpid(), fd, (long)found.st_size, "FAKEGPU"};
    memset(handle, 0, sizeof *handle);
    memcpy(handle, &content, sizeof content);
    return OK;
  }
  return INVALID;
}

int cudaIpcOpenMemHandle(void **pointer, Handle handle, unsigned flags) {
  Content content;
  char path[64];
  struct stat found;
  memcpy(&content, &handle, sizeof content);
  if (flags != 1 || memcmp(content.mark, "FAKEGPU", 8)) return INVALID;
  snprintf(path, sizeof path, "/proc/%d/fd/%d", content.pid, content.fd);
  int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return INVALID;
  int bad = fstat(fd, &found) || found.st_size != content.size;
  *pointer = bad ? MAP_FAILED : mmap(NULL, found.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  return *pointer == MAP_FAILED ? INVALID : OK;
}

int cudaIpcCloseMemHandle(void *pointer) {
  unsigned long start, end, inode;
  if (!mapping(pointer, &start, &end, &inode) || start != (unsigned long)pointer) return INVALID;
  return munmap(pointer, end - start) ? INVALID : OK;
}

// With FAKE_GPU_SLOW, streams are never ready until the file of that name is gone.
int cudaStreamQuery(void *stream) {
  const char *path = getenv("FAKE_GPU_SLOW");
  (void)stream;
  return path && !access(path, F_OK) ? NOT_READY : OK;
}

int cudaMemcpyAsync(void *to, const void *from, size_t count, int kind, void *stream) {
  if (kind != 4 || !stream) return INVALID;
  memcpy(to, from, count);
  return OK;
}

int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, int kind,
                      void *stream) {
  if (kind != 4 || !stream || width > to_pitch || width > from_pitch || to_pitch >> 31 || from_pitch >> 31) return INVALID;
  for (size_t row = 0; row < height; row++)
    memcpy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
  return OK;
}

int cudaStreamCreateWithFlags(void **stream, unsigned flags) {
  *stream = malloc(1);
  return flags == 1 ? OK : INVALID;
}

int cudaStreamDestroy(void *stream) { free(stream); return OK; }
int cudaSetDevice(int device) { return device ? INVALID : OK; }
const char *cudaGetErrorString(int error) { (void)error; return "invalid argument"; }
