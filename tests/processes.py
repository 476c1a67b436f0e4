"""Processes of their own, forked off one that has imported PyTorch and nothing of ours: starting anew takes seconds each."""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
# With what PyTorch imports at the first step of an optimiser and the first process group.
SERVER.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed"])


OUTPUTS = tempfile.TemporaryDirectory()


@dataclass(frozen=True)
class Started:
    process: BaseProcess
    out: Path  # what it writes to stdout
    err: Path

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def ended(self, timeout: float = 200) -> subprocess.CompletedProcess:
        self.process.join(timeout)
        assert self.poll() is not None, f"still running after {timeout} s: {self.err.read_text()}"
        return subprocess.CompletedProcess([], self.poll(), self.out.read_text(), self.err.read_text())


def started(what: Path | str, *flags: object, env: dict[str, str] | None = None, session: bool = False) -> Started:
    """A script, or code as behind `python -c`; `session`: in a session of its own, so that its group can be signalled."""
    out, err = (Path(tempfile.mkstemp(dir=OUTPUTS.name)[1]) for _ in range(2))
    arguments = (what, list(map(str, flags)), dict(env or os.environ), os.getcwd(), session, out, err)
    process = SERVER.Process(target=run, args=arguments)
    process.start()
    return Started(process, out, err)


def run(what: Path | str, flags: list[str], env: dict[str, str], cwd: str, session: bool, out: Path, err: Path) -> None:
    if session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    execute(what, flags)


def execute(what: Path | str, flags: list[str]) -> None:
    sys.argv = [str(what), *flags]
    if isinstance(what, Path):
        runpy.run_path(str(what), run_name="__main__")
    else:
        exec(what, {"__name__": "__main__"})  # noqa: S102, our own


def torchrun(count: int, script: Path, *flags: object) -> None:
    """What `torchrun --standalone --nproc-per-node` does, but that its processes are forked off, too."""
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    where = {"run_id": "test", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    how = LaunchConfig(1, 1, count, **where, max_restarts=0, monitor_interval=0.1, start_method="forkserver")
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        elastic_launch(how, execute)(script, list(map(str, flags)))
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)


def environment(rank: int, port: int) -> dict[str, str]:
    """As torchrun starts each of two processes."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return os.environ | {key: str(value) for key, value in told.items()}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
