/* Tries every system call that could change, read or reach what a sandbox was not given.
 *
 *   hostile list                        the attempts: KIND NAME
 *   hostile make FOLDER                 a bait, as make_bait says
 *   hostile makes FOLDER                a bait for each attempt: FOLDER/ATTEMPT
 *   hostile attack PLACE... [- ATTEMPT...]    all attempts, or these, on baits or single files
 *   hostile unshared PLACE...           the same, each with all rights in namespaces of its own
 *   hostile each FOLDER                 each attempt on its own bait in FOLDER
 *   hostile hold PLACE...               keep locks on the files of these places, from now on
 *   hostile scribble FOLDER...          write to every file below that can be opened for it
 *   hostile descriptors                 what is open, and what a second open of it gives
 *   hostile handle FILE                 its file handle, for HANDLE
 *   hostile wait                        say `the end`, and wait for a signal
 *
 * `then` joins several of these. An attempt runs in a process of its own and prints `NAME: done`, or
 * what stopped it; `NAME> ` is before what it could read. From the environment: SECRET, the path on the
 * host of a file that was not given; HANDLE, that file's handle; DISK, the host's disk as MAJOR:MINOR.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <linux/io_uring.h>
#include <linux/perf_event.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/quota.h>
#include <sys/reboot.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <sys/timex.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

/* Of 64-bit systems all alike; this machine's headers may be older than its kernel. */
enum { SYS_FCHMODAT2 = 452, SYS_SETXATTRAT = 463, SYS_REMOVEXATTRAT = 466, SYS_FILE_SETATTR = 469 };
enum { SYS_OPENAT2 = 437, SYS_OPEN_TREE = 428, SYS_MOVE_MOUNT = 429, SYS_FSOPEN = 430, SYS_FSCONFIG = 431 };
enum { SYS_FSMOUNT = 432, SYS_MOUNT_SETATTR = 442, SYS_IO_URING_SETUP = 425, SYS_IO_URING_ENTER = 426 };

struct how { unsigned long long flags, mode, resolve; };
struct mount_change { unsigned long long set, clear, propagation, userns; };
struct value_args { unsigned long long value; unsigned int size, flags; };
struct file_flags { unsigned long long xflags; unsigned int extsize, nextents, projid, cowextsize; };

enum { LONG = 4096, MODE = 0666, NOT_HERE = -2 };

static char place[LONG];  /* the bait, or the folder of the file */
static char target[LONG]; /* a file that belongs to user 1000, and that all may write to */
static char wide[LONG];   /* a folder of the same kind */
static const char *self;  /* the attempt's name */

static const char *join(const char *folder, const char *name) {
    char *made = NULL;
    if (asprintf(&made, "%s/%s", folder, name) < 0) abort();
    return made;
}

static const char *in_place(const char *name) { return join(place, name); }
static const char *in_wide(const char *name) { return join(wide, name); }

static const char *by_fd(int fd) {
    char *made = NULL;
    if (asprintf(&made, "/proc/self/fd/%d", fd) < 0) abort();
    return made;
}

static const char *secret(void) {
    const char *path = getenv("SECRET");
    return path ? path : "/no/secret";
}

static dev_t disk(void) {
    unsigned int major = 0, minor = 0;
    const char *text = getenv("DISK");
    if (text) sscanf(text, "%u:%u", &major, &minor);
    return makedev(major, minor);
}

/* Only gVisor has it. What acts on the machine is tried nowhere else, whoever calls. */
static int in_gvisor(void) { return access("/proc/sentry-meminfo", F_OK) == 0; }

static int refuse(int error) {
    errno = error;
    return -1;
}

/* -- what is done with a descriptor ------------------------------------------------------------- */

static long scribble(int fd) { return fd < 0 ? -1 : write(fd, "hostile\n", 8) == 8 ? 0 : -1; }

static long store(void *map) {
    if (map == MAP_FAILED) return -1;
    *(volatile char *)map = '#';
    return msync(map, 1, MS_SYNC);
}

/* Print the beginning of what it reads, a line each. */
static long reveal(int fd) {
    static char text[LONG];
    ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (size < 0) return -1;
    if (size == 0) return refuse(ENODATA);
    for (ssize_t i = 0; i < size; i++)
        if (!isprint((unsigned char)text[i])) text[i] = '.';
    text[size < 200 ? size : 200] = 0;
    printf("%s> %s\n", self, text);
    return 0;
}

static long read_at(const char *folder) { return reveal(open(join(folder, secret()), O_RDONLY | O_NONBLOCK)); }

static long fill(const char *path, const char *text, mode_t mode, uid_t owner) {
    int fd = open(path, O_CREAT | O_WRONLY | O_TRUNC, mode);
    if (fd < 0) return -1;
    long failed = write(fd, text, strlen(text)) < 0;
    failed |= fchmod(fd, mode);
    if (geteuid() == 0) failed |= fchown(fd, owner, owner);
    close(fd);
    return failed ? -1 : 0;
}

/* -- what takes more than one call --------------------------------------------------------------- */

static long uring(struct io_uring_sqe want) {
    struct io_uring_params setup = {0};
    int ring = syscall(SYS_IO_URING_SETUP, 1, &setup);
    if (ring < 0) return -1;
    int both = PROT_READ | PROT_WRITE;
    char *queue = mmap(NULL, LONG, both, MAP_SHARED, ring, IORING_OFF_SQ_RING);
    struct io_uring_sqe *entries = mmap(NULL, LONG, both, MAP_SHARED, ring, IORING_OFF_SQES);
    char *answers = mmap(NULL, LONG, both, MAP_SHARED, ring, IORING_OFF_CQ_RING);
    if (queue == MAP_FAILED || entries == MAP_FAILED || answers == MAP_FAILED) return -1;
    entries[0] = want;
    *(unsigned *)(queue + setup.sq_off.array) = 0;
    __atomic_store_n((unsigned *)(queue + setup.sq_off.tail), 1, __ATOMIC_RELEASE);
    if (syscall(SYS_IO_URING_ENTER, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) < 0) return -1;
    int result = ((struct io_uring_cqe *)(answers + setup.cq_off.cqes))[0].res;
    return result < 0 ? refuse(-result) : result;
}

