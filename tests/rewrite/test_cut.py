"""The cheapest values on every way, against a search through all sets."""

import itertools

import numpy as np
import pytest

from layers.rewriting.cut import UNLIMITED, least_cut


def is_cut(chosen, feeds, starts, ends):
    reached, todo = set(), [v for v in starts if v not in chosen]
    while todo:
        v = todo.pop()
        if v not in reached:
            reached.add(v)
            todo += [b for a, b in feeds if a == v and b not in chosen]
    return not reached & set(ends)


@pytest.mark.parametrize("seed", range(12))
def test_cut_is_the_cheapest_of_all(seed):
    rng = np.random.default_rng(seed)
    n = 8
    cost = {i: int(c) for i, c in enumerate(rng.integers(0, 9, n))}
    feeds = [(a, b) for a in range(n) for b in range(a + 1, n) if rng.random() < 0.4]
    starts, ends = [0, 1], [5, 6, 7]
    found = least_cut(cost, feeds, starts, ends)
    assert is_cut(found, feeds, starts, ends)
    sets = itertools.chain.from_iterable(itertools.combinations(range(n), k) for k in range(n + 1))
    assert sum(cost[v] for v in found) == min(sum(cost[v] for v in s) for s in sets if is_cut(set(s), feeds, starts, ends))


def test_of_equal_cuts_the_nearest_to_the_ends_is_taken():
    assert least_cut({0: 3, 1: 3, 2: 3}, [(0, 1), (1, 2)], [0], [2]) == {2}


def test_what_is_computed_from_nothing_is_not_chosen():
    assert least_cut({0: 3, 1: 5, 2: 9}, [(0, 2), (1, 2)], [0], [2]) == {0}


def test_way_without_anything_that_can_be_chosen_is_an_error():
    with pytest.raises(ValueError, match="nothing on a way"):
        least_cut({0: UNLIMITED, 1: UNLIMITED}, [(0, 1)], [0], [1])
