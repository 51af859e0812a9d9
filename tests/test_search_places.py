"""Where trials run: shares of cores and GPUs, on machines of all kinds."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.processes import run_child
from overnight.search.places import Machine, Places, look_around, this_machine

GIB = 2**30


def machine(cores=2, gpus=0, memory=24, device=None, bf16=False):
    return Machine(device or ("cuda" if gpus else "cpu"), gpus, tuple(range(cores)), memory * GIB, bf16)


def layout(places):
    return [(place.cores, place.gpus) for place in places.all]


@pytest.mark.parametrize(
    ("where", "trials", "devices", "expected"),
    [
        (machine(2), 10, 1, [((0,), ()), ((1,), ())]),
        (machine(2), 1, 1, [((0, 1), ())]),
        (machine(4), 4, 1, [((0, 1), ()), ((2, 3), ())]),
        (machine(8, memory=8), 10, 1, [((0, 1, 2, 3), ()), ((4, 5, 6, 7), ())]),
        (machine(4), 10, 2, [((0, 1), ()), ((2, 3), ())]),
        (machine(1, memory=2), 10, 1, [((0,), ())]),
        (machine(4, gpus=1), 10, 1, [((0, 1, 2, 3), (0,))]),
        (machine(4, gpus=2), 10, 1, [((0, 1), (0,)), ((2, 3), (1,))]),
        (machine(4, gpus=4), 10, 2, [((0, 1), (0, 1)), ((2, 3), (2, 3))]),
        (machine(2, gpus=1), 10, 2, [((0, 1), (0,))]),
        (machine(8, device="mps"), 10, 1, [(tuple(range(8)), ())]),
    ],
)
def test_auto(where, trials, devices, expected):
    """The same settings on a laptop, one GPU and several."""
    assert layout(Places(where, "auto", trials=trials, devices=devices)) == expected


@given(
    cores=st.integers(1, 64),
    gpus=st.integers(0, 8),
    memory=st.integers(1, 512),
    parallel=st.one_of(st.just("auto"), st.integers(1, 32)),
    trials=st.integers(1, 50),
    devices=st.integers(1, 4),
)
def test_every_trial_has_a_core_and_all_cores_work(cores, gpus, memory, parallel, trials, devices):
    """As many places as were asked for; with enough cores no core is another's and none is idle; GPUs are even."""
    places = Places(machine(cores, gpus, memory), parallel, trials=trials, devices=devices)
    assert parallel in ("auto", len(places.all)) and all(place.cores for place in places.all)
    used = [core for place in places.all for core in place.cores]
    assert set(used) == set(range(cores)) and (len(places.all) > cores or len(used) == cores)
    sizes = {place.threads for place in places.all}
    assert max(sizes) - min(sizes) <= 1
    taken = [place.gpus for place in places.all]
    assert all(len(group) == min(devices, gpus) for group in taken)
    counts = [taken.count(group) for group in set(taken)]
    assert max(counts) - min(counts) <= 1
    assert str(places)


def test_taken_and_given_back():
    places = Places(machine(2), "auto", trials=10)
    first, second = places.take(), places.take()
    assert {first.cores, second.cores} == {(0,), (1,)} and places.take() is None
    places.give_back(second)
    assert places.take() == second


@pytest.mark.parametrize(
    ("busy", "memory", "per_gpu"), [(0.3, 0.1, 3), (0.3, 0.4, 2), (0.9, 0.1, 1), (0.2, 0.6, 1), (0.01, 0.05, 18)]
)
def test_a_gpu_takes_as_many_as_fit(busy, memory, per_gpu):
    """The first trial that tells decides, once; memory and work left to do both bound it."""
    places = Places(machine(8, gpus=2), "auto", trials=20)
    assert places.learn({"state": "failed", "error": "…"}) == 0
    assert places.learn({"device_busy": busy, "device_memory_share": memory}) == 2 * (per_gpu - 1)
    assert len(places.all) == 2 * per_gpu and {place.gpus for place in places.all} == {(0,), (1,)}
    assert places.learn({"device_busy": 0.01, "device_memory_share": 0.01}) == 0


def test_what_the_user_says_stays():
    places = Places(machine(8, gpus=1), 1, trials=20)
    assert places.learn({"device_busy": 0.1, "device_memory_share": 0.1}) == 0 and len(places.all) == 1


def test_this_machine(tmp_path):
    found = this_machine(run_child(look_around, tmp_path / "machine", 1))
    assert set(found.cores) == os.sched_getaffinity(0) and found.memory > GIB
    assert (found.device == "cuda") == (found.gpus > 0)


def test_in_words():
    """One line says how it runs, and what the machine cannot do."""
    text = "2 trials at a time, 1 of 2 cores each; no GPU here, no bf16 in hardware"
    assert str(Places(machine(2), "auto", trials=10)) == text
    assert str(Places(machine(3, gpus=1, bf16=True), 2, trials=10)) == (
        "2 trials at a time, 1–2 of 3 cores each; the GPU"
    )