static long uring_open(const char *path, int flags) {
    return uring((struct io_uring_sqe){
        .opcode = IORING_OP_OPENAT, .fd = AT_FDCWD, .addr = (unsigned long)path, .len = MODE, .open_flags = flags});
}

static long aio_write(int fd) {
    aio_context_t context = 0;
    struct iocb block = {.aio_fildes = fd, .aio_lio_opcode = IOCB_CMD_PWRITE, .aio_buf = (unsigned long)"#", .aio_nbytes = 1};
    struct iocb *blocks[] = {&block};
    struct io_event event;
    if (fd < 0 || syscall(SYS_io_setup, 1, &context) < 0 || syscall(SYS_io_submit, context, 1, blocks) != 1) return -1;
    if (syscall(SYS_io_getevents, context, 1, 1, &event, NULL) != 1) return -1;
    return event.res < 0 ? refuse(-event.res) : 0;
}

static long from_pipe(int fd) {
    int ends[2];
    if (fd < 0 || pipe(ends) || write(ends[1], "#", 1) != 1) return -1;
    return splice(ends[0], NULL, fd, NULL, 1, 0) == 1 ? 0 : -1;
}

static long from_file(int fd, int by_sendfile) {
    int source = open("/proc/self/exe", O_RDONLY);
    if (source < 0 || fd < 0) return -1;
    if (by_sendfile) return sendfile(fd, source, NULL, 16) == 16 ? 0 : -1;
    char *copy = strdup("/tmp/hostile-XXXXXX"); /* both of one file system where that is needed */
    int other = open(in_place("file"), O_RDONLY);
    if (other < 0 && ((other = mkstemp(copy)) < 0 || write(other, "hostile", 7) != 7)) return -1;
    loff_t at = 0;
    return copy_file_range(other, &at, fd, NULL, 4, 0) == 4 ? 0 : -1;
}

static long tmpfile_link(void) {
    int fd = open(wide, O_TMPFILE | O_RDWR, MODE);
    return fd < 0 ? -1 : linkat(AT_FDCWD, by_fd(fd), AT_FDCWD, in_wide("new"), AT_SYMLINK_FOLLOW);
}

static int bound_socket(const char *path, int to_connect) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (fd < 0) return -1;
    if (strlen(path) >= sizeof address.sun_path) { /* too long for an address: by way of its folder */
        char *folder = strdup(path);
        *strrchr(folder, '/') = 0;
        int at = open(folder, O_PATH | O_DIRECTORY);
        if (at < 0) return -1;
        path = join(by_fd(at), strrchr(path, '/') + 1);
    }
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    struct sockaddr *name = (struct sockaddr *)&address;
    return to_connect ? connect(fd, name, sizeof address) : bind(fd, name, sizeof address);
}

static union { struct file_handle head; char room[sizeof(struct file_handle) + MAX_HANDLE_SZ]; } handle;

static int find_handle(const char *path) {
    int mount_id;
    handle.head.handle_bytes = MAX_HANDLE_SZ;
    return name_to_handle_at(AT_FDCWD, path, &handle.head, &mount_id, 0);
}

static int told_handle(void) {
    const char *text = getenv("HANDLE");
    int type, at = 0, length = 0;
    if (!text || sscanf(text, "%d:%n", &type, &at) != 1) return refuse(ENOKEY);
    for (text += at; length < MAX_HANDLE_SZ && sscanf(text, "%2hhx", &handle.head.f_handle[length]) == 1; text += 2) length++;
    handle.head.handle_type = type;
    handle.head.handle_bytes = length;
    return 0;
}

static long read_by_handle(void) {
    const char *roots[] = {place, target, "/", "/usr", "/etc/hosts", "/etc/resolv.conf", "/tmp", "/proc/self/exe"};
    long error = ENOENT;
    if (told_handle()) return -1;
    for (unsigned i = 0; i < sizeof roots / sizeof *roots; i++) {
        int at = open(roots[i], O_RDONLY | O_NONBLOCK);
        if (at >= 0 && !reveal(open_by_handle_at(at, &handle.head, O_RDONLY))) return 0;
        error = errno;
    }
    return refuse(error);
}

/* The root of every process that is to be seen, and what they are in. */
static long read_by_proc(const char *what) {
    DIR *all = opendir("/proc");
    struct dirent *one;
    long error = ENOENT;
    while (all && (one = readdir(all))) {
        if (!isdigit(one->d_name[0])) continue;
        char *way = NULL;
        if (asprintf(&way, "/proc/%s/%s/../../../../../../../../..", one->d_name, what) < 0) abort();
        if (!read_at(way)) return 0;
        error = errno;
    }
    return refuse(error);
}

static long read_by_chroot(void) {
    const char *folders[] = {wide, "/tmp", "/dev/shm"};
    int outside = open("/", O_RDONLY);
    for (int i = 0; i < 3; i++) {
        const char *jail = join(folders[i], "jail");
        if (mkdir(jail, 0777) && errno != EEXIST) continue;
        if (chroot(jail) || fchdir(outside)) return -1;
        for (int up = 0; up < 50; up++)
            if (chdir("..")) return -1;
        return chroot(".") ? -1 : read_at("");
    }
    return -1;
}

