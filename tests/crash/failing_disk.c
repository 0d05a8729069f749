/* For LD_PRELOAD: a disk that fails, below one folder, from the COUNT-th write or sync on.

   FAILING_DISK=KIND:COUNT:FOLDER, where KIND is
     full     writes fail with ENOSPC
     broken   writes fail with EIO
     unsynced fsync and fdatasync fail with EIO
     torn     the COUNT-th write writes the first half, and the process is killed */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char kind[16], folder[PATH_MAX];
static atomic_long left;

__attribute__((constructor)) static void read_variable(void)
{
    const char *text = getenv("FAILING_DISK");
    long count = 0;
    if (text == NULL || sscanf(text, "%15[a-z]:%ld:%4095s", kind, &count, folder) != 3)
        kind[0] = 0;
    left = count;
}

static int due(int descriptor, const char *which)
{
    char name[64], path[PATH_MAX];
    int saved = errno;
    ssize_t length;
    if (strcmp(kind, which) != 0)
        return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", descriptor);
    length = readlink(name, path, sizeof path - 1);
    errno = saved;
    if (length < 0)
        return 0;
    path[length] = 0;
    return strncmp(path, folder, strlen(folder)) == 0 && atomic_fetch_sub(&left, 1) <= 1;
}

static void tell(const char *what)
{
    dprintf(2, "the disk failed: %s\n", what);
}

static int fails(int descriptor)
{
    if (due(descriptor, "full")) {
        errno = ENOSPC;
        return 1;
    }
    if (due(descriptor, "broken")) {
        errno = EIO;
        return 1;
    }
    return 0;
}

static void die(void)
{
    tell("torn");
    kill(getpid(), SIGKILL);
    pause();
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int descriptor, const void *content, size_t size)
{
    static __typeof__(&write) next;
    if (next == NULL)
        next = NEXT(write);
    if (fails(descriptor))
        return -1;
    if (due(descriptor, "torn")) {
        next(descriptor, content, size / 2);
        die();
    }
    return next(descriptor, content, size);
}

ssize_t pwrite64(int descriptor, const void *content, size_t size, off64_t offset)
{
    static __typeof__(&pwrite64) next;
    if (next == NULL)
        next = NEXT(pwrite64);
    if (fails(descriptor))
        return -1;
    if (due(descriptor, "torn")) {
        next(descriptor, content, size / 2, offset);
        die();
    }
    return next(descriptor, content, size, offset);
}

ssize_t pwrite(int descriptor, const void *content, size_t size, off_t offset)
{
    return pwrite64(descriptor, content, size, offset);
}

static int sync_fails(int descriptor)
{
    if (!due(descriptor, "unsynced"))
        return 0;
    errno = EIO;
    return 1;
}

int fsync(int descriptor)
{
    static __typeof__(&fsync) next;
    if (next == NULL)
        next = NEXT(fsync);
    return sync_fails(descriptor) ? -1 : next(descriptor);
}

int fdatasync(int descriptor)
{
    static __typeof__(&fdatasync) next;
    if (next == NULL)
        next = NEXT(fdatasync);
    return sync_fails(descriptor) ? -1 : next(descriptor);
}
