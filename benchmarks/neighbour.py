"""What `python sample.py` (the bundled model) takes beside a busy neighbour, in seconds.

    python -m benchmarks.neighbour --repeats 3

The neighbours are started here: nothing, a loop in Python, and another PyTorch process that multiplies matrices on all cores.
Each time is that of a whole process. A user's OMP_NUM_THREADS is obeyed: `OMP_NUM_THREADS=2 python -m benchmarks.neighbour`.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from statistics import median

from benchmarks.command import ROOT

NEIGHBOURS = {
    "alone": None,
    "beside a loop in Python": "while True: pass",
    "beside a PyTorch process": "import torch\na = torch.randn(512, 512)\nwhile True: a = (a @ a).tanh()",
}


def run() -> float:
    """Seconds of one whole command."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [sys.executable, str(ROOT / "sample.py"), "--output", folder]
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    args = parser.parse_args()
    run()  # compiles what Python has not compiled yet
    for name, code in NEIGHBOURS.items():
        busy = subprocess.Popen([sys.executable, "-c", code]) if code else None
        try:
            time.sleep(5 if busy else 0)  # until it is at work
            seconds = sorted(run() for _ in range(args.repeats))
        finally:
            if busy:
                busy.kill()
                busy.wait()
        print(f"{name:26} median {median(seconds):6.1f} s   ({seconds[0]:.1f} to {seconds[-1]:.1f})", flush=True)


if __name__ == "__main__":
    main()