static long read_device(mode_t kind, dev_t device, off_t from) {
    const char *folders[] = {wide, "/tmp", "/dev", "/dev/shm"};
    long error = EPERM;
    for (int i = 0; i < 4; i++) {
        const char *node = join(folders[i], "node");
        if (mknod(node, kind | MODE, device)) { error = errno; continue; }
        int fd = open(node, O_RDONLY | O_NONBLOCK);
        unlink(node);
        if (fd >= 0 && (!from || lseek(fd, from, SEEK_SET) == from) && !reveal(fd)) return 0;
        error = errno;
    }
    return refuse(error);
}

static long setuid_run(void) {
    if (getuid() == 0 && setresuid(1000, 1000, 1000)) return -1;
    execl(in_place("setuid"), "setuid", "is-root", NULL);
    return -1;
}

/* -- mounts: what would make the place writable, and a write ------------------------------------- */

static long write_target(void) { return scribble(open(target, O_WRONLY)); }

/* For the target and each folder above it, as any of them may be the mount, until a write works. */
static long for_each_above(long (*change)(const char *)) {
    char *path = strdup(target);
    for (;;) {
        long error = change(*path ? path : "/") ? errno : 0;
        if (!error && !write_target()) return 0;
        if (!*path) return refuse(error ? error : EROFS);
        *strrchr(path, '/') = 0;
    }
}

static long remount(const char *path) { return mount(NULL, path, NULL, MS_REMOUNT | MS_BIND, NULL); }
static long remount_all(const char *path) { return mount(NULL, path, NULL, MS_REMOUNT, NULL); }

static long set_writable(const char *path) {
    struct mount_change change = {.clear = 1};
    return syscall(SYS_MOUNT_SETATTR, AT_FDCWD, path, 0x8000, &change, sizeof change); /* AT_RECURSIVE */
}

static long copy_tree(const char *path) {
    struct mount_change change = {.clear = 1};
    int tree = syscall(SYS_OPEN_TREE, AT_FDCWD, path, 1 | 0x8000 | O_CLOEXEC); /* OPEN_TREE_CLONE */
    if (tree < 0) return -1;
    if (syscall(SYS_MOUNT_SETATTR, tree, "", 0x1000 | 0x8000, &change, sizeof change)) return -1;
    return syscall(SYS_MOVE_MOUNT, tree, "", AT_FDCWD, path, 4); /* MOVE_MOUNT_F_EMPTY_PATH */
}

static long bind_again(const char *path) {
    return mount(path, path, NULL, MS_BIND | MS_REC, NULL) ? -1 : remount(path);
}

static long unmount(const char *path) { return strcmp(path, "/") ? umount2(path, MNT_DETACH) : refuse(EBUSY); }

/* Every right in a user and a mount namespace of its own, and all mounts writable, if that works. */
static int own_namespace(void) {
    static const char *const paths[] = {"/", "/usr", "/etc/hosts", "/etc/resolv.conf"};
    char users[64], groups[64];
    snprintf(users, sizeof users, "0 %d 1", getuid());
    snprintf(groups, sizeof groups, "0 %d 1", getgid());
    if (unshare(CLONE_NEWUSER | CLONE_NEWNS)) return -1;
    fill("/proc/self/setgroups", "deny", MODE, 0);
    fill("/proc/self/uid_map", users, MODE, 0);
    fill("/proc/self/gid_map", groups, MODE, 0);
    for (int i = 0; i < 4; i++) remount(paths[i]);
    for (char *path = strdup(target); *path; *strrchr(path, '/') = 0) remount(path);
    return 0;
}

static long mount_host(const char *source, const char *type, unsigned long flags) {
    const char *points[] = {"/mnt", "/tmp", wide};
    long error = EPERM;
    for (int i = 0; i < 3; i++) {
        if (mount(source, points[i], type, flags, NULL)) error = errno;
        else if (!read_at(points[i])) return 0;
    }
    return refuse(error);
}

static long mount_disk(void) {
    const char *folders[] = {wide, "/tmp", "/dev/shm", "/dev"};
    for (int i = 0; i < 4; i++)
        if (!mknod(join(folders[i], "disk"), S_IFBLK | 0600, disk())) return mount_host(join(folders[i], "disk"), "ext4", 0);
    return -1;
}

static long mount_new(const char *type) {
    int fd = syscall(SYS_FSOPEN, type, 0);
    if (fd < 0 || syscall(SYS_FSCONFIG, fd, 6, NULL, NULL, 0)) return -1; /* FSCONFIG_CMD_CREATE */
    int made = syscall(SYS_FSMOUNT, fd, 0, 0);
    return made < 0 ? -1 : syscall(SYS_MOVE_MOUNT, made, "", AT_FDCWD, place, 4);
}

static long enter(const char *kind) {
    int fd = open(join("/proc/1/ns", kind), O_RDONLY);
    return fd < 0 ? -1 : setns(fd, 0);
}

/* -- the machine: only in a sandbox --------------------------------------------------------------- */

static long poke(pid_t pid) {
    static char byte = '#';
    struct iovec from = {&byte, 1}, to = {(void *)0x400000, 1};
    return process_vm_writev(pid, &from, 1, &to, 1, 0) == 1 ? 0 : -1;
}

static long set_clock(int by_timeofday) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    now.tv_sec += 7200;
    struct timeval value = {now.tv_sec, 0};
    return by_timeofday ? settimeofday(&value, NULL) : clock_settime(CLOCK_REALTIME, &now);
}

