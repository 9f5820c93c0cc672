import math

import pytest
import scipy.spatial.distance
import torch

from dynaroute.analysis.topology import (
    by_layer_pair,
    effective_rank,
    gate_entropy,
    jaccard_distances,
    measure,
    mute_and_deaf,
    variation,
)
from dynaroute.dagformer.gates import dag_mask

# Two heads in each of three layers. Of 12 valid gates, 8 are between adjacent layers: 0,1 -> 2,3 and 2,3 -> 4,5; and
# 4 skip a layer: 0,1 -> 4,5.
H, N = 2, 6


def gates(**by_edge: float) -> torch.Tensor:
    """A wiring, [N, N], from edges such as e02=0.5; all other gates are 0."""
    adjacency = torch.zeros(N, N)
    for edge, gate in by_edge.items():
        adjacency[int(edge[1]), int(edge[2])] = gate
    return adjacency


def test_measures_of_a_case_computed_by_hand():
    soft = torch.stack([gates(e02=0.9, e13=0.5, e04=0.6), gates(e02=0.7, e24=1.0, e35=0.8, e05=0.25)])
    hard = torch.stack([gates(e02=1, e04=1), gates(e02=1, e24=1, e35=1)])
    found = measure(soft, hard, H)
    assert found["mean_A"] == pytest.approx((0.9 + 0.5 + 0.6 + 0.7 + 1.0 + 0.8 + 0.25) / 24)
    assert found["seq_gate_frac"] == pytest.approx((1 + 3) / 16)  # a gate of 0.5 is not above 0.5
    assert found["hyp_gate_frac"] == pytest.approx((1 + 0) / 8)
    assert found["density_hard"] == pytest.approx((2 + 3) / 24)
    bits = [-a * math.log2(a) - (1 - a) * math.log2(1 - a) for a in (0.9, 0.5, 0.6, 0.7, 0.8, 0.25)]
    assert found["entropy_bits"] == pytest.approx(sum(bits) / 24)
    # Head 1 sends nothing; 3 sends to 5 in the second text, but no text sends it anything.
    assert found["dead_heads"] == 2


def test_what_is_not_valid_does_not_count():
    soft = dag_mask(3, H).float()[None].repeat(4, 1, 1)
    found = measure(soft, soft, H)
    shut = {"entropy_bits": 0.0, "dead_heads": 0}
    assert found == {"mean_A": 1.0, "seq_gate_frac": 1.0, "hyp_gate_frac": 1.0, "density_hard": 1.0} | shut


def test_with_all_gates_shut_every_head_is_dead_and_is_counted_once():
    found = measure(torch.zeros(2, N, N), torch.zeros(2, N, N), H)
    assert (found["mean_A"], found["density_hard"], found["entropy_bits"]) == (0.0, 0.0, 0.0)
    assert found["dead_heads"] == 6


def test_a_head_is_mute_or_deaf_only_if_it_is_in_every_text():
    first, second = gates(e02=1, e24=1, e25=1), gates(e13=1, e34=1)
    alone = [mute_and_deaf(text[None], H) for text in (first, second)]
    assert [mute.nonzero().flatten().tolist() for mute, _ in alone] == [[1, 3], [0, 2]]
    assert [deaf.nonzero().flatten().tolist() for _, deaf in alone] == [[3], [2, 5]]
    mute, deaf = mute_and_deaf(torch.stack([first, second]), H)
    assert not mute.any()
    assert not deaf.any()


def test_layer_pairs_are_means_over_their_gates():
    adjacency = torch.stack([gates(e02=0.4, e03=0.8, e12=0.2), gates(e25=1.0, e14=0.6)])
    expected = torch.full((2, 3, 3), torch.nan)
    expected[:, 0, 1] = torch.tensor([1.4 / 4, 0])
    expected[:, 1, 2] = torch.tensor([0, 1 / 4])
    expected[:, 0, 2] = torch.tensor([0, 0.6 / 4])
    torch.testing.assert_close(by_layer_pair(adjacency, H), expected, equal_nan=True)
    assert by_layer_pair(adjacency[0], H).shape == (3, 3)


# --- how wirings differ from text to text --------------------------------------------------------------------------


def random_gates(texts: int, gates: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.rand(texts, gates, generator=torch.Generator().manual_seed(seed))


def test_the_distance_of_hard_wirings_is_that_of_sets_of_edges():
    hard = random_gates(7) > 0.6
    expected = scipy.spatial.distance.cdist(hard.numpy(), hard[:3].numpy(), "jaccard")
    assert jaccard_distances(hard, hard[:3]).numpy() == pytest.approx(expected)


def test_the_distance_of_soft_wirings_is_one_less_the_share_of_what_they_have_in_common():
    soft = random_gates(5)
    for i, j in ((0, 1), (2, 4), (3, 3)):
        common, either = torch.minimum(soft[i], soft[j]).sum(), torch.maximum(soft[i], soft[j]).sum()
        assert float(jaccard_distances(soft, soft)[i, j]) == pytest.approx(float(1 - common / either), abs=1e-6)


def test_wirings_without_any_edge_are_equal_and_as_far_as_can_be_from_any_other():
    gates = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.3]])
    assert jaccard_distances(gates, gates).tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]


def test_one_wiring_for_all_texts_does_not_vary():
    gates = random_gates(1)
    found = variation(gates.expand(9, -1))  # of values whose mean over nine does not round to themselves
    assert found.pop("distinct") == 1
    assert found.pop("entropy_bits") == pytest.approx(float(gate_entropy(gates.double()).mean()))
    assert found == pytest.approx(dict.fromkeys(found, 0.0), abs=1e-15)


def test_the_variation_of_a_planted_set_is_what_was_planted():
    # Of 40 gates 10 are open in every other text, 10 in all, and 20 in none: two wirings that share 10 of 20 edges.
    gates = torch.zeros(8, 40)
    gates[:, :10] = 1
    gates[::2, 10:20] = 1
    found = variation(gates)
    assert found["gate_variance"] == pytest.approx(10 * 0.25 / 40)
    assert found["distance_mean"] == pytest.approx(0.5 * 16 / 28)  # 16 of the 28 pairs are of different wirings
    assert found["distance_variance"] == pytest.approx(0.25 * 16 / 28 * 12 / 28)
    assert found["information_bits"] == pytest.approx(10 / 40)  # those ten gates tell one bit each
    assert found["effective_rank"] == pytest.approx(1)  # one direction
    assert found["distinct"] == 2


def test_gates_that_are_undecided_in_every_text_tell_nothing_about_it():
    undecided = torch.full((6, 10), 0.5)
    assert variation(undecided)["information_bits"] == 0.0
    decided = torch.tensor([[0.0] * 10, [1.0] * 10] * 3)
    assert variation(decided)["information_bits"] == pytest.approx(1.0)


def test_the_effective_rank_counts_directions_that_are_equally_strong():
    noise = random_gates(200, 5, seed=1) - 0.5
    directions = torch.linalg.qr(random_gates(40, 5, seed=2))[0]  # [40, 5]
    orthonormal = torch.linalg.qr(noise - noise.mean(0))[0]
    assert effective_rank(0.5 + orthonormal @ directions.T) == pytest.approx(5, rel=1e-4)
    weak = orthonormal * torch.tensor([1.0, 1.0, 1e-4, 1e-4, 1e-4])
    assert effective_rank(0.5 + weak @ directions.T) == pytest.approx(2, rel=2e-3)
