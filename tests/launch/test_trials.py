"""Slots: trials of different sizes share a cluster without overbooking it, and none is forgotten."""

import random

from ray.tune.search import Searcher

from lmu_dist.launch.trials import Slots


def test_what_fits_goes_first_and_slots_come_back():
    slots = Slots([4, 1, 2, 4], n_slots=4)
    assert slots.suggest("a") == {"index": 0}
    assert slots.suggest("b") is None
    slots.on_trial_complete("a", error=True)
    assert slots.suggest("b") == {"index": 1}
    assert slots.suggest("c") == {"index": 2}
    assert slots.suggest("d") is None
    slots.on_trial_complete("b")
    slots.on_trial_complete("b")  # told twice
    assert slots.suggest("d") is None
    slots.on_trial_complete("c")
    assert slots.suggest("d") == {"index": 3}
    assert slots.suggest("e") == Searcher.FINISHED


def test_any_mix_of_sizes_comes_to_its_end_and_never_overbooks():
    rng = random.Random(0)
    for _ in range(50):
        sizes = [rng.choice([1, 2, 4, 8]) for _ in range(30)]
        slots, running, begun = Slots(sizes, n_slots=8), dict[str, int](), list[int]()
        for turn in range(10_000):
            given = slots.suggest(f"t{turn}")
            if given == Searcher.FINISHED and not running:
                break
            if isinstance(given, dict):
                running[f"t{turn}"] = given["index"]
                begun.append(given["index"])
            elif running:
                trial = rng.choice(sorted(running))
                del running[trial]
                slots.on_trial_complete(trial, error=rng.random() < 0.2)
            assert sum(sizes[i] for i in running.values()) <= 8
        assert sorted(begun) == list(range(30))
