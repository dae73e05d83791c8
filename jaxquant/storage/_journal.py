"""What of a conversion is safely on disk, so that one that was killed goes on.

Results are gathered, then written and noted by a thread of its own while the next leaves are read and quantized.
"""

import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jaxquant.storage._records import Record, Shard
from jaxquant.storage._store import Writer

FLUSH_BYTES = 1 << 26  # results are gathered up to this before they are written and noted
NAME = "journal.jsonl"


class Journal:
    """The leaves done, their arrays, and a file that says which of them are on disk.

    Attributes:
        nodes: the node of each leaf done, by number.
        writer: the arrays, written and gathered.
    """

    def __init__(self, folder: pathlib.Path, key: str):
        """Goes on from the journal in a folder if it has the same key, else starts anew.

        Args:
            folder: of the conversion.
            key: what is converted, how and by whom.

        Raises:
            FileExistsError: another process is at work in the folder.
        """
        self._lock = _lock(folder)
        self._file = folder / NAME
        lines: list[Any] = list(_whole_lines(self._file)) if self._file.is_file() else []
        if not lines or lines[0] != {"key": key}:
            _clear(folder)
            lines = [{"key": key}]
        self.nodes = {int(number): node for line in lines[1:] for number, node in line["nodes"].items()}
        records = [Record.parse(fields) for line in lines[1:] for fields in line["records"]]
        shards = [Shard(name, files) for line in lines[1:] for name, files in line["shards"].items()]
        for left in folder.glob("arrays-*"):
            if left.name not in {shard.name for shard in shards}:
                shutil.rmtree(left)
        _rewrite(self._file, lines)
        self.writer = Writer(folder, records, shards)
        self._noted = len(self.nodes), len(records), len(shards)
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[Shard | None] | None = None
        self._writing_bytes = 0

    def make_room(self, nbytes: float, limit: float) -> None:
        """Waits for what is being written, unless it and `nbytes` more fit into the limit of memory together."""
        if nbytes + self._writing_bytes > limit:
            self._wait()

    def add(self, number: int, node: Any) -> None:
        """Notes a leaf whose arrays the writer has; now and then has everything written out."""
        self.nodes[number] = node
        if self.writer.pending_bytes >= FLUSH_BYTES:
            self.commit()

    def commit(self) -> None:
        """Has the gathered arrays written, and then noted what they belong to; first waits for those before."""
        self._wait()
        nodes, records, shards = self._noted
        line = {
            "nodes": dict(list(self.nodes.items())[nodes:]),
            "records": [dataclasses.asdict(record) for record in self.writer.records[records:]],
            "shards": {shard.name: shard.files for shard in self.writer.shards[shards:]},
        }
        self._noted = len(self.nodes), len(self.writer.records), len(self.writer.shards)
        self._writing_bytes = self.writer.pending_bytes
        self._writing = self._pool.submit(_write, self._file, self.writer.detach(), line)

    def close(self) -> None:
        """Waits for what is being written, and lets others at the folder."""
        try:
            self._wait()
        finally:
            self._pool.shutdown()
            os.close(self._lock)

    def remove(self) -> None:
        """Removes the file, once the arrays belong to a checkpoint."""
        self._file.unlink()

    def _wait(self) -> None:
        if self._writing is None:
            return
        shard, self._writing, self._writing_bytes = self._writing.result(), None, 0
        if shard is not None:
            nodes, records, _ = self._noted
            self.writer.shards.append(shard)
            self._noted = nodes, records, len(self.writer.shards)


def _lock(folder: pathlib.Path) -> int:
    """Makes a folder if need be and keeps others out until the descriptor is closed, by a kill too.

    Two conversions into one folder would remove each other's arrays and mix their lines in the journal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise FileExistsError(f"{folder}: another conversion to the same place is at work; wait for it") from error
    return descriptor


def _clear(folder: pathlib.Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _write(file: pathlib.Path, write: Callable[[], Shard] | None, line: dict[str, Any]) -> Shard | None:
    shard = None if write is None else write()
    if shard is not None:
        line["shards"][shard.name] = shard.files
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    return shard


def _whole_lines(file: pathlib.Path) -> Iterator[Any]:
    """The lines of a journal up to one that its writer did not finish."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            yield json.loads(line if line.endswith("\n") else "")
        except ValueError:
            return


def _rewrite(file: pathlib.Path, lines: list[Any]) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(partial, file)
