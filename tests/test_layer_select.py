"""Which blocks each strategy of layer_select.py takes."""

import pytest

from config import UserError
from layer_select import STRATEGIES, select_layers


def test_a_third_of_48_blocks_by_every_strategy():
    assert select_layers("even", 48, 16) == list(range(0, 48, 3))
    assert select_layers("first", 48, 16) == list(range(16))
    assert select_layers("middle", 48, 16) == list(range(16, 32))
    assert select_layers("last", 48, 16) == list(range(32, 48))
    assert select_layers("all", 48, 16) == list(range(48))


@pytest.mark.parametrize("strategy", ["even", "first", "middle", "last"])
@pytest.mark.parametrize(("depth", "count"), [(1, 1), (7, 3), (6, 2), (5, 5)])
def test_layers_are_ascending_and_as_many_as_wanted(strategy, depth, count):
    layers = select_layers(strategy, depth, count)
    assert len(layers) == count and layers == sorted(set(layers)) and 0 <= layers[0] and layers[-1] < depth


def test_even_layers_lie_equally_far_apart_and_middle_ones_in_the_middle():
    even = select_layers("even", 10, 4)
    assert max(b - a for a, b in zip(even, even[1:])) - min(b - a for a, b in zip(even, even[1:])) <= 1
    assert select_layers("middle", 7, 3) == [2, 3, 4] and select_layers("middle", 6, 3) == [1, 2, 3]


@pytest.mark.parametrize("wrong", [("odd", 6, 2), ("even", 6, 0), ("first", 6, 7), ("all", 6, 7)])
def test_unknown_strategies_and_impossible_counts_are_refused(wrong):
    with pytest.raises(UserError, match=f"of 6 layers by '{wrong[0]}'"):
        select_layers(*wrong)


def test_strategies_are_all_known():
    assert {s: len(select_layers(s, 9, 3)) for s in STRATEGIES} == {
        "all": 9,
        "even": 3,
        "first": 3,
        "middle": 3,
        "last": 3,
    }