static long open_bpf(void) {
    struct { unsigned type, key, value, entries; char rest[104]; } map = {2, 4, 4, 1, {0}};
    return syscall(SYS_bpf, 0, &map, sizeof map) < 0 ? -1 : 0;
}

static long open_perf(void) {
    struct perf_event_attr event = {.type = PERF_TYPE_SOFTWARE, .size = sizeof event};
    return syscall(SYS_perf_event_open, &event, -1, 0, -1, 0) < 0 ? -1 : 0;
}

/* -- all attempts --------------------------------------------------------------------------------- */

/* `C`: changes what lies on the host. `R`: reads what was not given. `N`: what no kernel allows.
 * `W`: makes a read-only mount writable, and writes. `M`: acts on the machine. `O`: may succeed in a
 * sandbox, as it concerns the sandbox's own kernel. */
static const char *wanted; /* NULL: note them all */

static struct { char kind; const char *name; } known[256];
static int count;

static int chosen(char kind, const char *name) {
    if (wanted) return !strcmp(wanted, name);
    known[count].kind = kind;
    known[count++].name = name;
    return 0;
}

#define CHANGE(name) if (chosen('C', name))
#define READ(name) if (chosen('R', name))
#define NEVER(name) if (chosen('N', name))
#define WRITABLE(name) if (chosen('W', name))
#define MACHINE(name) if (chosen('M', name))
#define OWN(name) if (chosen('O', name))

static long attempt_content(void) {
    CHANGE("open-write") return scribble(open(target, O_WRONLY));
    CHANGE("open-rdwr") return scribble(open(target, O_RDWR));
    CHANGE("open-append") return scribble(open(target, O_WRONLY | O_APPEND));
    CHANGE("open-readonly-trunc") return open(target, O_RDONLY | O_TRUNC);
    CHANGE("open-write-trunc") return open(target, O_WRONLY | O_TRUNC);
    CHANGE("open-rdwr-trunc") return open(target, O_RDWR | O_TRUNC);
    CHANGE("open-noaccess-trunc") return open(target, O_ACCMODE | O_TRUNC);
    CHANGE("open-create-trunc") return open(target, O_RDONLY | O_CREAT | O_TRUNC, MODE);
    CHANGE("open-link-trunc") return open(in_place("link"), O_RDONLY | O_TRUNC);
    CHANGE("creat") return creat(target, MODE);
    CHANGE("path-reopen-rdwr") return scribble(open(by_fd(open(target, O_PATH)), O_RDWR));
    CHANGE("path-reopen-trunc") return open(by_fd(open(target, O_PATH)), O_RDONLY | O_TRUNC);
    CHANGE("readonly-reopen-rdwr") return scribble(open(by_fd(open(target, O_RDONLY)), O_RDWR));
    CHANGE("readonly-reopen-trunc") return open(by_fd(open(target, O_RDONLY)), O_RDONLY | O_TRUNC);
    CHANGE("openat2-rdwr") {
        struct how how = {.flags = O_RDWR};
        return scribble(syscall(SYS_OPENAT2, AT_FDCWD, target, &how, sizeof how));
    }
    CHANGE("openat2-trunc") {
        struct how how = {.flags = O_RDONLY | O_TRUNC};
        return syscall(SYS_OPENAT2, AT_FDCWD, target, &how, sizeof how);
    }
    CHANGE("truncate") return truncate(target, 1);
    CHANGE("truncate-longer") return truncate(target, 1 << 20);
    CHANGE("truncate-path") return truncate(by_fd(open(target, O_PATH)), 0);
    CHANGE("ftruncate") return ftruncate(open(target, O_RDWR), 1);
    NEVER("ftruncate-readonly") return ftruncate(open(target, O_RDONLY), 0);
    NEVER("write-readonly") return scribble(open(target, O_RDONLY));
    NEVER("fallocate-readonly") return fallocate(open(target, O_RDONLY), 0, 0, 1 << 20);
    CHANGE("fallocate") return fallocate(open(target, O_RDWR), 0, 0, 1 << 16);
    CHANGE("fallocate-punch") return fallocate(open(target, O_RDWR), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 8);
    CHANGE("fallocate-zero") return fallocate(open(target, O_RDWR), FALLOC_FL_ZERO_RANGE, 0, 8);
    CHANGE("mmap-shared") return store(mmap(NULL, 1, PROT_READ | PROT_WRITE, MAP_SHARED, open(target, O_RDWR), 0));
    NEVER("mmap-shared-readonly") return store(mmap(NULL, 1, PROT_READ | PROT_WRITE, MAP_SHARED, open(target, O_RDONLY), 0));
    NEVER("mprotect-shared") {
        void *map = mmap(NULL, 1, PROT_READ, MAP_SHARED, open(target, O_RDONLY), 0);
        return map == MAP_FAILED || mprotect(map, 1, PROT_READ | PROT_WRITE) ? -1 : store(map);
    }
    NEVER("proc-mem-shared") {
        void *map = mmap(NULL, 1, PROT_READ, MAP_SHARED, open(target, O_RDONLY), 0);
        int memory = open("/proc/self/mem", O_RDWR);
        return map == MAP_FAILED || pwrite(memory, "#", 1, (off_t)map) != 1 ? -1 : 0;
    }
    CHANGE("sendfile") return from_file(open(target, O_WRONLY), 1);
    CHANGE("copy-file-range") return from_file(open(target, O_WRONLY), 0);
    NEVER("sendfile-readonly") return from_file(open(target, O_RDONLY), 1);
    NEVER("copy-file-range-readonly") return from_file(open(target, O_RDONLY), 0);
    CHANGE("splice") return from_pipe(open(target, O_WRONLY));
    NEVER("splice-readonly") return from_pipe(open(target, O_RDONLY));
    CHANGE("pwritev2") {
        struct iovec part = {"#", 1};
        return pwritev2(open(target, O_RDWR), &part, 1, 0, RWF_SYNC) == 1 ? 0 : -1;
    }
    CHANGE("aio-write") return aio_write(open(target, O_RDWR));
    CHANGE("uring-open-trunc") return uring_open(target, O_RDONLY | O_TRUNC);
    CHANGE("uring-open-write") {
        int fd = uring_open(target, O_RDWR);
        if (fd < 0) return -1;
        return uring((struct io_uring_sqe){.opcode = IORING_OP_WRITE, .fd = fd, .addr = (unsigned long)"#", .len = 1});
    }
    CHANGE("uring-unlink") return uring((struct io_uring_sqe){
        .opcode = IORING_OP_UNLINKAT, .fd = AT_FDCWD, .addr = (unsigned long)target});
    CHANGE("handle-write") {
        if (find_handle(target)) return -1;
        return scribble(open_by_handle_at(open(place, O_RDONLY), &handle.head, O_RDWR));
    }
    CHANGE("handle-trunc") {
        if (find_handle(target)) return -1;
        return open_by_handle_at(open(place, O_RDONLY), &handle.head, O_RDONLY | O_TRUNC);
    }
    CHANGE("ioctl-clone") return ioctl(open(target, O_RDWR), FICLONE, open(in_place("file"), O_RDONLY));
    return NOT_HERE;
}

