// The first process of a test kernel. It loads modules, mounts what its record file names below the host's root, runs
// one command there with a deadline, and ends the machine with the command's exit code (isa-debug-exit). It ends the
// machine on every path: a kernel whose init returns panics, and one whose init hangs is ended by the host only.
//
// /records holds NUL-terminated records of tab-separated fields:
//   module PATH | share TAG DIR ro|rw|overlay | tmpfs DIR MIB | arg TEXT | env TEXT | cwd DIR | deadline SECONDS
// A DIR is absolute in the host's root; the share whose DIR is / comes first, and what is a tmpfs before what lies in it.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { kExitPort = 0xf4, kOwnFailure = 125, kTimedOut = 124, kMostCode = 127, kMostRecords = 512 };
static const char* const kRoot = "/host";

static void end(int code) {
  fflush(NULL);
  if (ioperm(kExitPort, 1, 1) == 0) outb((unsigned char)(code > kMostCode ? kMostCode : code), kExitPort);
  reboot(RB_POWER_OFF);
  for (;;) pause();
}

static void fail(const char* what, const char* of) {
  fprintf(stderr, "init: %s %s: %s\n", what, of, strerror(errno));
  end(kOwnFailure);
}

static void make_directories(const char* path) {
  char partial[4096];
  snprintf(partial, sizeof partial, "%s", path);
  for (char* at = partial + 1; *at != '\0'; ++at) {
    if (*at != '/') continue;
    *at = '\0';
    (void)mkdir(partial, 0755);
    *at = '/';
  }
  (void)mkdir(partial, 0755);
}

static const char* below_root(const char* path) {
  static char joined[4096];
  snprintf(joined, sizeof joined, "%s%s", kRoot, strcmp(path, "/") == 0 ? "" : path);
  return joined;
}

static void load(const char* path) {
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail("open", path);
  if (syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST) fail("load", path);
  close(fd);
}

static void mount_share(const char* tag, const char* path, const char* how) {
  static int overlays = 0;
  // `loose`: nobody changes what the host shows while this kernel runs. One that is written to is seen there at once.
  const int writable = strcmp(how, "rw") == 0;
  char options[256];
  snprintf(options, sizeof options, "trans=virtio,version=9p2000.L,msize=512000,cache=%s",
           writable ? "mmap" : "loose");
  const unsigned long flags = writable ? 0 : MS_RDONLY;
  const char* target = below_root(path);
  make_directories(target);
  if (strcmp(how, "overlay") != 0) {
    if (mount(tag, target, "9p", flags, options) != 0) fail("mount", path);
    return;
  }
  char base[64];
  char lower[96];
  char directories[512];
  snprintf(base, sizeof base, "/overlay%d", overlays++);
  snprintf(lower, sizeof lower, "%s-lower", base);
  make_directories(base);
  make_directories(lower);
  if (mount("tmpfs", base, "tmpfs", 0, "mode=755") != 0) fail("mount", base);
  if (mount(tag, lower, "9p", flags, options) != 0) fail("mount", lower);
  snprintf(directories, sizeof directories, "%s/upper", base);
  make_directories(directories);
  snprintf(directories, sizeof directories, "%s/work", base);
  make_directories(directories);
  snprintf(directories, sizeof directories, "lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lower, base,
           base);
  if (mount("overlay", target, "overlay", 0, directories) != 0) fail("mount overlay", path);
}

static void mount_tmpfs(const char* path, const char* mebibytes) {
  char options[64];
  snprintf(options, sizeof options, "mode=1777,size=%sm", mebibytes);
  make_directories(below_root(path));
  if (mount("tmpfs", below_root(path), "tmpfs", 0, options) != 0) fail("mount tmpfs", path);
}

static void loopback_up(void) {
  struct ifreq request;
  memset(&request, 0, sizeof request);
  strcpy(request.ifr_name, "lo");
  request.ifr_flags = IFF_UP | IFF_RUNNING;
  const int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) != 0) fail("set up", "lo");
  close(fd);
}

static void write_file(const char* path, const char* text) {
  const int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0) return;
  const ssize_t written = write(fd, text, strlen(text));
  (void)written;
  close(fd);
}

static int output(void) {
  const int fd = open("/dev/ttyS1", O_WRONLY | O_NOCTTY);
  if (fd < 0) fail("open", "/dev/ttyS1");
  struct termios raw;
  if (tcgetattr(fd, &raw) != 0) fail("set", "/dev/ttyS1");
  cfmakeraw(&raw);
  cfsetspeed(&raw, B115200);
  if (tcsetattr(fd, TCSANOW, &raw) != 0) fail("set", "/dev/ttyS1");
  return fd;
}

