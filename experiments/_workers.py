"""Run many small GPU measurements in processes of their own, so that a kernel that hangs or crashes costs only itself.

Each worker compiles on its own core and takes turns at the device (`device_turn`), so timings do not disturb one
another.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time


@contextlib.contextmanager
def device_turn():
    """Hold the device: only one worker measures at a time; a killed worker's turn ends with it."""
    with open(os.environ["EXPERIMENTS_TURN_FILE"], "w") as file:
        stage("waiting for the device")
        fcntl.flock(file, fcntl.LOCK_EX)
        stage("at the device")
        yield
    stage("off the device")


def stage(name: str):
    """Tell the parent what the worker is at: what a worker that hangs at the device was doing."""
    print("STAGE " + name, flush=True)


def serve(handle):
    """The worker's side: read items from standard input, one JSON object a line, answer each with a line."""
    for line in sys.stdin:
        item = json.loads(line)
        try:
            result = handle(item)
        except Exception as error:  # a failed measurement is a result
            result = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"}
        print("RESULT " + json.dumps(item | result), flush=True)


def run(
    module: str,
    items: list[dict],
    *,
    workers: int,
    seconds: float,
    stall: float = 45.0,
    patience: float = 150.0,
    kin=None,
    on_result=None,
) -> list[dict]:
    """Share items out to worker processes (`python -m module --worker`) and collect their answers.

    Args:
      module: module whose `--worker` flag calls `serve`.
      items: JSON objects, most wanted first.
      workers: processes.
      seconds: give up what is left after this long.
      stall: an item that stays at one stage at the device for longer is recorded as hung, its worker killed and
        replaced. Compiling and waiting for the device do not count.
      patience: an item that stays at any other stage for longer is given up likewise.
      kin: of an item, a key; once an item hangs, the others of its key are not tried.
      on_result: called with each answer as it comes.
    """
    deadline, queue, results = time.monotonic() + seconds, list(items), []
    limits = {True: stall, False: patience}
    with tempfile.TemporaryDirectory() as folder:
        turn = str(pathlib.Path(folder) / "turn")
        environment = os.environ | {"EXPERIMENTS_TURN_FILE": turn, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        pool = [_Worker(module, environment) for _ in range(min(workers, len(items)))]
        try:
            while (queue or any(w.item for w in pool)) and time.monotonic() < deadline:
                for i, worker in enumerate(pool):
                    answer = worker.poll(limits)
                    if answer is not None:
                        results.append(answer)
                        if kin and answer.get("error", "").startswith("hung"):
                            queue = [item for item in queue if kin(item) != kin(answer)]
                        if on_result:
                            on_result(answer)
                    if worker.dead:
                        pool[i] = worker = _Worker(module, environment)
                    if worker.item is None and queue:
                        worker.give(queue.pop(_choose(queue, worker, pool)))
                time.sleep(0.01)
        finally:
            for worker in pool:
                worker.kill()
    return results


def _problem(item: dict | None) -> tuple | None:
    return item and (item.get("shape"), item.get("m"))


def _choose(queue: list[dict], worker: "_Worker", pool: list["_Worker"]) -> int:
    """An item of the problem that the worker has in memory, else one of a problem that nobody is at, else the first."""
    busy = {w.problem for w in pool}
    for wanted in (lambda p: p == worker.problem, lambda p: p not in busy):
        for i, item in enumerate(queue):
            if wanted(_problem(item)):
                return i
    return 0


_OFF_DEVICE = ("preparing", "waiting for the device", "off the device")


class _Worker:
    """One process and the item it is at."""

    def __init__(self, module: str, environment: dict):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, "--worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment,
        )  # fmt: skip
        os.set_blocking(self._process.stdout.fileno(), False)
        self._buffer, self.item, self.problem, self.dead = "", None, None, False
        self._stage, self._since, self._at_device = "starting", 0.0, False

    def give(self, item: dict):
        self.item, self.problem = item, _problem(item)
        self._enter("preparing")
        try:
            self._process.stdin.write(json.dumps(item) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # poll reports the crash

    def _enter(self, stage: str):
        self._stage, self._since = stage, time.monotonic()
        self._at_device = stage == "at the device" or (self._at_device and stage not in _OFF_DEVICE)

    def poll(self, limits: dict[bool, float]) -> dict | None:
        """The answer to the current item, if there is one by now."""
        with contextlib.suppress(TypeError, BlockingIOError):
            self._buffer += self._process.stdout.read() or ""
        while "\n" in self._buffer:
            line, self._buffer = self._buffer.split("\n", 1)
            if line.startswith("STAGE "):
                self._enter(line.removeprefix("STAGE "))
            if line.startswith("RESULT "):
                self.item, answer = None, json.loads(line.removeprefix("RESULT "))
                if "CUDA" in answer.get("error", ""):  # A fault leaves the process no use of the device.
                    self.dead = True
                    self.kill()
                return answer
        if self.item is None:
            return None
        if self._process.poll() is not None:
            self._errors.seek(0)
            last_words = self._errors.read().decode(errors="replace").strip()[-300:]
            return self._fail(f"crashed (exit {self._process.returncode}): {last_words}")
        if time.monotonic() - self._since > limits[self._at_device]:
            return self._fail(f"{'hung' if self._at_device else 'given up'}: {self._stage}")
        return None

    def _fail(self, why: str) -> dict:
        answer, self.item, self.dead = self.item | {"error": why}, None, True
        self.kill()
        return answer

    def kill(self):
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):
                file.close()
