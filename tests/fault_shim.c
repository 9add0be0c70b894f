/* Counts, records and breaks the system calls that concern one folder. Loaded with LD_PRELOAD; see fault_tools.py.
 *
 * Until kd_fault_configure is called, and for every path outside the folder, calls go through untouched. Calls that
 * concern it are numbered from 0. The record of a call is a line of tab-separated fields and the bytes it wrote:
 *
 *     number  operation  descriptor  result  errno  offset or flags  bytes  path  second path \n  <bytes> \n
 *
 * What is written to standard error is recorded too (as "say"), but neither numbered nor broken: the order of a commit
 * and of the line that acknowledges it is what a power cut puts to the test.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum operation { OPEN, CREATE, WRITE, FSYNC, RENAME, UNLINK, MKDIR, TRUNCATE, CLOSE, READ, LIST, SAY };
static const char *const NAMES[] = {"open",  "create",   "write", "fsync", "rename", "unlink",
                                    "mkdir", "truncate", "close", "read",  "list",   "say"};
enum how { NOTHING, ERROR, SHORT, KILL_BEFORE, KILL_AFTER, SIGNAL };
#define FILES 65536

static char root[PATH_MAX];
static size_t root_length;
static int record_to = -1;
static long fault_at = -1, seen;
static enum how fault_how;
static int fault_errno; /* or the number of the signal */
static unsigned long sticky; /* operations (a bit each) that go on failing after the fault */
static int shortened;        /* a short write happened: the next write finds the disk full */
static char *paths[FILES];   /* of descriptors opened below the root */
static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;

void kd_fault_configure(const char *folder, const char *record, long at, int how, int error, unsigned long operations)
{
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    record_to = *record ? open(record, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0644) : -1;
    seen = 0;
    fault_at = at;
    fault_how = (enum how)how;
    fault_errno = error;
    sticky = operations;
    shortened = 0;
}

long kd_fault_seen(void) { return seen; }

/* Whether a path, relative to a directory's descriptor, lies in the folder; ``full`` gets it from the root. */
static int concerns(int directory, const char *path, char full[PATH_MAX])
{
    if (!root_length || !path)
        return 0;
    if (*path == '/') {
        snprintf(full, PATH_MAX, "%s", path);
    } else {
        char base[PATH_MAX], link[64];
        snprintf(link, sizeof link, directory == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", directory);
        ssize_t length = readlink(link, base, sizeof base - 1);
        if (length < 0)
            return 0;
        base[length] = 0;
        if (snprintf(full, PATH_MAX, "%s/%s", base, path) >= PATH_MAX)
            return 0;
    }
    return !strncmp(full, root, root_length) && (full[root_length] == '/' || !full[root_length]);
}

static const char *path_of(int file) { return file >= 0 && file < FILES ? paths[file] : NULL; }

static void remember(int file, const char *path)
{
    if (file < 0 || file >= FILES)
        return;
    free(paths[file]);
    paths[file] = path ? strdup(path) : NULL;
}

static void put(const void *bytes, size_t count)
{
    while (count) {
        long done = syscall(SYS_write, record_to, bytes, count);
        if (done < 0)
            _exit(99);
        bytes = (const char *)bytes + done;
        count -= (size_t)done;
    }
}

static void record(long number, enum operation what, int file, long result, long extra, const char *path,
                   const char *second, const void *bytes, size_t count)
{
    if (record_to < 0)
        return;
    int saved = errno;
    char line[3 * PATH_MAX];
    int length = snprintf(line, sizeof line, "%ld\t%s\t%d\t%ld\t%d\t%ld\t%zu\t%s\t%s\n", number, NAMES[what], file,
                          result, result < 0 ? saved : 0, extra, count, path ? path : "", second ? second : "");
    pthread_mutex_lock(&one);
    put(line, (size_t)length);
    put(bytes, count);
    put("\n", 1);
    pthread_mutex_unlock(&one);
    errno = saved;
}

static void die(void)
{
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;)
        pause();
}

/* What is to happen to the next call; its number is stored in ``number``. */
static enum how verdict(enum operation what, long *number)
{
    *number = __atomic_fetch_add(&seen, 1, __ATOMIC_SEQ_CST);
    if (what == WRITE && shortened) {
        errno = ENOSPC;
        return ERROR;
    }
    if (*number == fault_at || (fault_at >= 0 && *number > fault_at && (sticky >> what & 1))) {
        if (fault_how == KILL_BEFORE)
            die();
        if (fault_how == SIGNAL) /* Python's own handler runs once the call is back in Python */
            syscall(SYS_kill, getpid(), fault_errno);
        errno = fault_errno;
        return fault_how;
    }
    return NOTHING;
}

