"""Finished weights on disk, so that an interrupted run goes on where it stopped."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import numpy as np

from jaxquant.arrays._spec import QuantConfig
from jaxquant.calibration._report import WeightReport
from jaxquant.checkpoint import load, save
from jaxquant.storage._manifest import library_version

RUN = "run.json"


class Finished:
    """The weights that runs into one folder have finished.

    Attributes:
        folder: a checkpoint for each weight, and what the run is.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        """Takes a folder that `open_finished` has checked."""
        self.folder = folder

    def __contains__(self, name: str) -> bool:
        """Whether a weight is finished."""
        return self._place(name).exists()

    def get(self, name: str) -> tuple[Any, WeightReport]:
        """Reads a finished weight and its report."""
        held = load(self._place(name))
        row = json.loads(np.asarray(held["report"]).tobytes())
        return held["weight"], WeightReport(**row | {"tokens_of_each": tuple(row["tokens_of_each"])})

    def put(self, name: str, weight: Any, row: WeightReport) -> None:
        """Writes a finished weight; a run killed in the middle of it has not finished it."""
        text = json.dumps(dataclasses.asdict(row)).encode()
        kept = {"weight": weight, "report": np.frombuffer(text, np.uint8)}
        save(self._place(name), kept, overwrite=True)  # a block of which only a part was kept is trained again

    def _place(self, name: str) -> pathlib.Path:
        return self.folder / quote(name, safe="")


def open_finished(
    folder: str | pathlib.Path, config: QuantConfig, shapes: Mapping[str, tuple[int, ...]], form: str
) -> Finished:
    """Opens the folder of a run, or starts one.

    Args:
        folder: where finished weights are kept.
        config: what the run quantizes with.
        shapes: of the weights it quantizes, by path.
        form: of the calibration, in a word.

    Returns:
        The weights finished so far.

    Raises:
        ValueError: the folder belongs to another run or holds something else.
    """
    place = pathlib.Path(folder).absolute()
    described = json.dumps([repr(config), sorted((path, list(shape)) for path, shape in shapes.items()), form])
    run = {"jaxquant": library_version(), "run": hashlib.sha256(described.encode()).hexdigest()}
    place.mkdir(parents=True, exist_ok=True)
    file = place / RUN
    if file.exists():
        held = json.loads(file.read_text(encoding="utf-8"))
        if held != run:
            raise ValueError(
                f"quantize: resume={str(folder)!r} holds weights of another run (configuration, parameters, form of"
                " calibration or library version differ); give another folder or remove it"
            )
    elif any(place.iterdir()):
        raise ValueError(f"quantize: resume={str(folder)!r} is no folder of a run, and not empty; give another")
    else:
        file.write_text(json.dumps(run), encoding="utf-8")
    return Finished(place)
