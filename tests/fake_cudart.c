/* A CUDA runtime library whose device memory is the host's: it proves that our calls carry whole
 * pointers and sizes, in the right order. What is queued runs when somebody waits for it, so an
 * answer that is read too early is a wrong one. Its own answers come from the environment. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef struct {
    void *to;
    const void *from;
    size_t size; /* of a copy */
    void (*run)(long);
    long argument; /* of a launch, which has no size */
} Work;
typedef struct { Work *items; int count, room; } List;

static int last = 0, live = 0, launches = 0, copies = 0;
static List queue;
static __thread int current = 0;
/* Of cudaStreamCaptureModeThreadLocal: what other threads do meanwhile spoils no capture. */
static __thread List graph;
static __thread void *capturing = NULL; /* the stream */
static __thread int spoiled = 0; /* a capture in which something was called that cannot be captured */
/* Work is run once, by whichever thread waits first; what it calls may wait again. */
static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

static int answer(int code) { if (code) last = code; return code; }
static int setting(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}

static void append(List *list, Work work) {
    if (list->count == list->room) {
        list->room = 2 * list->room + 8;
        list->items = realloc(list->items, list->room * sizeof(Work));
    }
    list->items[list->count++] = work;
}
static int flush(void) {
    if (capturing) { spoiled = 1; return answer(900); }
    pthread_mutex_lock(&lock);
    for (int i = 0; i < queue.count; i++) {
        Work work = queue.items[i];
        if (work.run) work.run(work.argument);
        else memcpy(work.to, work.from, work.size);
    }
    queue.count = 0;
    pthread_mutex_unlock(&lock);
    return answer(setting("FAKE_CUDA_KERNEL_ERROR", 0));
}
static int enqueue(void *stream, Work work) {
    if (!stream) return answer(400);
    pthread_mutex_lock(&lock);
    append(stream == capturing ? &graph : &queue, work);
    pthread_mutex_unlock(&lock);
    return 0;
}

int cudaGetDeviceCount(int *count) {
    *count = setting("FAKE_CUDA_DEVICES", 1);
    return answer(setting("FAKE_CUDA_ERROR", 0));
}
int cudaSetDevice(int device) {
    if (device >= setting("FAKE_CUDA_DEVICES", 1)) return answer(101);
    current = device;
    return 0;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 7
           : attribute == 18 ? setting("FAKE_CUDA_INTEGRATED", 1)
           : attribute == 19 ? setting("FAKE_CUDA_CAN_MAP", 1) : -1;
    return 0;
}
int cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *free_bytes = (size_t)5 << 30;
    *total = (size_t)8 << 30;
    return 0;
}
int cudaRuntimeGetVersion(int *version) { *version = 12060; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13020; return 0; }

#define HEAD 64 /* bytes before each allocation */
typedef struct { unsigned flags; size_t size; } Head;
static int take(void **pointer, size_t size, unsigned flags) {
    if (capturing) { spoiled = 1; return answer(900); }
    if (size > (size_t)1 << 30 || live >= setting("FAKE_CUDA_ROOM", 1 << 30)) return answer(2);
    /* Mapped, not from the heap: its addresses need more than 32 bits in any program. */
    char *whole = mmap(NULL, HEAD + size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(whole, 0xAA, HEAD + size);
    *(Head *)whole = (Head){flags, size};
    *pointer = whole + HEAD;
    live++;
    return 0;
}
static int give(void *pointer) {
    flush();
    Head *head = (Head *)((char *)pointer - HEAD);
    munmap(head, HEAD + head->size);
    live--;
    return 0;
}
int cudaMalloc(void **pointer, size_t size) { return take(pointer, size, 0); }
int cudaFree(void *pointer) { return give(pointer); }
int cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
    return take(pointer, size, flags);
}
int cudaFreeHost(void *pointer) { return give(pointer); }
int cudaHostGetDevicePointer(void **device, void *host, unsigned flags) {
    *device = host;
    return answer(((Head *)((char *)host - HEAD))->flags == 2 && flags == 0 ? 0 : 1);
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    if (kind != 1 && kind != 2) return answer(21);
    copies++;
    return enqueue(stream, (Work){to, from, size, NULL, 0});
}
int cudaStreamCreateWithFlags(void **stream, unsigned flags) {
    return flags == 1 ? take(stream, 1, 0) : answer(1);
}
int cudaStreamSynchronize(void *stream) { return stream ? flush() : answer(400); }
int cudaStreamDestroy(void *stream) { return give(stream); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return take(event, 1, 0); }
int cudaEventRecord(void *event, void *stream) { return 0; }
int cudaEventSynchronize(void *event) { return flush(); }
int cudaEventElapsedTime(float *ms, void *start, void *end) { *ms = 1.5f; return 0; }
int cudaEventDestroy(void *event) { return give(event); }

int cudaStreamBeginCapture(void *stream, int mode) {
    int code = setting("FAKE_CUDA_CAPTURE_ERROR", 0);
    if (code || mode != 1 || capturing) return answer(code ? code : 1);
    capturing = stream;
    spoiled = 0;
    graph = (List){NULL, 0, 0};
    return 0;
}
int cudaStreamEndCapture(void *stream, void **made) {
    if (stream != capturing) return answer(1);
    capturing = NULL;
    *made = NULL;
    if (spoiled) { free(graph.items); return answer(901); }
    int code = take(made, sizeof(List), 0);
    if (code) { free(graph.items); return code; }
    memcpy(*made, &graph, sizeof(List));
    return 0;
}
int cudaGraphInstantiateWithFlags(void **executable, void *made, unsigned long long flags) {
    int code = setting("FAKE_CUDA_INSTANTIATE_ERROR", 0);
    if (code || flags) return answer(code ? code : 1);
    if ((code = take(executable, sizeof(List), 0))) return code;
    List *from = made, *to = *executable;
    *to = (List){NULL, 0, 0};
    for (int i = 0; i < from->count; i++) append(to, from->items[i]);
    return 0;
}
static int give_list(void *list) { free(((List *)list)->items); return give(list); }
int cudaGraphDestroy(void *made) { return give_list(made); }
int cudaGraphExecDestroy(void *executable) { return give_list(executable); }
int cudaGraphLaunch(void *executable, void *stream) {
    List *list = executable;
    for (int i = 0; i < list->count; i++) {
        int code = enqueue(stream, list->items[i]);
        if (code) return code;
    }
    launches++;
    return 0;
}

int cudaGetLastError(void) { int code = last; last = 0; return code; }
const char *cudaGetErrorString(int code) {
    return code == 35 ? "driver too old" : code == 2 ? "out of memory"
         : code == 901 ? "operation failed due to a previous error during capture" : "fake error";
}

/* What a stand-in for TensorRT queues, and what tests ask. */
int fakeLaunch(void *stream, void (*run)(long), long argument) {
    return enqueue(stream, (Work){NULL, NULL, 0, run, argument});
}
int fakeCapturing(void *stream) { return stream == capturing; }
int fakeLive(void) { return live; }
int fakeLaunches(void) { return launches; }
int fakeCopies(void) { return copies; }
int fakeDevice(void) { return current; }
int fakeLastError(void) { return last; }
