"""On PYTHONPATH, this makes rankfold's modules believe that the system is not POSIX, in every process that is started so.

To modules whose name begins with rankfold the modules and attributes that Windows lacks do not exist; the libraries keep them, since
theirs on Windows are others. Processes are spawned, not forked, and reading or writing text without naming an encoding is an error.
"""

import builtins
import multiprocessing
import os
import signal
import socket
import sys
import time
import types
import warnings

MODULES = set(
    [
        "resource",
        "fcntl",
        "pwd",
        "grp",
        "spwd",
        "crypt",
        "termios",
        "tty",
        "pty",
        "curses",
        "readline",
        "syslog",
        "posix",
        "nis",
    ]
)
LACKING = {
    os: """fork forkpty getuid geteuid getgid getegid getgroups getpgid getpgrp getsid setsid setuid setgid setpgid killpg chown
        lchown fchown fchmod chroot mkfifo mknod nice uname wait wait3 wait4 waitid sysconf confstr getloadavg sched_getaffinity
        sched_setaffinity sched_yield posix_spawn pread pwrite readv writev sendfile sync fdatasync openpty ttyname statvfs fstatvfs
        getxattr listxattr setxattr memfd_create register_at_fork O_NONBLOCK O_NOFOLLOW O_DIRECTORY O_CLOEXEC O_SYNC O_DSYNC O_NOCTTY
        WNOHANG WIFEXITED WIFSIGNALED WEXITSTATUS WTERMSIG tcgetpgrp ctermid getpriority setpriority posix_fallocate""",
    signal: """SIGKILL SIGHUP SIGUSR1 SIGUSR2 SIGQUIT SIGALRM SIGCHLD SIGPIPE SIGSTOP SIGCONT SIGTSTP SIGTTIN SIGTTOU alarm pause
        setitimer getitimer pthread_kill pthread_sigmask sigwait sigpending siginterrupt""",
    socket: "AF_UNIX socketpair_unix SCM_RIGHTS send_fds recv_fds",
    time: "tzset clock_gettime clock_settime pthread_getcpuclockid",
}


class Without(types.ModuleType):
    """A module as it is elsewhere."""

    def __init__(self, whole, names):
        super().__init__(whole.__name__)
        self.__dict__.update(whole=whole, names=frozenset(names.split()))

    def __getattr__(self, name):
        if name in self.__dict__["names"]:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on this system")
        return getattr(self.__dict__["whole"], name)


SEEN = {whole.__name__: Without(whole, names) for whole, names in LACKING.items()}
plain_import = builtins.__import__


def elsewhere(name, globals=None, locals=None, fromlist=(), level=0):
    whose = globals or {}
    ours = f"{whose.get('__package__') or whose.get('__name__')}.".startswith("rankfold.")
    if ours and level == 0:
        if name.partition(".")[0] in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r} on this system", name=name)
        if name in SEEN:
            return SEEN[name]
    return plain_import(name, globals, locals, fromlist, level)


builtins.__import__ = elsewhere
multiprocessing.set_start_method("spawn")
if sys.flags.warn_default_encoding:
    warnings.filterwarnings("ignore", category=EncodingWarning)  # the libraries' own affair
    warnings.filterwarnings("error", category=EncodingWarning, module=r"rankfold\.")
