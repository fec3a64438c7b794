"""How every command of every room ends: its exit code, and one line where something went wrong.

0 success, 1 an error that the user can mend, 2 wrong usage (argparse), 130 interrupted. Anything
else is a bug and keeps its traceback.
"""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable

from runtime.errors import FieldfitError

MACHINE_ERRORS = {
    errno.ENOSPC: "the disk is full; make room and run the same command again",
    errno.EDQUOT: "the disk quota is used up; make room and run the same command again",
    errno.EFBIG: "the file may not grow so large here; raise the limit (ulimit -f)",
    errno.EACCES: "no permission; check who owns the folder",
    errno.EPERM: "no permission; check who owns the folder",
    errno.EROFS: "the file system is read-only",
}
"""What a machine can refuse to any program: no bug of ours, and no traceback helps."""

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with(parent: int) -> None:
    """Let this process die when ``parent`` does: SIGKILL included, and while it is stopped, too.

    Raises OSError where the kernel refuses. (prctl(2), PR_SET_PDEATHSIG)
    """
    import ctypes  # for the few programs that ask; the others start without

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it has ended before it could be asked for
        os._exit(1)


def run_command(program: str, run: Callable[[], int], *, interrupted: str = "interrupted") -> int:
    """Call ``run`` and return its exit code, or that of what it raised.

    ``interrupted`` is what Ctrl-C leaves behind, in words.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that a terminal cannot show is no error
            stream.reconfigure(errors="backslashreplace")
    code = 1
    try:
        return run()
    except FieldfitError as error:
        message = str(error)
    except KeyboardInterrupt:
        code, message = 130, interrupted
    except BrokenPipeError:  # `fieldfit classify ... | head` is no error
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise
        place = error.filename or "writing results"
        message = f"{place}: {error.strerror}: {MACHINE_ERRORS[error.errno]}"
    # Only now are the frames gone that the exception held, and with them the progress bars of
    # generators that stopped half-way: what they print comes first, this line last.
    # In one write: print() makes two where Python is unbuffered, as under torchrun and in most
    # containers, and the line of another process that shares the stream may come between them.
    sys.stderr.write(f"{program}: {message}\n")
    return code
