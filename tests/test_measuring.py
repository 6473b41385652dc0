"""The stopwatch tells what it cannot tell apart."""

import pytest

from snows.choosing.measuring import ROUNDS, Race, Stopwatch


def test_medians_and_scatter():
    steady = Race([(2.0, 1.0), (2.1, 1.0), (1.9, 1.0), (2.0, 1.0), (2.0, 1.0)])
    assert steady.medians == [2.0, 1.0]
    assert not steady.scatters(0, 1)
    wild = Race([(1.0, 1.0), (2.0, 1.0), (0.5, 1.0), (1.0, 2.0), (3.0, 1.0)])  # quotients 0.5, 0.5, 1, 2, 3
    assert wild.scatters(0, 1)
    assert not wild.scatters(0, 1, margin=4.0)  # four times as fast it is not, however they scatter
    alike = Race([(1.0, 1.01), (1.0, 0.99), (1.0, 1.0), (1.0, 1.02)])  # either choice is right
    assert not alike.scatters(0, 1)
    assert Race([(1.0,), (2.0,), (3.0,)]).quartiles(0) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("undecided", "times"),
    [
        (lambda r: False, 1),
        (lambda r: len(r.rounds) < 4, 1),
        (lambda r: len(r.rounds) < 6, 2),
        (lambda r: True, 3),
    ],
)
def test_an_undecided_race_is_run_again(undecided, times):
    calls = []
    found = Stopwatch(layer_seconds=0.0).layer(
        [lambda: calls.append("a"), lambda: calls.append("b")], undecided
    )
    assert len(found.rounds) == times * ROUNDS
    assert calls == ["a", "b"] * (times * ROUNDS + 1)  # in turns, after a first run of each
    assert all(ms >= 0 for one in found.rounds for ms in one)


def test_a_race_lasts_as_long_as_it_is_asked():
    found = Stopwatch(network_seconds=0.05, rounds=1).network([lambda: None])
    assert len(found.rounds) > 10
