"""Slots: trials with different numbers of workers never use more slots than there are, and each work item runs once."""

import random

from ray.tune.search import Searcher

from lmu_dist.launch.trials import Slots


def test_first_fitting_item_is_suggested_and_slots_are_freed():
    slots = Slots([4, 1, 2, 4], n_slots=4)
    assert slots.suggest("a") == {"index": 0}
    assert slots.suggest("b") is None
    slots.on_trial_complete("a", error=True)
    assert slots.suggest("b") == {"index": 1}
    assert slots.suggest("c") == {"index": 2}
    assert slots.suggest("d") is None
    slots.on_trial_complete("b")
    slots.on_trial_complete("b")  # a second call changes nothing
    assert slots.suggest("d") is None
    slots.on_trial_complete("c")
    assert slots.suggest("d") == {"index": 3}
    assert slots.suggest("e") == Searcher.FINISHED


def test_random_sizes_all_run_and_never_exceed_the_slots():
    rng = random.Random(0)
    for _ in range(50):
        sizes = [rng.choice([1, 2, 4, 8]) for _ in range(30)]
        slots, running, started = Slots(sizes, n_slots=8), dict[str, int](), list[int]()
        for turn in range(10_000):
            suggestion = slots.suggest(f"t{turn}")
            if suggestion == Searcher.FINISHED and not running:
                break
            if isinstance(suggestion, dict):
                running[f"t{turn}"] = suggestion["index"]
                started.append(suggestion["index"])
            elif running:
                trial = rng.choice(sorted(running))
                del running[trial]
                slots.on_trial_complete(trial, error=rng.random() < 0.2)
            assert sum(sizes[i] for i in running.values()) <= 8
        assert sorted(started) == list(range(30))
