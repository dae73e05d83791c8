"""A checkpoint written beside its target takes its place in one step."""

import os
import pathlib
import shutil

from jaxquant.storage._companions import FOLDER as COMPANIONS
from jaxquant.storage._manifest import MANIFEST, Manifest, manifest_text


def check_target(target: pathlib.Path, overwrite: bool) -> None:
    """Refuses to write over what is there, unless asked to and it is a checkpoint."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{target}: exists; pass overwrite=True to replace it")
    if not (target / MANIFEST).is_file():
        raise FileExistsError(f"{target}: exists and is no checkpoint; overwrite=True replaces checkpoints only")


def staging_folder(target: pathlib.Path) -> pathlib.Path:
    """Where a checkpoint is written before it counts: beside its target, hidden."""
    return target.with_name(f".{target.name}.partial")


def publish(staged: pathlib.Path, target: pathlib.Path, manifest: Manifest) -> None:
    """Makes a staged store the checkpoint at `target` in one atomic step.

    Args:
        staged: holds the manifest's shards.
        target: absent or empty, or an old checkpoint, which stays whole until the new manifest takes its place.
        manifest: the new checkpoint's.
    """
    _write_synced(staged / MANIFEST, manifest_text(manifest))
    if not (target / MANIFEST).exists():
        os.rename(staged, target)
    else:
        names = {shard.name for shard in manifest.shards}
        for name in names:
            os.rename(staged / name, target / name)
        shutil.rmtree(target / COMPANIONS, ignore_errors=True)
        if (staged / COMPANIONS).exists():
            os.rename(staged / COMPANIONS, target / COMPANIONS)
        os.replace(staged / MANIFEST, target / MANIFEST)
        for old in target.glob("arrays-*"):
            if old.name not in names:
                shutil.rmtree(old)
    _sync_folder(target.parent)


def _write_synced(file: pathlib.Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
