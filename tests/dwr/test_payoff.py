"""Which predictions are worth following: bounds on what they cost, and that following them pays in simulation."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from dynaroute.analysis.replay import Clock, Seconds, predict, replay
from dynaroute.analysis.traces import Trace
from dynaroute.dwr.experts.payoff import Average, Payoff
from dynaroute.dwr.experts.policies import LRU
from dynaroute.dwr.experts.prefetch import GatePrefetcher, Prediction
from dynaroute.dwr.experts.residency import Residency

TIMES = st.floats(0.01, 100.0)
EVERY = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def measured(read: float, expert: float, dense: float, top_k: int = 2) -> Payoff:
    payoff = Payoff(top_k)
    for average, value in zip((payoff.read, payoff.expert, payoff.dense), (read, expert, dense), strict=True):
        average.add(value)
    return payoff


def certain(payoff: Payoff, count: int, probability: float = 1.0) -> list[bool]:
    """Which of several equally probable predictions are followed, where nothing is evicted."""
    experts = list(range(count))
    payoff.plan(Prediction(1, experts, [probability] * count), ready=2, reads=0, busy=0.0)
    return [payoff.is_worth((1, expert), None) for expert in experts]


@EVERY
@given(
    read=TIMES, expert=TIMES, dense=TIMES, ready=st.integers(0, 4), missing=st.integers(0, 4), count=st.integers(1, 4)
)
def test_wrong_prefetches_delay_the_next_call_by_no_more_than_the_rest_of_one_read(
    read, expert, dense, ready, missing, count
):
    assume(ready + missing)
    payoff, seconds = measured(read, expert, dense), Seconds(read, expert, dense)
    held, needed = [(0, number) for number in range(ready)], [(0, number) for number in range(ready, ready + missing)]
    following, ends = [(1, 8), (1, 9)], []
    for ahead in ([], [(1, number) for number in range(count)]):
        clock = Clock(seconds)
        clock.request(held, held)  # reads what is held later
        clock.compute([], held)
        clock.now, clock.busy_until = 1000.0, 0.0
        reads, busy = clock.request(needed, [*held, *needed])
        asked = clock.now
        clock.compute(ahead, [*held, *needed])
        due = clock.now + dense
        clock.request(following, following)
        clock.compute([], following)
        ends.append(clock.now)
    payoff.plan(Prediction(1, [0], [0.5]), ready, reads, busy)
    assert asked + payoff._due == pytest.approx(due)
    over = max(0.0, payoff._due - payoff._begin)
    rest = 0.0 if over == 0 else max(-over % read, 0.0)  # of the one that is under way, if reads before it are over
    assert ends[0] <= ends[1] <= ends[0] + rest + 1e-6
    assert rest <= read


@EVERY
@given(read=TIMES, expert=TIMES, dense=TIMES, count=st.integers(1, 3))
def test_what_is_certain_is_always_read_by_an_idle_disk_if_nothing_is_evicted(read, expert, dense, count):
    payoff = measured(read, expert, dense, top_k=1)
    followed = certain(payoff, count)
    window = 2 * expert + dense  # until the next call
    assert followed == [window - number * read > payoff.CAUTION * read for number in range(count)]


@EVERY
@given(expert=TIMES, dense=TIMES, probability=st.floats(0, 1), slower=st.floats(21, 1e6))
def test_nothing_is_read_ahead_where_a_read_takes_much_longer_than_a_layer(expert, dense, probability, slower):
    payoff = measured(slower * (2 * expert + dense), expert, dense)
    assert certain(payoff, 3, probability) == [False] * 3


def test_nothing_is_read_ahead_before_a_read_was_measured():
    assert certain(Payoff(2), 2) == [False, False]


def test_probabilities_are_those_that_came_true():
    payoff = measured(1.0, 1.0, 1.0)
    for number in range(400):
        certain(payoff, 2, probability=0.9)
        payoff.called(1, [0] if number % 4 == 0 else [5], 0, [])
    assert [round(average.value, 2) for average in payoff._used.values()] == [pytest.approx(0.125, abs=0.05)]


def share_wanted(payoff: Payoff) -> float:
    wanted = [payoff.wants_prediction(layer) for _ in range(10 * payoff.PROBE) for layer in (0, 1)]
    return sum(wanted) / len(wanted)


def test_where_predictions_save_less_than_they_take_they_are_made_for_few_tokens():
    payoff = measured(1e6, 1.0, 1.0)
    assert share_wanted(payoff) == 1
    for _ in range(payoff.FIRST):
        certain(payoff, 1)
    assert share_wanted(payoff) == 1 / payoff.PROBE
    payoff.read = Average(2.0, 1)  # the disk has become fast
    for _ in range(2):
        certain(payoff, 1)
    assert share_wanted(payoff) == 1
    payoff.predicting.add(10.0)
    assert share_wanted(payoff) == 1 / payoff.PROBE


def noisy_trace(noise: float, tokens: int = 400) -> Trace:
    """Tokens much like those before, whose experts are predicted with an error."""
    generator = np.random.default_rng(0)
    scores = np.zeros((tokens, 4, 8))
    for token in range(tokens):
        scores[token] = 0.8 * scores[token - 1] + generator.standard_normal((4, 8))
    experts = np.argsort(-scores)[..., :2].astype(np.uint16)
    return Trace("run", experts, (scores[:, 1:] + noise * generator.standard_normal((tokens, 3, 8))).astype(np.float32))


@pytest.mark.parametrize("noise", [0.3, 1.0, 10.0])
@pytest.mark.parametrize("read", [0.05, 0.5, 2.0, 8.0, 40.0])
def test_prefetching_is_never_much_slower_than_none_and_faster_where_predictions_are_good(noise, read):
    trace, seconds, ratios = noisy_trace(noise), Seconds(read, 0.4, 1.0), []
    predictions = predict(GatePrefetcher([nn.Identity()] * 4, 2, 2), trace)
    for ahead, payoff in ((None, None), (predictions, Payoff(2))):
        clock = Clock(seconds)
        replay(trace, Residency(11, LRU(), 4, 2), ahead, clock, payoff)
        ratios.append(clock.ratio_to_resident)
    assert ratios[1] >= 0.98 * ratios[0]
    if noise == 0.3 and 0.5 <= read <= 8:
        assert ratios[1] > 1.02 * ratios[0]
