"""How a stage of gpu.sh goes through its cases: in processes of their own, which another one watches and starts again.

A kernel that writes where it must not takes the process' hold on the GPU with it, and one that never ends the process. Such a
case becomes a row with a `problem`, and a new process goes on with the next. What is measured is on disk at once.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_record import RESULTS, Record, Row, now, show
from gpu_timing import DEVICE, WARM

SKIPPED = 3  # how a stage ends that lacks something, after one line that says what
INCOMPLETE = 4  # ... whose time was up before its cases
LOST = 5  # how a process ends that can do nothing more on the GPU
PROCESSES = max(1, min(8, (os.cpu_count() or 1) // 2))


@dataclass(frozen=True)
class Case:
    """A row: what it is about, and what is seen; `problem` in it makes the stage fail."""

    about: Row
    measure: Callable[[], Row]


@dataclass(frozen=True)
class Stage:
    """`cases` come in the order in which they are missed when time is up; `show` prints what a reader wants of the rows.

    Compiling takes most of the time, on one core a process. So what is not timed is shared by several processes, and what is
    timed is gone through once before, by several that fill the compilers' caches.
    """

    name: str
    cases: Callable[[], Sequence[Case]]
    seconds: float  # after which no case begins
    longest: float = 60.0  # seconds after which a case, and its process, is ended
    show: Callable[[list[Row]], None] = show
    timed: bool = True
    warmed: bool = True

    def main(self, arguments: Sequence[str] | None = None) -> int:
        given = self.options().parse_args(arguments)
        if given.share:
            return self.inside(given)
        start()
        given.records.mkdir(parents=True, exist_ok=True)
        watch = Watch(self, given.seconds)
        try:
            if self.timed and self.warmed and given.processes > 1:
                with tempfile.TemporaryDirectory() as folder:
                    watch.shares(Path(folder), given.processes, warm=True)
            codes = watch.shares(given.records, 1 if self.timed else given.processes)
        finally:
            records = Record.find(given.records, stage=self.name, time=watch.began)
            rows, cases = [row for record in records for row in record.rows], sum(record.run["cases"] for record in records)
            self.show(rows)
            print(f"{self.name}: {len(rows)} of {cases} rows in {given.records}", flush=True)
        if any("problem" in row for row in rows) or any(codes):
            return 1
        return INCOMPLETE if len(rows) < cases else 0

    def options(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(prog=f"gpu_{self.name}.py")
        parser.add_argument("--seconds", type=float, default=self.seconds, help="after which no case begins")
        parser.add_argument("--records", type=Path, default=RESULTS, help="folder of the record")
        parser.add_argument("--processes", type=int, default=PROCESSES, help="that compile beside each other")
        parser.add_argument("--share", help=argparse.SUPPRESS)  # of the cases: 0/2 is every other one
        parser.add_argument("--began", default=now(), help=argparse.SUPPRESS)
        return parser

    def inside(self, given: argparse.Namespace) -> int:
        """The cases of a share that are not in the record yet."""
        until, (first, step) = time.monotonic() + given.seconds, map(int, given.share.split("/"))
        cases = self.cases()[first::step]
        record = Record.begin(given.records, stage=self.name, time=given.began, share=given.share)
        record.run["cases"] = len(cases)
        record.write()
        for case in cases[len(record.rows) :]:
            if time.monotonic() > until:
                break
            record.running(case.about)
            faulthandler.dump_traceback_later(self.longest, exit=True, file=sys.__stderr__)
            row = attempt(case)
            faulthandler.cancel_dump_traceback_later()
            record.add(row)
            if not alive():
                sys.stdout.flush()
                os._exit(LOST)  # what Python would tidy up is lost as well
        return 0


class Watch:
    """Starts the processes of a stage, and starts them again where they die."""

    def __init__(self, stage: Stage, seconds: float) -> None:
        self.stage, self.began, self.seconds, self.start = stage, now(), seconds, time.monotonic()
        self.stopped = threading.Event()
        signal.signal(signal.SIGTERM, self.stop)  # what gpu.sh sends; what was measured is shown

    def stop(self, *_: object) -> None:
        self.stopped.set()
        sys.exit("out of time")

    def shares(self, folder: Path, count: int, warm: bool = False) -> list[int]:
        """The exit codes of so many processes beside each other; those that only warm up have half of the time."""
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(lambda i: self.share(folder, f"{i}/{count}", warm), range(count)))

    def share(self, folder: Path, share: str, warm: bool) -> int:
        command = [sys.executable, sys.argv[0], "--share", share, "--began", self.began, "--records", str(folder)]
        # torch's compiler would start a process a core, in each of these
        environment = {**os.environ, WARM: "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"} if warm else None
        code = 1
        while not self.stopped.is_set():
            left = self.start + self.seconds / (2 if warm else 1) - time.monotonic()
            code = subprocess.run([*command, "--seconds", str(left)], env=environment).returncode
            records = Record.find(folder, stage=self.stage.name, time=self.began, share=share)
            if not records:
                return code
            if about := records[0].run.get("running"):
                most = f"no case may take {self.stage.longest:g} s"
                records[0].add({**about, "problem": f"its process ended with {code} ({most})"})
            elif code != LOST:
                return code
        return code


def attempt(case: Case) -> Row:
    began = time.monotonic()
    try:
        return {**case.about, **case.measure(), "seconds": time.monotonic() - began}
    except Exception as e:  # the next case may still say something
        traceback.print_exc()
        return {**case.about, "problem": problem(e)}


def problem(e: Exception) -> str:
    return f"{type(e).__name__}: {e}".splitlines()[0][:200]


def alive() -> bool:
    """Whether this process can still use the GPU: after an access outside, it cannot."""
    if DEVICE.type == "cpu":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def start() -> None:
    """Names what runs; ends the stage as skipped, with one line, where there is no GPU or no Triton."""
    if DEVICE.type == "cpu":
        print("a dry run on the CPU")
        return
    if not torch.cuda.is_available():
        print(f"this stage needs an NVIDIA GPU; torch {torch.__version__} sees none", flush=True)
        sys.exit(SKIPPED)
    try:
        import triton
    except ImportError as e:
        print(f"this stage needs triton ({e})", flush=True)
        sys.exit(SKIPPED)
    versions = f"torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}"
    print(f"{torch.cuda.get_device_name()}, {versions}", flush=True)