static long attempt_names(void) {
    CHANGE("open-create") return open(in_wide("new"), O_RDONLY | O_CREAT, MODE);
    CHANGE("open-exclusive") return open(in_wide("new"), O_WRONLY | O_CREAT | O_EXCL, MODE);
    CHANGE("tmpfile-link") return tmpfile_link();
    CHANGE("unlink") return unlink(target);
    CHANGE("rmdir") return rmdir(in_place("wide/empty"));
    CHANGE("unlinkat-folder") return unlinkat(AT_FDCWD, in_place("wide/empty"), AT_REMOVEDIR);
    CHANGE("rename") return rename(target, in_wide("new"));
    CHANGE("rename-over") return rename(in_place("wide/file"), target);
    CHANGE("rename-exchange") return renameat2(AT_FDCWD, target, AT_FDCWD, in_place("wide/file"), RENAME_EXCHANGE);
    CHANGE("rename-whiteout") return renameat2(AT_FDCWD, target, AT_FDCWD, in_wide("new"), RENAME_WHITEOUT);
    CHANGE("link") return link(target, in_wide("new"));
    CHANGE("link-descriptor") return linkat(open(target, O_RDONLY), "", AT_FDCWD, in_wide("new"), AT_EMPTY_PATH);
    CHANGE("link-proc") return linkat(AT_FDCWD, by_fd(open(target, O_PATH)), AT_FDCWD, in_wide("new"), AT_SYMLINK_FOLLOW);
    CHANGE("symlink") return symlink("/etc/passwd", in_wide("new"));
    CHANGE("mkdir") return mkdir(in_wide("new"), 0777);
    CHANGE("mknod-file") return mknod(in_wide("new"), S_IFREG | MODE, 0);
    CHANGE("mknod-char") return mknod(in_wide("new"), S_IFCHR | MODE, makedev(1, 3));
    CHANGE("mknod-block") return mknod(in_wide("new"), S_IFBLK | MODE, disk());
    CHANGE("mknod-fifo") return mknod(in_wide("new"), S_IFIFO | MODE, 0);
    CHANGE("mknod-socket") return mknod(in_wide("new"), S_IFSOCK | MODE, 0);
    CHANGE("bind-socket") return bound_socket(in_wide("new"), 0);
    return NOT_HERE;
}

static long attempt_inode(void) {
    struct timespec times[2] = {{1, 0}, {1, 0}};
    CHANGE("chmod") return chmod(target, 04777);
    CHANGE("chmod-folder") return chmod(wide, 0700);
    CHANGE("fchmod") return fchmod(open(target, O_RDONLY), 04777);
    CHANGE("fchmodat") return fchmodat(AT_FDCWD, target, 0600, 0);
    CHANGE("fchmodat2") return syscall(SYS_FCHMODAT2, open(target, O_PATH), "", 0600, AT_EMPTY_PATH);
    CHANGE("chown") return chown(target, getuid() ? getuid() : 1001, getgid() ? getgid() : 1001);
    CHANGE("fchown") return fchown(open(target, O_RDONLY), getuid(), getgid());
    CHANGE("lchown") return lchown(in_place("link"), getuid(), getgid());
    CHANGE("fchownat-empty") return fchownat(open(target, O_PATH), "", getuid(), getgid(), AT_EMPTY_PATH);
    CHANGE("utimensat") return utimensat(AT_FDCWD, target, times, 0);
    CHANGE("utimensat-now") return utimensat(AT_FDCWD, target, NULL, 0);
    CHANGE("utimensat-link") return utimensat(AT_FDCWD, in_place("link"), times, AT_SYMLINK_NOFOLLOW);
    CHANGE("utimensat-folder") return utimensat(AT_FDCWD, wide, times, 0);
    CHANGE("futimens") return futimens(open(target, O_RDONLY), times);
    CHANGE("setxattr") return setxattr(target, "user.hostile", "#", 1, 0);
    CHANGE("setxattr-trusted") return setxattr(target, "trusted.hostile", "#", 1, 0);
    CHANGE("setxattr-security") return setxattr(target, "security.hostile", "#", 1, 0);
    CHANGE("fsetxattr") return fsetxattr(open(target, O_RDONLY), "user.hostile", "#", 1, 0);
    CHANGE("lsetxattr-folder") return lsetxattr(wide, "user.hostile", "#", 1, 0);
    CHANGE("removexattr") return removexattr(target, "user.bait");
    CHANGE("fremovexattr") return fremovexattr(open(target, O_RDONLY), "user.bait");
    CHANGE("setxattrat") {
        struct value_args args = {(unsigned long)"#", 1, 0};
        return syscall(SYS_SETXATTRAT, AT_FDCWD, target, 0, "user.hostile", &args, sizeof args);
    }
    CHANGE("removexattrat") return syscall(SYS_REMOVEXATTRAT, AT_FDCWD, target, 0, "user.bait");
    CHANGE("ioctl-setflags") {
        int flags = FS_NODUMP_FL;
        return ioctl(open(target, O_RDONLY), FS_IOC_SETFLAGS, &flags);
    }
    CHANGE("ioctl-fssetxattr") {
        struct fsxattr flags = {.fsx_xflags = FS_XFLAG_NODUMP};
        return ioctl(open(target, O_RDONLY), FS_IOC_FSSETXATTR, &flags);
    }
    CHANGE("file-setattr") {
        struct file_flags flags = {.xflags = FS_XFLAG_NODUMP};
        return syscall(SYS_FILE_SETATTR, AT_FDCWD, target, &flags, sizeof flags, 0);
    }
    OWN("read") return reveal(open(target, O_RDONLY));
    OWN("read-hidden") return reveal(open(in_place("hidden"), O_RDONLY));
    return NOT_HERE;
}

