"""What a script needs before its slow imports. Every script imports this first; it takes Python's own library alone.

- An old Python is told in one line, not by a traceback out of syntax that it does not know.
- Ctrl-C while packages are imported ends the script in one line, too; `cli.terminal.run` takes over from there.
- Python looks for garbage again and again among the million objects that importing PyTorch makes, and when they go: a
  third of that time. Not here: `cli.terminal` ends with `gc.freeze`, which sets them apart for good.
"""

import gc
import os
import signal
import sys

OLDEST = (3, 10)

if sys.version_info < OLDEST:
    sys.stderr.write("Python %d.%d or newer is wanted; this is %s\n" % (*OLDEST, sys.version.split()[0]))  # noqa: UP031
    sys.exit(2)

try:
    os.getcwd()
except OSError:  # a library of torch's ends the process without it, and says something else
    sys.stderr.write("the working directory is gone; cd to one that is there\n")
    sys.exit(2)


def stop(number, frame):
    sys.stderr.write("\nstopped; no half-written file is left\n")
    sys.stderr.flush()
    os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where Ctrl-C is ignored, as under nohup
    signal.signal(signal.SIGINT, stop)

gc.disable()