static void aftermath(enum how how)
{
    if (how == KILL_AFTER)
        die();
}

#define REAL(type, name, ...)                                                                                          \
    static type (*real)(__VA_ARGS__);                                                                                  \
    if (!real)                                                                                                         \
        real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int opened(int directory, const char *path, int flags, mode_t mode)
{
    char full[PATH_MAX];
    if (!concerns(directory, path, full))
        return (int)syscall(SYS_openat, directory, path, flags, mode);
    int unnamed = (flags & __O_TMPFILE) == __O_TMPFILE;
    if (unnamed)
        strncat(full, "/.tmp-(unnamed)", sizeof full - strlen(full) - 1);
    long number;
    enum operation what = flags & O_CREAT || unnamed ? CREATE : OPEN;
    enum how how = verdict(what, &number);
    int file = how == ERROR ? -1 : (int)syscall(SYS_openat, directory, path, flags, mode);
    if (file >= 0)
        remember(file, full);
    record(number, what, file, file, flags, full, NULL, "", 0);
    aftermath(how);
    return file;
}

static mode_t mode_in(int flags, va_list rest)
{
    return flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;
}

#define OPENS(name)                                                                                                    \
    int name(const char *path, int flags, ...)                                                                         \
    {                                                                                                                  \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = mode_in(flags, rest);                                                                            \
        va_end(rest);                                                                                                  \
        return opened(AT_FDCWD, path, flags, mode);                                                                    \
    }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name)                                                                                                 \
    int name(int directory, const char *path, int flags, ...)                                                          \
    {                                                                                                                  \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = mode_in(flags, rest);                                                                            \
        va_end(rest);                                                                                                  \
        return opened(directory, path, flags, mode);                                                                   \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

static ssize_t written(int file, const void *bytes, size_t count, off_t at, int positioned)
{
    const char *path = path_of(file);
    if (!path) {
        ssize_t done = positioned ? syscall(SYS_pwrite64, file, bytes, count, at) : syscall(SYS_write, file, bytes, count);
        if (file == STDERR_FILENO && root_length)
            record(-1, SAY, file, done, 0, NULL, NULL, bytes, done < 0 ? 0 : (size_t)done);
        return done;
    }
    long number;
    enum how how = verdict(WRITE, &number);
    if (!positioned)
        at = lseek(file, 0, SEEK_CUR);
    if (how == SHORT) {
        shortened = 1;
        count /= 2;
    }
    ssize_t done = -1;
    if (how == SHORT && !count)
        errno = ENOSPC;
    else if (how != ERROR)
        done = positioned ? syscall(SYS_pwrite64, file, bytes, count, at) : syscall(SYS_write, file, bytes, count);
    record(number, WRITE, file, done, (long)at, path, NULL, bytes, done < 0 ? 0 : (size_t)done);
    aftermath(how);
    return done;
}

ssize_t write(int file, const void *bytes, size_t count) { return written(file, bytes, count, 0, 0); }
ssize_t pwrite(int file, const void *bytes, size_t count, off_t at) { return written(file, bytes, count, at, 1); }
ssize_t pwrite64(int file, const void *bytes, size_t count, off_t at) { return written(file, bytes, count, at, 1); }

ssize_t writev(int file, const struct iovec *parts, int count)
{
    if (!path_of(file))
        return syscall(SYS_writev, file, parts, count);
    /* One part at a time; a short write is what writev may give anyway. */
    for (int part = 0; part < count; part++)
        if (parts[part].iov_len)
            return write(file, parts[part].iov_base, parts[part].iov_len);
    return 0;
}

static int on_file(enum operation what, int file, long call, long argument)
{
    const char *path = path_of(file);
    if (!path)
        return (int)(what == TRUNCATE ? syscall(call, file, argument) : syscall(call, file));
    long number;
    enum how how = verdict(what, &number);
    int result = how == ERROR ? -1 : (int)(what == TRUNCATE ? syscall(call, file, argument) : syscall(call, file));
    record(number, what, file, result, argument, path, NULL, "", 0);
    aftermath(how);
    return result;
}

int fsync(int file) { return on_file(FSYNC, file, SYS_fsync, 0); }
int fdatasync(int file) { return on_file(FSYNC, file, SYS_fdatasync, 0); }
int ftruncate(int file, off_t size) { return on_file(TRUNCATE, file, SYS_ftruncate, size); }
int ftruncate64(int file, off_t size) { return on_file(TRUNCATE, file, SYS_ftruncate, size); }

int close(int file)
{
    const char *path = path_of(file);
    if (!path)
        return (int)syscall(SYS_close, file);
    long number;
    enum how how = verdict(CLOSE, &number);
    int failed = errno;
    int result = (int)syscall(SYS_close, file); /* Linux closes the descriptor even where close fails */
    if (how == ERROR) {
        errno = failed;
        result = -1;
    }
    record(number, CLOSE, file, result, 0, path, NULL, "", 0);
    remember(file, NULL);
    aftermath(how);
    return result;
}

static int renamed(int from, const char *old, int to, const char *new, unsigned flags)
{
    char source[PATH_MAX], target[PATH_MAX];
    int one_in = concerns(from, old, source), other_in = concerns(to, new, target);
    if (!one_in && !other_in)
        return (int)syscall(SYS_renameat2, from, old, to, new, flags);
    long number;
    enum how how = verdict(RENAME, &number);
    int result = how == ERROR ? -1 : (int)syscall(SYS_renameat2, from, old, to, new, flags);
    record(number, RENAME, -1, result, flags, one_in ? source : old, other_in ? target : new, "", 0);
    aftermath(how);
    return result;
}

int rename(const char *old, const char *new) { return renamed(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) { return renamed(from, old, to, new, 0); }
int renameat2(int from, const char *old, int to, const char *new, unsigned flags)
{
    return renamed(from, old, to, new, flags);
}

static int on_name(enum operation what, int directory, const char *path, long call, long argument)
{
    char full[PATH_MAX];
    if (!concerns(directory, path, full))
        return (int)syscall(call, directory, path, argument);
    long number;
    enum how how = verdict(what, &number);
    int result = how == ERROR ? -1 : (int)syscall(call, directory, path, argument);
    record(number, what, -1, result, argument, full, NULL, "", 0);
    aftermath(how);
    return result;
}

int unlink(const char *path) { return on_name(UNLINK, AT_FDCWD, path, SYS_unlinkat, 0); }
int unlinkat(int directory, const char *path, int flags) { return on_name(UNLINK, directory, path, SYS_unlinkat, flags); }
int rmdir(const char *path) { return on_name(UNLINK, AT_FDCWD, path, SYS_unlinkat, AT_REMOVEDIR); }
int mkdir(const char *path, mode_t mode) { return on_name(MKDIR, AT_FDCWD, path, SYS_mkdirat, (long)mode); }
int mkdirat(int directory, const char *path, mode_t mode) { return on_name(MKDIR, directory, path, SYS_mkdirat, (long)mode); }

static ssize_t taken(int file, void *bytes, size_t count, off_t at, int positioned)
{
    const char *path = path_of(file);
    if (!path)
        return positioned ? syscall(SYS_pread64, file, bytes, count, at) : syscall(SYS_read, file, bytes, count);
    long number;
    enum how how = verdict(READ, &number);
    ssize_t done = -1;
    if (how == SHORT) /* fewer bytes than asked for, and no error: the reader must go on */
        count = (count + 1) / 2;
    if (how != ERROR)
        done = positioned ? syscall(SYS_pread64, file, bytes, count, at) : syscall(SYS_read, file, bytes, count);
    record(number, READ, file, done, positioned ? at : -1, path, NULL, "", 0);
    aftermath(how);
    return done;
}

ssize_t read(int file, void *bytes, size_t count) { return taken(file, bytes, count, 0, 0); }
ssize_t pread(int file, void *bytes, size_t count, off_t at) { return taken(file, bytes, count, at, 1); }
ssize_t pread64(int file, void *bytes, size_t count, off_t at) { return taken(file, bytes, count, at, 1); }

DIR *opendir(const char *path)
{
    REAL(DIR *, "opendir", const char *);
    char full[PATH_MAX];
    if (!concerns(AT_FDCWD, path, full))
        return real(path);
    long number;
    enum how how = verdict(LIST, &number);
    DIR *directory = how == ERROR ? NULL : real(path);
    record(number, LIST, -1, directory ? 0 : -1, 0, full, NULL, "", 0);
    aftermath(how);
    return directory;
}