static long attempt_doors(void) {
    CHANGE("socket-connect") return bound_socket(in_place("socket"), 1);
    CHANGE("socket-connect-path") return bound_socket(by_fd(open(in_place("socket"), O_PATH)), 1);
    CHANGE("fifo-write") return scribble(open(in_place("fifo"), O_WRONLY | O_NONBLOCK));
    CHANGE("fifo-rdwr") return scribble(open(in_place("fifo"), O_RDWR | O_NONBLOCK));
    READ("fifo-read") return reveal(open(in_place("fifo"), O_RDONLY | O_NONBLOCK));
    READ("setuid-run") return setuid_run();
    READ("symlink-absolute") return reveal(open(in_place("escape"), O_RDONLY));
    READ("symlink-relative") return reveal(open(in_place("up"), O_RDONLY));
    READ("dotdot") {
        if (chdir(place)) return -1;
        return read_at("../../../../../../../../../../../../../../../../../../../..");
    }
    READ("dotdot-root") return read_at("/../../../..");
    READ("chroot") return read_by_chroot();
    READ("handle-read") return read_by_handle();
    READ("proc-1-root") return read_at("/proc/1/root");
    READ("proc-all-root") return read_by_proc("root");
    READ("proc-all-cwd") return read_by_proc("cwd");
    READ("proc-self-fd") {
        for (int fd = 0; fd < 64; fd++)
            if (!read_at(join(by_fd(fd), "../../../../../../../../../../../../../.."))) return 0;
        int root = open("/", O_PATH | O_DIRECTORY);
        return read_at(by_fd(root));
    }
    READ("setns-mount") return enter("mnt") ? -1 : read_at("");
    READ("device-disk") return read_device(S_IFBLK, disk(), 0);
    READ("device-memory") return read_device(S_IFCHR, makedev(1, 1), 0xf0000);
    READ("device-kmsg") return read_device(S_IFCHR, makedev(1, 11), 0);
    READ("mount-root") return mount_host("/proc/1/root", NULL, MS_BIND | MS_REC);
    READ("mount-disk") return mount_disk();
    WRITABLE("remount-bind") return for_each_above(remount);
    WRITABLE("mount-setattr") return for_each_above(set_writable);
    WRITABLE("open-tree") return for_each_above(copy_tree);
    WRITABLE("bind-again") return for_each_above(bind_again);
    WRITABLE("unmount") return for_each_above(unmount);
    WRITABLE("remount-userns") return own_namespace() ? -1 : write_target();
    return NOT_HERE;
}

