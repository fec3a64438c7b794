/* Loaded before libc, it stands between a program and the calls that change files: it kills the
 * program after the n-th of them, in the middle if that one writes, or says from the n-th on that
 * the disk is full. Calls that only read change nothing, so dying at one is no case of its own. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static long at = 0, calls = 0; /* at: 0 lets everything through */
static int full = 0;           /* no room on the disk, or killed */

void crash_at(long n, int how) { at = n; full = how; calls = 0; }
long crash_calls(void) { return calls; }

static int reached(void) {
    if (!at) return 0;
    calls++;
    return full ? calls >= at : calls == at;
}

static int is_file(int fd) {
    struct stat status;
    return !fstat(fd, &status) && S_ISREG(status.st_mode);
}

/* A call that may need room on the disk, and one that never does. */
#define TAKES(type, name, parameters, arguments)                                     \
    type name parameters {                                                           \
        type (*real) parameters = dlsym(RTLD_NEXT, #name);                           \
        int now = reached();                                                         \
        if (now && full) { errno = ENOSPC; return -1; }                      \
        type result = real arguments;                                                \
        if (now) _exit(9);                                                           \
        return result;                                                               \
    }
#define GIVES(type, name, parameters, arguments)                                     \
    type name parameters {                                                           \
        type (*real) parameters = dlsym(RTLD_NEXT, #name);                           \
        int now = reached();                                                         \
        type result = real arguments;                                                \
        if (now && !full) _exit(9);                                                  \
        return result;                                                               \
    }

TAKES(int, rename, (const char *from, const char *to), (from, to))
TAKES(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to))
TAKES(int, mkdir, (const char *path, mode_t bits), (path, bits))
TAKES(int, mkdirat, (int folder, const char *path, mode_t bits), (folder, path, bits))
TAKES(int, link, (const char *from, const char *to), (from, to))
TAKES(int, symlink, (const char *from, const char *to), (from, to))
GIVES(int, unlink, (const char *path), (path))
GIVES(int, unlinkat, (int folder, const char *path, int flags), (folder, path, flags))
GIVES(int, rmdir, (const char *path), (path))
GIVES(int, chmod, (const char *path, mode_t bits), (path, bits))
GIVES(int, fchmod, (int fd, mode_t bits), (fd, bits))
GIVES(int, fchmodat, (int folder, const char *path, mode_t bits, int flags),
      (folder, path, bits, flags))
GIVES(int, truncate64, (const char *path, off64_t size), (path, size))
GIVES(int, ftruncate64, (int fd, off64_t size), (fd, size))

/* Counted and not done: what the kernel has, a killed process does not lose. */
static int synced(void) {
    int now = reached();
    if (now && full) { errno = ENOSPC; return -1; }
    if (now) _exit(9);
    return 0;
}
int fsync(int fd) { (void)fd; return synced(); }
int fdatasync(int fd) { (void)fd; return synced(); }

static ssize_t tear(ssize_t (*some)(int, const void *, size_t, off64_t), int fd, const void *data,
                    size_t size, off64_t place) {
    int now = is_file(fd) && reached();
    if (now && full) { errno = ENOSPC; return -1; }
    if (now) { some(fd, data, size / 2, place); _exit(9); }
    return some(fd, data, size, place);
}
static ssize_t append(int fd, const void *data, size_t size, off64_t place) {
    (void)place;
    ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    return real(fd, data, size);
}
static ssize_t put(int fd, const void *data, size_t size, off64_t place) {
    ssize_t (*real)(int, const void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pwrite64");
    return real(fd, data, size, place);
}
ssize_t write(int fd, const void *data, size_t size) { return tear(append, fd, data, size, 0); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t place) {
    return tear(put, fd, data, size, place);
}

#define OPENS(name, first, pass)                                                     \
    int name(first const char *path, int flags, ...) {                               \
        va_list rest;                                                                \
        va_start(rest, flags);                                                       \
        int makes = flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE;             \
        mode_t bits = makes ? va_arg(rest, mode_t) : 0;                              \
        va_end(rest);                                                                \
        int (*real)(first const char *, int, ...) = dlsym(RTLD_NEXT, #name);         \
        int now = flags & (O_CREAT | O_TRUNC) && reached();                          \
        if (now && full) { errno = ENOSPC; return -1; }                      \
        int result = real(pass path, flags, bits);                                   \
        if (now) _exit(9);                                                           \
        return result;                                                               \
    }
#define NOTHING
#define COMMA ,
OPENS(open64, NOTHING, NOTHING)
OPENS(openat64, int folder COMMA, folder COMMA)
