"""Times by layer sizes: what is measured, what lies between, and the file that keeps it."""

import json
import time

import pytest
import torch
from conftest import build
from huggingface_hub import constants

from hf_slim import find_structures
from hf_slim.costs.flop_costs import make_batches
from hf_slim.costs.latency_costs import Stopwatch, measure_latency_costs
from hf_slim.costs.latency_table import LatencyTable
from hf_slim.costs.skeleton import Skeleton
from hf_slim.costs.timing import choose_clock


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hf_slim" / "latency"


class Clockwork(Stopwatch):
    """By it a dense model takes 100 ms, a channel 0.1 and a head 5; all counts double once both kinds are smaller."""

    def __init__(self, skeleton):
        """No batches, since nothing is run."""
        super().__init__(skeleton, [])
        self.timed = 0

    def _time(self, kept):
        self.timed += 1
        lost = {s.kind: 0.0 for s in self._skeleton.structures}
        for s in self._skeleton.structures:
            lost[s.kind] += (s.units - kept.get(s.name, s.units)) * (0.1 if s.kind == "ffn" else 5.0)
        factor = 2 if all(lost.values()) else 1
        return {"dense": 100.0, "other": 100.0 - factor * sum(lost.values())}


def make_clockwork(**changes):
    model = build("bert", **changes)
    found = find_structures(model).structures
    return Clockwork(Skeleton(model, found, {})), [[s for s in found if s.kind == kind] for kind in ("ffn", "mha")]


def test_curves_go_through_what_was_measured_and_are_scaled_by_a_whole_model():
    stopwatch, groups = make_clockwork()
    floors = {s.name: 8 if s.kind == "ffn" else 1 for group in groups for s in group}
    multiples = {s.name: 8 if s.kind == "ffn" else 1 for group in groups for s in group}
    costs = measure_latency_costs(stopwatch, groups, floors, multiples, 70.0)
    assert (costs.unit, costs.dense, costs.find({})) == ("ms", 100.0, 100.0)
    ffn, mha = groups[0][0].name, groups[1][0].name
    assert costs.curves[ffn].units == (8, 24, 32, 48, 64)
    assert costs.of(ffn, 64) - costs.of(ffn, 32) == pytest.approx(2 * 32 * 0.1)  # doubled, since both kinds shrink
    assert costs.of(mha, 4) - costs.of(mha, 1) == pytest.approx(2 * 3 * 5.0)
    timed = stopwatch.timed
    assert measure_latency_costs(stopwatch, groups, floors, multiples, 70.0).curves == costs.curves
    assert stopwatch.timed == timed  # all of it is in the table


def test_a_table_is_kept_for_each_machine_and_shape(cache):
    first, _ = make_clockwork()
    assert first.dense == 100.0
    again, _ = make_clockwork()
    other, _ = make_clockwork(intermediate_size=128)
    assert (again.dense, again.timed, other.dense, other.timed) == (100.0, 0, 100.0, 1)
    assert first.table.path == again.table.path != other.table.path
    assert sorted(cache.iterdir()) == sorted([first.table.path, other.table.path])
    stored = json.loads(first.table.path.read_text())
    assert stored["ms"] == {"dense": 100.0}
    assert set(stored["of"]) == {"device", "threads", "torch", "model", "attention", "shape", "inputs"}


@pytest.mark.parametrize("text", ["", "{}", '{"ms": {"dense": -1.0}}', '{"ms": {"dense": "x"}}', '{"ms": 3}'])
def test_a_damaged_table_is_named(text):
    table = LatencyTable({"device": "x"})
    table.find("dense", lambda: 1.0)
    table.path.write_text(text)
    with pytest.raises(ValueError, match=rf"The table of measured times {table.path} is damaged: delete it"):
        LatencyTable({"device": "x"})


def test_a_stopwatch_times_models_in_turn():
    model = build("bert")
    found = find_structures(model).structures
    stopwatch = Stopwatch(Skeleton(model, found, {}), make_batches(model, "slim_target_latency"))
    taken = stopwatch.measure({s.name: 1 for s in found})
    assert 0 < taken < 10_000
    assert stopwatch.measure({s.name: 1 for s in found}) == taken


def test_one_thread_is_timed_by_its_own_clock(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert choose_clock(cpu) is time.thread_time
    assert choose_clock(torch.device("cuda")) is time.perf_counter
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert choose_clock(cpu) is time.perf_counter


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(ValueError, match="slim_target_latency keeps what it measures in .*, which cannot be written"):
        LatencyTable({"device": "x"}).find("dense", lambda: 1.0)