static long attempt_machine(void) {
    MACHINE("remount") return for_each_above(remount_all); /* of the file system, for all who have it */
    MACHINE("reboot") return reboot(RB_DISABLE_CAD); /* the one of its commands that ends nothing */
    MACHINE("kexec-load") return syscall(SYS_kexec_load, 0, 0, NULL, 0);
    MACHINE("init-module") return syscall(SYS_init_module, "", 0, "");
    MACHINE("finit-module") return syscall(SYS_finit_module, open("/proc/self/exe", O_RDONLY), "", 0);
    MACHINE("delete-module") return syscall(SYS_delete_module, "veth", O_NONBLOCK);
    MACHINE("swapon") return swapon(target, 0);
    MACHINE("swapoff") return swapoff(target);
    MACHINE("acct") return acct(target);
    MACHINE("quotactl") return quotactl(QCMD(Q_SYNC, USRQUOTA), NULL, 0, NULL);
    MACHINE("settimeofday") return set_clock(1);
    MACHINE("clock-settime") return set_clock(0);
    MACHINE("adjtimex") {
        struct timex change = {.modes = ADJ_SETOFFSET, .time = {7200, 0}};
        return adjtimex(&change);
    }
    MACHINE("sethostname") return sethostname("hostile", 7);
    MACHINE("setdomainname") return setdomainname("hostile", 7);
    MACHINE("syslog-clear") return klogctl(5, NULL, 0);
    MACHINE("iopl") return iopl(3);
    MACHINE("ioperm") return ioperm(0x80, 1, 1);
    MACHINE("bpf") return open_bpf();
    MACHINE("perf-event-open") return open_perf();
    MACHINE("fanotify") return fanotify_init(FAN_CLASS_CONTENT, O_RDWR);
    MACHINE("pivot-root") return chdir(place) || syscall(SYS_pivot_root, ".", ".") ? -1 : 0;
    MACHINE("fsopen-tmpfs") return mount_new("tmpfs");
    MACHINE("fsopen-proc") return mount_new("proc");
    MACHINE("mount-sysfs") return mount("none", wide, "sysfs", 0, NULL);
    MACHINE("mount-devtmpfs") return mount("none", wide, "devtmpfs", 0, NULL);
    MACHINE("mount-cgroup") return mount("none", wide, "cgroup2", 0, NULL);
    MACHINE("setns-net") return enter("net");
    MACHINE("setns-pid") return enter("pid");
    MACHINE("setns-user") return enter("user");
    MACHINE("raise-limits") {
        struct { unsigned long long soft, hard; } most = {1 << 30, 1 << 30};
        return syscall(SYS_prlimit64, 0, 7, &most, NULL); /* RLIMIT_NOFILE */
    }
    MACHINE("raise-priority") return syscall(SYS_setpriority, 0, 0, -20);
    OWN("syslog-read") {
        static char text[LONG];
        return klogctl(3, text, sizeof text) < 0 ? -1 : (printf("%s> %.200s\n", self, text), 0);
    }
    OWN("inotify") return inotify_add_watch(inotify_init1(0), place, IN_ALL_EVENTS) < 0 ? -1 : 0;
    OWN("ptrace") return ptrace(PTRACE_SEIZE, 1, NULL, NULL);
    OWN("process-vm-writev") return poke(1);
    OWN("proc-1-mem") return pwrite(open("/proc/1/mem", O_RDWR), "#", 1, 0x400000) == 1 ? 0 : -1;
    OWN("unshare") return unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID);
    return NOT_HERE;
}

static long attempt(void) {
    long (*const parts[])(void) = {attempt_content, attempt_names, attempt_inode, attempt_doors};
    long result = NOT_HERE;
    for (int i = 0; i < 4 && result == NOT_HERE; i++) result = parts[i]();
    if (result == NOT_HERE && (!wanted || in_gvisor())) result = attempt_machine();
    return result;
}

/* -- what the program is told to do ---------------------------------------------------------------- */

/* `mine` and `wide` are of user 1000 and open to all; `hidden` is root's alone; `escape` and `up` lead to
 * the secret. The socket and what is in the FIFO come from the test. */
static int make_bait(const char *folder, int has_program) {
    mkdir(folder, 0755);
    chmod(folder, 0755);
    strncpy(place, folder, LONG - 1);
    mkdir(in_place("folder"), 0755);
    mkdir(in_place("wide"), 0777);
    mkdir(in_place("wide/empty"), 0777);
    int failed = fill(in_place("mine"), "for everybody to write to, owned by user 1000\n", 0666, 1000);
    failed |= fill(in_place("file"), "a file of root's\n", 0644, 0);
    failed |= fill(in_place("hidden"), getenv("HIDDEN") ? getenv("HIDDEN") : "hidden\n", 0600, 0);
    failed |= fill(in_place("empty"), "", 0666, 1000);
    failed |= fill(in_place("folder/file"), "in a folder\n", 0644, 0);
    failed |= fill(in_place("wide/file"), "in a folder\n", 0666, 1000);
    failed |= setxattr(in_place("mine"), "user.bait", "1", 1, 0) && errno != EOPNOTSUPP;
    if (geteuid() == 0) failed |= chown(in_place("wide"), 1000, 1000) | chown(in_place("wide/empty"), 1000, 1000);
    failed |= chmod(in_place("wide"), 0777) | chmod(in_place("wide/empty"), 0777);
    failed |= symlink("mine", in_place("link")) | symlink(secret(), in_place("escape"));
    failed |= symlink(join("../../../../../../../../../../../..", secret()), in_place("up"));
    failed |= mkfifo(in_place("fifo"), 0666) | chmod(in_place("fifo"), 0666);
    if (has_program) {
        int from = open("/proc/self/exe", O_RDONLY), to = open(in_place("setuid"), O_WRONLY | O_CREAT, 0755);
        while (sendfile(to, from, NULL, 1 << 20) > 0);
        failed |= fchmod(to, 04755);
        close(to);
    }
    if (failed) perror(folder);
    return failed;
}

static void look_at(const char *path) {
    struct stat found;
    snprintf(place, LONG, "%s", path);
    snprintf(target, LONG, "%s/mine", path);
    snprintf(wide, LONG, "%s/wide", path);
    if (stat(path, &found) || S_ISDIR(found.st_mode)) return;
    snprintf(target, LONG, "%s", path);
    *strrchr(place, '/') = 0;
    strcpy(wide, place);
}

static void try(const char *name, int is_unshared) {
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        alarm(5);
        wanted = self = name;
        if (is_unshared && own_namespace()) perror("unshare");
        long result = attempt();
        printf("%s: %s\n", name, result == NOT_HERE ? "not here" : result < 0 ? strerrorname_np(errno) : "done");
        fflush(stdout);
        _exit(0);
    }
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child) perror(name);
    if (WIFSIGNALED(status)) printf("%s: SIG%s\n", name, sigabbrev_np(WTERMSIG(status)));
}

