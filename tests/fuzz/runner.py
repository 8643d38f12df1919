"""Runs cases in processes that may crash or hang, and keeps what became of each in a file of JSON lines.

A process runs many cases, as starting one takes longer than a case; one that dies or takes too long is a finding, and
another takes its place.
"""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .cases import Case

LIMIT = 600.0
# Cases that one process runs before it is replaced: what compilers keep adds up.
LIFETIME = 60

# Of so many cases one is compiled.
COMPILED = 10

Record = dict[str, Any]


class Worker:
    """A process that runs one case after another."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.done = 0
        self.errors = Path(tempfile.mkstemp(suffix=".err")[1])

    def run(self, case: Case, number: int = 1, interpret: bool = False, limit: float = LIMIT) -> Record:
        """What became of a case: `kind`, `detail`, `seen`, and the `seconds` that it took."""
        if self.process is None or self.done >= LIFETIME:
            self.close()
            self._start()
        assert self.process is not None and self.process.stdin is not None
        self.done += 1
        self.process.stdin.write(
            (json.dumps({"case": case.to_json(), "number": number, "interpret": interpret}) + "\n").encode()
        )
        self.process.stdin.flush()
        stage, start = "start", time.time()
        while True:
            message = self._hear(start + limit - time.time())
            if message is None or "kind" in message:
                break
            stage = message.get("stage", stage)
        if message is not None:
            return message
        died = self.process.poll()
        what = "hangs" if died is None else f"ends the process with {died}"
        self.close()
        kind = {"torch's": "torch's", "inductor's": "inductor's"}.get(stage, "hang" if died is None else "dead process")
        return {"kind": kind, "detail": f"{stage}: {what}", "seen": [], "seconds": round(time.time() - start, 1)}

    def _start(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
            # Plans are kept from one compilation of a case to the next, and of no other run.
            "XCONV_FX_CACHE": str(self.errors.with_suffix(".cache")),
        }
        command = [sys.executable, "-W", "ignore", "-m", "fuzz.worker"]
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, bufsize=0
            )
        self.done = 0
        self.rest = b""
        if self._hear(LIMIT) is None:
            raise RuntimeError(f"no worker starts: {self.errors.read_text()[-2000:]}")

    def _hear(self, seconds: float) -> Record | None:
        """The next message; None when none comes in so many seconds, or none can come any more."""
        assert self.process is not None and self.process.stdout is not None
        end = time.time() + seconds
        while b"\n" not in self.rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.time()))
            part = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            if not part:
                if ready:
                    self.process.wait()
                return None
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def interpreted(number: int) -> bool:
    """Whether a case is interpreted instead of compiled: most are, at a fifth of the cost."""
    return number % COMPILED != 0


def run_all(cases: Iterable[tuple[int, Case]], jobs: int, keep: Callable[[int, Case, Record], None]) -> None:
    """Run numbered cases on so many processes; `keep` is called with each as it ends, one call at a time."""
    waiting: queue.SimpleQueue[tuple[int, Case]] = queue.SimpleQueue()
    for item in cases:
        waiting.put(item)
    lock = threading.Lock()

    def serve() -> None:
        worker = Worker()
        try:
            while True:
                try:
                    number, case = waiting.get_nowait()
                except queue.Empty:
                    return
                record = worker.run(case, number, interpreted(number))
                with lock:
                    keep(number, case, record)
        finally:
            worker.close()

    threads = [threading.Thread(target=serve) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def finished(path: Path) -> dict[int, Record]:
    """The records in a file, by number."""
    if not path.exists():
        return {}
    records = (json.loads(line) for line in path.read_text().splitlines() if line.strip())
    return {record["number"]: record for record in records}