static long now_ms(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

int main(void) {
  static char* arguments[kMostRecords];
  static char* environment[kMostRecords];
  static char text[256 * 1024];
  int argument_count = 0;
  int environment_count = 0;
  const char* directory = "/";
  long deadline_ms = 60 * 1000;

  make_directories("/proc");
  make_directories("/sys");
  make_directories("/dev");
  make_directories(kRoot);
  if (mount("proc", "/proc", "proc", 0, NULL) != 0) fail("mount", "/proc");
  if (mount("sysfs", "/sys", "sysfs", 0, NULL) != 0) fail("mount", "/sys");
  if (mount("devtmpfs", "/dev", "devtmpfs", 0, NULL) != 0 && errno != EBUSY) fail("mount", "/dev");
  const int records = open("/records", O_RDONLY | O_CLOEXEC);
  if (records < 0) fail("open", "/records");
  const ssize_t length = read(records, text, sizeof text - 1);
  if (length <= 0 || length == sizeof text - 1) fail("read", "/records");
  close(records);

  for (char *record = text, *next = NULL; record < text + length; record = next) {
    next = record + strlen(record) + 1;
    char* rest = record;
    const char* kind = strsep(&rest, "\t");
    if (strcmp(kind, "module") == 0) {
      load(rest);
    } else if (strcmp(kind, "share") == 0) {
      const char* tag = strsep(&rest, "\t");
      const char* path = strsep(&rest, "\t");
      mount_share(tag, path, rest);
      if (strcmp(path, "/") == 0) {
        if (mount("proc", below_root("/proc"), "proc", 0, NULL) != 0) fail("mount", "/proc");
        if (mount("sysfs", below_root("/sys"), "sysfs", 0, NULL) != 0) fail("mount", "/sys");
        if (mount("/dev", below_root("/dev"), NULL, MS_BIND, NULL) != 0) fail("mount", "/dev");
      }
    } else if (strcmp(kind, "tmpfs") == 0) {
      const char* path = strsep(&rest, "\t");
      mount_tmpfs(path, rest);
    } else if (strcmp(kind, "arg") == 0 && argument_count < kMostRecords - 1) {
      arguments[argument_count++] = rest;
    } else if (strcmp(kind, "env") == 0 && environment_count < kMostRecords - 1) {
      environment[environment_count++] = rest;
    } else if (strcmp(kind, "cwd") == 0) {
      directory = rest;
    } else if (strcmp(kind, "deadline") == 0) {
      deadline_ms = atol(rest) * 1000;
    } else {
      errno = EINVAL;
      fail("record", kind);
    }
  }
  loopback_up();
  if (argument_count == 0) end(0);
  // A process that dies by a signal, as many tests want it, leaves nothing behind.
  write_file("/proc/sys/kernel/core_pattern", "|/nonexistent");
  const int out = output();

  sigset_t child_signal;
  sigemptyset(&child_signal);
  sigaddset(&child_signal, SIGCHLD);
  sigprocmask(SIG_BLOCK, &child_signal, NULL);
  const pid_t command = fork();
  if (command < 0) fail("fork", arguments[0]);
  if (command == 0) {
    sigprocmask(SIG_UNBLOCK, &child_signal, NULL);
    setsid();
    const struct rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    const int nothing = open("/dev/null", O_RDONLY);
    if (chroot(kRoot) != 0 || chdir(directory) != 0 || nothing < 0 || dup2(nothing, 0) < 0 ||
        dup2(out, 1) < 0 || dup2(out, 2) < 0) {
      dprintf(out, "init: cannot enter %s: %s\n", directory, strerror(errno));
      _exit(kOwnFailure);
    }
    execve(arguments[0], arguments, environment);
    dprintf(out, "init: cannot run %s: %s\n", arguments[0], strerror(errno));
    _exit(kOwnFailure);
  }

  const long until = now_ms() + deadline_ms;
  int code = -1;
  while (code < 0) {
    const long left = until - now_ms();
    if (left <= 0) {
      dprintf(out, "\ninit: not done after %ld s\n", deadline_ms / 1000);
      code = kTimedOut;
      break;
    }
    const struct timespec wait_for = {left / 1000, left % 1000 * 1000000};
    (void)sigtimedwait(&child_signal, NULL, &wait_for);
    int status = 0;
    for (pid_t gone = 0; (gone = waitpid(-1, &status, WNOHANG)) > 0;) {
      if (gone != command) continue;
      code = WIFEXITED(status) ? WEXITSTATUS(status) : kMostCode;
      if (WIFSIGNALED(status)) dprintf(out, "\ninit: ended by signal %d\n", WTERMSIG(status));
    }
  }
  tcdrain(out);
  end(code);
}
