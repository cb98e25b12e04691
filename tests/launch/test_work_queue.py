"""Work items: groups of different sizes never use more slots than there are, each item is taken once, and nothing starves."""

import asyncio
import pickle
import random

from ray.tune.search import Searcher

from lmu_dist.launch.trials import Slots
from lmu_dist.launch.work_queue import Rendezvous, RunGroup, SearchTrial, WorkItem, WorkList, WorkQueue


def work_list(sizes: list[int], n_slots: int = 8) -> WorkList:
    return WorkList([WorkItem((), size) for size in sizes], n_slots)


def test_first_fitting_item_starts_a_group_and_slots_are_freed():
    work = work_list([4, 1, 2, 4])
    slots = Slots(work.reserve, n_slots=4)
    assert slots.suggest("a") == {"group": "a", "n_workers": 4}
    assert slots.suggest("b") is None
    slots.on_trial_complete("a", error=True)
    assert slots.suggest("b") == {"group": "b", "n_workers": 1}
    assert slots.suggest("c") == {"group": "c", "n_workers": 2}
    assert slots.suggest("d") is None
    slots.on_trial_complete("b")
    slots.on_trial_complete("b")  # a second call changes nothing
    assert slots.suggest("d") is None
    slots.on_trial_complete("c")
    assert slots.suggest("d") == {"group": "d", "n_workers": 4}
    assert slots.suggest("e") == Searcher.FINISHED


def test_search_algorithm_is_pickled_without_the_driver():
    pickle.dumps(Slots(lambda *_: None, n_slots=4))  # Tune does so; a lambda cannot be pickled


def test_group_takes_the_item_it_was_started_for_and_then_those_of_its_size():
    work = work_list([2, 1, 2, 2])
    assert work.reserve("a", 2) == 2
    assert work.reserve("b", 1) == 1
    assert work.take("b", 1) == (1, ())
    assert work.take("b", 1) is None
    assert work.take("a", 2) == (0, ())
    work.end(0)
    assert work.take("a", 2) == (2, ())
    assert (work.state().running, work.state().ended) == ({1: "b", 2: "a"}, {0: ""})


def test_item_of_a_group_that_never_took_it_counts_as_running():
    work = work_list([1])
    work.reserve("a", 1)
    assert work.state().running == {0: "a"}  # so the driver says that its trial died, and does not wait for it


def test_item_that_was_put_back_is_the_next_to_take():
    work = work_list([1, 1, 1])
    work.reserve("a", 1)
    assert [work.take("a", 1), work.take("a", 1)] == [(0, ()), (1, ())]  # the second one is claimed ahead; then the group fails
    work.put_back(1)
    assert (work.reserve("b", 1), work.take("b", 1), work.take("b", 1)) == (1, (1, ()), (2, ()))


def test_elastic_group_takes_the_slots_that_there_are_and_asks_ray_for_all_workers():
    work = work_list([8], n_slots=4)
    slots = Slots(work.reserve, n_slots=4)
    assert slots.suggest("a") == {"group": "a", "n_workers": 8}
    slots.on_trial_complete("a")
    assert slots.suggest("b") == Searcher.FINISHED


def test_random_sizes_all_run_and_never_exceed_the_slots():
    rng = random.Random(0)
    for _ in range(50):
        sizes = [rng.choice([1, 2, 4, 8]) for _ in range(30)]
        work = work_list(sizes)
        slots, groups, trained = Slots(work.reserve, n_slots=8), dict[str, int](), list[int]()
        for turn in range(10_000):
            suggestion = slots.suggest(f"t{turn}")
            if suggestion == Searcher.FINISHED and not groups:
                break
            if isinstance(suggestion, dict):
                groups[suggestion["group"]] = suggestion["n_workers"]
            else:
                group = rng.choice(sorted(groups))
                item = work.take(group, groups[group])
                if item is not None:
                    assert sizes[item[0]] == groups[group]
                    trained.append(item[0])
                    work.end(item[0])
                else:
                    del groups[group]
                    slots.on_trial_complete(group, error=rng.random() < 0.2)
            assert sum(groups.values()) <= 8
        assert sorted(trained) == list(range(30))


def test_workers_that_start_again_get_the_answer_to_their_new_request():
    async def scenario() -> None:
        rendezvous, run_group = Rendezvous(), RunGroup((), (), report_to_tune=False)
        waiting = asyncio.create_task(rendezvous.wait_for_request())
        await asyncio.sleep(0)
        assert not waiting.done()
        dead = asyncio.create_task(rendezvous.request())  # these workers are killed before they are answered
        assert await waiting
        alive = asyncio.create_task(rendezvous.request())
        await asyncio.sleep(0)
        rendezvous.reply(run_group)
        assert await alive is run_group
        assert await dead is None
        last = asyncio.create_task(rendezvous.request())
        assert await rendezvous.wait_for_request()
        rendezvous.reply(None)
        assert await last is None
        rendezvous.close()
        assert not await rendezvous.wait_for_request()

    asyncio.run(scenario())


def test_trial_of_a_search_gets_its_cell_whether_it_asks_first_or_last():
    async def scenario() -> None:
        queue, first, second = WorkQueue([], 0), SearchTrial(None, error="first"), SearchTrial(None, error="second")
        waiting = asyncio.create_task(queue.search_trial("a"))
        await asyncio.sleep(0)
        await queue.give_to_search_trial("b", second)
        assert not waiting.done()
        await queue.give_to_search_trial("a", first)
        assert [await waiting, await queue.search_trial("b")] == [first, second]

    asyncio.run(scenario())