static void hold(const char *path) {
    struct flock lock = {.l_type = F_RDLCK};
    look_at(path);
    int fd = open(target, O_RDONLY);
    printf("hold %s: flock %d, lock %d, lease %d\n", path, flock(fd, LOCK_EX | LOCK_NB), fcntl(fd, F_SETLK, &lock),
           fcntl(fd, F_SETLEASE, F_RDLCK));
}

/* Links and folders of other processes' descriptors are left alone: they are no files of the folder. */
static void scribble_below(const char *folder, int depth) {
    DIR *all = opendir(folder);
    struct dirent *one;
    while (all && depth < 12 && (one = readdir(all))) {
        const char *path = join(folder, one->d_name);
        struct stat found;
        if (one->d_name[0] == '.' || lstat(path, &found) || S_ISLNK(found.st_mode)) continue;
        if (S_ISDIR(found.st_mode)) {
            if (strcmp(one->d_name, "fd")) scribble_below(path, depth + 1);
            continue;
        }
        int trunc = open(path, O_RDONLY | O_TRUNC | O_NONBLOCK), fd = open(path, O_WRONLY | O_NONBLOCK | O_NOCTTY);
        if (fd >= 0) printf("%s: %s\n", path, write(fd, "1\n", 2) == 2 ? "written" : strerrorname_np(errno));
        close(trunc);
        close(fd);
    }
    if (all) closedir(all);
}

static void reopen(int fd) {
    char word[32];
    int flags = fcntl(fd, F_GETFL);
    snprintf(word, sizeof word, "fd-%d", fd);
    self = word;
    int again = open(by_fd(fd), O_RDONLY | O_NONBLOCK);
    printf("read again %d: %s\n", fd, again >= 0 && !reveal(again) ? "done" : strerrorname_np(errno));
    close(again);
    fcntl(fd, F_SETFL, flags | O_NONBLOCK);
    printf("read %d: %s\n", fd, !reveal(fd) ? "done" : strerrorname_np(errno));
    fcntl(fd, F_SETFL, flags);
    again = open(by_fd(fd), O_WRONLY | O_TRUNC | O_NONBLOCK);
    printf("truncate again %d: %s\n", fd, again >= 0 && !ftruncate(again, 0) ? "done" : strerrorname_np(errno));
    close(again);
    printf("truncate %d: %s\n", fd, !ftruncate(fd, 0) ? "done" : strerrorname_np(errno));
    printf("seek %d: %s\n", fd, lseek(fd, 0, SEEK_SET) == 0 ? "done" : strerrorname_np(errno));
}

static void descriptors(void) {
    int open_now[1024], many = 0;
    char aim[LONG];
    DIR *all = opendir("/proc/self/fd");
    for (struct dirent *one; (one = readdir(all)) && many < 1024;)
        if (one->d_name[0] != '.' && atoi(one->d_name) != dirfd(all)) open_now[many++] = atoi(one->d_name);
    closedir(all);
    for (int i = 0; i < many; i++) {
        ssize_t size = readlink(by_fd(open_now[i]), aim, LONG - 1);
        aim[size < 0 ? 0 : size] = 0;
        printf("fd %d is %s\n", open_now[i], aim);
    }
    for (int i = 0; i < many; i++) reopen(open_now[i]);
}

static int order(char **words, int length) {
    const char *verb = words[0];
    int places = 1;
    while (places < length && strcmp(words[places], "-")) places++;
    for (int i = 1; i < places || (i == 1 && length == 1); i++) {
        const char *path = length == 1 ? "" : words[i];
        if (!strcmp(verb, "list")) for (int n = 0; n < count; n++) printf("%c %s\n", known[n].kind, known[n].name);
        else if (!strcmp(verb, "make")) { if (make_bait(path, 1)) return 1; }
        else if (!strcmp(verb, "makes")) {
            mkdir(path, 0755);
            for (int n = 0; n < count; n++) if (make_bait(join(path, known[n].name), 0)) return 1;
        } else if (!strcmp(verb, "attack") || !strcmp(verb, "unshared")) {
            int is_unshared = !strcmp(verb, "unshared");
            printf("at %s%s\n", path, is_unshared ? " unshared" : "");
            look_at(path);
            for (int n = places + 1; n < length; n++) try(words[n], is_unshared);
            for (int n = 0; n < count && places == length; n++) try(known[n].name, is_unshared);
        } else if (!strcmp(verb, "each")) {
            printf("at %s\n", path);
            for (int n = 0; n < count; n++) { look_at(join(path, known[n].name)); try(known[n].name, 0); }
        } else if (!strcmp(verb, "handle")) {
            if (find_handle(path)) return 1;
            printf("%d:", handle.head.handle_type);
            for (unsigned n = 0; n < handle.head.handle_bytes; n++) printf("%02x", handle.head.f_handle[n]);
        } else if (!strcmp(verb, "hold")) hold(path);
        else if (!strcmp(verb, "scribble")) scribble_below(path, 0);
        else if (!strcmp(verb, "descriptors")) descriptors();
        else if (!strcmp(verb, "is-root")) printf("setuid-run: %s\n", geteuid() ? "EPERM" : "done");
        else if (!strcmp(verb, "wait")) { printf("the end\n"); fflush(stdout); for (;;) pause(); }
        else return fprintf(stderr, "hostile: no such word: %s\n", verb), 2;
    }
    return 0;
}

int main(int argc, char **argv) {
    umask(0);
    setvbuf(stdout, NULL, _IOLBF, 0);
    attempt();
    for (int from = 1, to; from < argc; from = to + 1) {
        for (to = from; to < argc && strcmp(argv[to], "then"); to++);
        int failed = order(argv + from, to - from);
        if (failed) return failed;
    }
    return 0;
}
