"""`gap-export serve` as a process: started on a core of its own, asked for its metrics, weighed, ended."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

START_SECONDS = 180.0
"""Within which a server must be ready: it lints four graphs and answers its golden request first."""
_HERE = Path(__file__).resolve().parent
ALTERED = _HERE / "altered.py"
"""Starts the same server with a leak, or with slow steps."""


def cores() -> tuple[int, int] | None:
    """(core of the server, core of the clients); None where this process has but one, and then times say nothing."""
    available = sorted(os.sched_getaffinity(0))
    return (available[0], available[1]) if len(available) > 1 else None


@contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """This thread, and processes that it starts meanwhile, run on one core alone.

    Args:
        core: that core; None changes nothing.
    """
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def free_port() -> int:
    """A port that none listens on by now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServerProcess:
    """A server; `with` ends it.

    Args:
        bundle: its folder.
        options: further ones of the command.
        port: that it listens on; any that is free where left out.
        core: that it runs on; None for all.
        program: in place of `-m gap_export`.

    Attributes:
        port: that it listens on.
    """

    def __init__(
        self,
        bundle: Path,
        *options: str,
        port: int | None = None,
        core: int | None = None,
        program: Sequence[str] = ("-m", "gap_export"),
    ) -> None:
        self.port = port or free_port()
        self._lines: list[str] = []
        command = [sys.executable, *program, "serve", str(bundle), "--port", str(self.port), *options]
        with pinned(core):
            self._process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        self._ready = threading.Event()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def wait_ready(self) -> None:
        """Wait until it has shown that it is right.

        Raises:
            SystemExit: it ended, or takes too long; with what it said last.
        """
        ends = time.monotonic() + START_SECONDS
        while not self._ready.wait(0.02):
            if self.exit_code is not None or time.monotonic() > ends:
                self.end()
                said = "\n".join(self._lines[-5:])
                raise SystemExit(f"the server did not become ready: {said}")

    def wait_listening(self) -> None:
        """Wait until connections are accepted, before it is ready.

        Raises:
            SystemExit: it ended, or takes too long.
        """
        ends = time.monotonic() + START_SECONDS
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
                return
            if self.exit_code is not None or time.monotonic() > ends:
                raise SystemExit(f"the server does not listen: {self._lines[-1:]}")
            time.sleep(0.02)

    def rss_bytes(self) -> int:
        """Resident memory of the process and of those that it has started."""
        return sum(_rss_bytes(pid) for pid in (self.pid, *_children(self.pid)))

    def cpu_seconds(self) -> float:
        """Processor time of the process so far, its children left out."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def wait(self, seconds: float) -> int | None:
        """Wait until it has ended.

        Args:
            seconds: to wait at most.

        Returns:
            Its exit code; None where it runs on.
        """
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        """End it, whatever it does."""
        if self.exit_code is None:
            self._process.kill()
            self._process.wait()
        self._reading.join(5.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _read(self) -> None:
        """Its lines are read as they come, so that it never waits for a reader; the last are kept."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.strip() == "ready":
                self._ready.set()
            self._lines.append(line.rstrip())
            del self._lines[:-20]


def ensure_bundle(scratch: Path) -> Path:
    """The bundle that is served: the bundled model, whose requests choose their share of the visual tokens.

    Args:
        scratch: folder of bundles, where an earlier run's is found again.
    """
    folder = scratch / "bundle-serve"
    if not (folder / "golden.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        scratch.mkdir(parents=True, exist_ok=True)
        command = ["-m", "gap_export", "build", "--model", "shapes", "--keep", "0.1:0.25:1.0", "--output"]
        subprocess.run([sys.executable, *command, str(folder)], check=True, stdout=subprocess.DEVNULL)
    return folder


def _rss_bytes(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            own = list(map(int, (task / "children").read_text().split()))
            found += [*own, *(child for each in own for child in _children(each))]
    return found
