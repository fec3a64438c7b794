/* A CUDA runtime library whose device memory is the host's: it proves that our calls carry whole
 * pointers and sizes, in the right order. Its answers come from the environment. */
#include <stdlib.h>
#include <string.h>

static int last = 0, live = 0;
static int answer(int code) { if (code) last = code; return code; }
static int setting(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}

int cudaGetDeviceCount(int *count) {
    *count = setting("FAKE_CUDA_DEVICES", 1);
    return answer(setting("FAKE_CUDA_ERROR", 0));
}
int cudaSetDevice(int device) { return answer(device < setting("FAKE_CUDA_DEVICES", 1) ? 0 : 101); }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 7 : attribute == 18 ? 1 : -1;
    return 0;
}
int cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *free_bytes = (size_t)5 << 30;
    *total = (size_t)8 << 30;
    return 0;
}
int cudaRuntimeGetVersion(int *version) { *version = 12060; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13020; return 0; }
static int take(void **pointer, size_t size) {
    if (size > (size_t)1 << 30) return answer(2);
    *pointer = malloc(size);
    live++;
    return 0;
}
static int give(void *pointer) { free(pointer); live--; return 0; }
int cudaMalloc(void **pointer, size_t size) { return take(pointer, size); }
int cudaFree(void *pointer) { return give(pointer); }
int cudaHostAlloc(void **pointer, size_t size, unsigned flags) { return take(pointer, size); }
int cudaFreeHost(void *pointer) { return give(pointer); }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    if (kind != 1 && kind != 2) return answer(21);
    memcpy(to, from, size);
    return 0;
}
int cudaStreamCreateWithFlags(void **stream, unsigned flags) {
    return flags == 1 ? take(stream, 1) : answer(1);
}
int cudaStreamSynchronize(void *stream) { return answer(stream ? 0 : 400); }
int cudaStreamDestroy(void *stream) { return give(stream); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return take(event, 1); }
int cudaEventRecord(void *event, void *stream) { return 0; }
int cudaEventSynchronize(void *event) { return 0; }
int cudaEventElapsedTime(float *ms, void *start, void *end) { *ms = 1.5f; return 0; }
int cudaEventDestroy(void *event) { return give(event); }
int cudaGetLastError(void) { int code = last; last = 0; return code; }
const char *cudaGetErrorString(int code) {
    return code == 35 ? "driver too old" : code == 2 ? "out of memory" : "fake error";
}
int fakeLive(void) { return live; }
int fakeLastError(void) { return last; }
