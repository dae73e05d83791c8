import pathlib

import pytest

from experiments import _workers

WORKER = """
import os, sys, time
from experiments import _workers

def handle(item):
    if item["does"] == "fail":
        raise ValueError("no such thing")
    if item["does"] == "fault":
        raise RuntimeError("INTERNAL: CUDA error: misaligned address")
    with _workers.device_turn():
        _workers.stage(item["does"])
        if item["does"] == "hang":
            time.sleep(600)
    return {"twice": 2 * item["value"], "process": os.getpid()}

_workers.serve(handle)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "worker_under_test.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{pathlib.Path(_workers.__file__).parents[1]}")
    return "worker_under_test"


def test_a_hang_costs_itself_alone(module):
    items = [{"value": i, "does": "work"} for i in range(3)]
    items[1:1] = [{"value": 10, "does": "hang"}, {"value": 11, "does": "fail"}]
    answers = _workers.run(module, items, workers=2, seconds=120, stall=3.0)
    found = {answer["value"]: answer for answer in answers}
    assert [found[i]["twice"] for i in range(3)] == [0, 2, 4]
    assert found[10]["error"] == "hung: hang"
    assert found[11]["error"] == "ValueError: no such thing"


def test_kin_of_a_hang_are_dropped(module):
    """One worker, since a second might have begun the kin before the hang was one."""
    items = [{"value": i, "does": does} for i, does in enumerate(("hang", "hang", "work"))]
    answers = _workers.run(module, items, workers=1, seconds=120, stall=3.0, kin=lambda item: item["does"])
    assert {answer["value"]: answer.get("error") for answer in answers} == {0: "hung: hang", 2: None}


def test_a_device_fault_ends_the_process_that_saw_it(module):
    """What such a process measures afterwards fails too."""
    items = [{"value": i, "does": does} for i, does in enumerate(("work", "fault", "work", "fail", "work"))]
    answers = {answer["value"]: answer for answer in _workers.run(module, items, workers=1, seconds=120)}
    assert "misaligned" in answers[1]["error"]
    assert answers[0]["process"] != answers[2]["process"] == answers[4]["process"]
