"""The count of a training step's memory: what is alive is counted once, and what is gone no more."""

import count_step_memory
import pytest
import torch
from repository import REPOSITORY
from small_settings import changed

from dynaroute.config import load_settings
from dynaroute.dagformer.bases import new_base
from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.predictor import StructurePredictor


def test_it_counts_what_is_alive_views_once_and_the_most_at_any_time():
    with count_step_memory.MemoryCount() as memory:
        one = torch.zeros(1000)
        assert memory.now == 4000
        view, other = one.view(10, 100), one.double()
        assert memory.now == 12_000
        del one, other
        assert memory.now == 4000  # the view keeps it
        del view
        assert (memory.now, memory.peak) == (0, 12_000)


@pytest.fixture
def settings():
    """Those that are counted, with a base that the test can afford."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 4, "num_heads": 4}
    return changed(load_settings(REPOSITORY / "params/gpu.yaml"), dagformer={"base": sizes, "seq_len": 64})


@pytest.mark.parametrize("joint", [False, True])
def test_counted_weights_are_those_of_real_models_and_the_rest_comes_on_top(settings, monkeypatch, joint):
    monkeypatch.setattr(count_step_memory, "VOCABULARY", 512)
    variant = settings.variant("P1")
    base = new_base(settings.dagformer.base, 512, 64, eot_id=0)
    weights = sum(parameter.nbytes for parameter in base.parameters())
    moments = 2 * weights if joint else 0
    graph = DagForward(base.bfloat16())
    predictor = StructurePredictor(variant, 4, 4, count_step_memory.EMBEDDING)
    states = [*graph.parameters(), *graph.buffers(), *predictor.parameters(), *predictor.buffers()]
    least = sum(state.nbytes for state in states) + joint * weights
    one, two, three = (count_step_memory.count(settings, variant, joint, windows) for windows in (1, 2, 3))
    if not joint:  # beside a trained base lies what the frozen one's evaluation has left
        assert least <= one["weights_bytes"] < least * 1.05  # rotary frequencies, and what indexes the nodes
    assert one["weights_bytes"] >= least
    of_a_window = two["kept_bytes"] - one["kept_bytes"]
    assert three["kept_bytes"] - two["kept_bytes"] == pytest.approx(of_a_window, rel=1e-3)
    exchanged = 64 * 64 * (2 * 3 * 5 + 3 * 4) * (4 if joint else 2)  # T D (2 (L-1) (H+1) + (L-1) H) elements
    assert exchanged < of_a_window < 5 * exchanged
    moments += 2 * sum(parameter.nbytes for parameter in predictor.parameters())
    assert one["peak_bytes"] > one["weights_bytes"] + of_a_window + moments
