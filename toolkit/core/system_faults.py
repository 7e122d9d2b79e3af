"""What the system refuses (no space, no permission, a name too long, a folder that is gone), as one sentence with what helps."""

from __future__ import annotations

import errno
import os
import re

from .errors import UserError

SPACE = "Free some space, or give a folder on another disk."
PERMISSION = "Give a file or folder that you may use, or have its permissions changed."
CURES = {
    errno.ENOSPC: SPACE,
    errno.EDQUOT: SPACE,
    errno.EFBIG: SPACE,
    errno.EROFS: "Give a folder that can be written.",
    errno.EACCES: PERMISSION,
    errno.EPERM: PERMISSION,
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.ENOTDIR: "A part of this path is a file and no folder: give another path.",
    errno.EISDIR: "That is a folder where a file was expected: give another path.",
    errno.EEXIST: "Something else is there by that name: give another path.",
    errno.ENOTEMPTY: "Something else is there by that name: give another path.",
    errno.ENOENT: "It is not there, or was deleted meanwhile: check the path.",
    errno.ELOOP: "It is a link to itself: give another path.",
    errno.ENXIO: "That is no file: give another path.",
    errno.ENODEV: "That is no file: give another path.",
    errno.EINVAL: "That is no file that can be used so: give another path.",
    errno.EIO: "The disk, or the network before it, has a fault: give a folder on another one.",
    errno.ESTALE: "The disk, or the network before it, has a fault: give a folder on another one.",
    errno.EBUSY: "Another program has it open: close that, or give another path.",
    errno.EMFILE: "More files are open than this shell allows: raise it with `ulimit -n 4096` and try again.",
    errno.ENFILE: "More files are open than this machine allows: close other programs and try again.",
    errno.EAGAIN: "No more processes can be started here: close other programs, or raise the limit (`ulimit -u`).",
    errno.EPIPE: "Whoever read it is gone.",
}
OF_ERROR = re.compile(r"\[Errno (\d+)\]")  # as shutil writes it, of several files
INNER = re.compile(r"\(os error (\d+)\)")  # of what is written in Rust


def to_user_error(error: BaseException | None) -> UserError | None:
    """The sentence for an exception, or one that led to it, by which the system refused something; None for any other."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        if isinstance(error, UnicodeEncodeError):
            return UserError(
                f"{error.object[:200]!a} holds a character that cannot be written as text: rename that file or folder."
            )
        number = error_number(error)
        if number in CURES:
            return UserError(describe(error, number))
        error = error.__cause__ or error.__context__
    return None


def error_number(error: BaseException) -> int | None:
    """The system's number of what it refused, where an exception says one."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = INNER.search(str(error)) or (OF_ERROR.search(str(error)) if isinstance(error, OSError) else None)
    return int(found.group(1)) if found else None


def reason(error: BaseException) -> str:
    """What the system said, in its words."""
    number = error_number(error)
    return str(error) if number is None else os.strerror(number)


def describe(error: BaseException, number: int) -> str:
    """What the system said of which file, and the cure."""
    said = os.strerror(number)
    name = getattr(error, "filename", None)
    if name is None and number == errno.ENOENT and isinstance(error, FileNotFoundError):
        return (
            f"{said}: the folder that this was started in may have been deleted. Change to another (cd) and try again."
        )
    shown = "" if name is None or isinstance(name, int) else f"{os.fsdecode(name)}: "
    return f"{shown[:400]}{said}. {CURES[number]}"
