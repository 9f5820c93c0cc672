"""The DWR model against plain references: sizes, the mixture of experts, the blocks, decoding."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaroute.dwr.model import DWRConfig, DWRTransformer, KVCache, MoE

PAPER = {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "num_experts": 16, "top_k": 2}
PAPER |= {"max_seq_len": 512, "dropout": 0.1, "capacity_factor": None, "vocab_size": 50304}


def make_config(**changes) -> DWRConfig:
    small = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "num_experts": 5, "top_k": 2}
    small |= {"max_seq_len": 16, "dropout": 0.0, "capacity_factor": None, "vocab_size": 64}
    return DWRConfig(**{**small, **changes})


def make(cls, seed=0, **changes):
    """A float64 module whose weights are large enough for routing to be far from uniform."""
    torch.manual_seed(seed)
    module = cls(make_config(**changes)).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def expert_weights(moe, expert):
    ((_, weights),) = moe.experts.fetch([expert])
    return weights


def plain_moe(moe, x, capacity=None):
    """Token by token and expert by expert, as the formula reads; with a capacity, first come, first served."""
    taken = [0] * moe.config.num_experts
    outputs = []
    for token in x.reshape(-1, x.shape[-1]):
        probabilities = F.softmax(moe.router.weight @ token + moe.router.bias, dim=0)
        values, chosen = probabilities.topk(moe.config.top_k)
        y = torch.zeros_like(token)
        total = values.sum() if len(values) > 1 else 1
        for value, expert in zip(values / total, chosen.tolist(), strict=True):
            taken[expert] += 1
            if capacity is None or taken[expert] <= capacity:
                w1, b1, w2, b2 = expert_weights(moe, expert)
                y = y + value * (F.gelu(token @ w1 + b1) @ w2 + b2)
        outputs.append(y)
    return torch.stack(outputs).view_as(x), taken


def test_the_paper_model_has_the_published_number_of_parameters():
    config = DWRConfig(**PAPER)
    with torch.device("meta"):
        model = DWRTransformer(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_params() == 259_712_096
    assert config.num_active_params() == 83_336_288
    assert config.num_active_params() - 50304 * 512 == 57_580_640
    assert config.num_params_per_expert() == 2_099_712


@settings(max_examples=20, deadline=None)
@given(
    heads=st.integers(1, 3), experts=st.integers(2, 6), top_k=st.integers(1, 3), layers=st.integers(1, 3),
    width=st.integers(1, 3), vocab=st.integers(1, 90),
)  # fmt: skip
def test_num_params_counts_the_built_model(heads, experts, top_k, layers, width, vocab):
    config = make_config(
        num_heads=heads, d_model=16 * heads, d_ff=16 * width, num_experts=max(experts, top_k), top_k=top_k,
        num_layers=layers, vocab_size=vocab,
    )  # fmt: skip
    with torch.device("meta"):
        model = DWRTransformer(config)
    assert config.num_params() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (1, 16)])
def test_moe_equals_a_plain_loop_in_values_and_gradients(top_k, shape):
    moe = make(MoE, top_k=top_k)
    x = torch.randn(*shape, 32, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(*shape, 32, dtype=torch.float64)
    ours, _ = moe(x)
    theirs, _ = plain_moe(moe, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    inputs = [x, *moe.parameters()]
    found = torch.autograd.grad(ours, inputs, cotangent, allow_unused=True)
    expected = torch.autograd.grad(theirs, inputs, cotangent, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_all_experts_at_once_equal_a_plain_loop_in_values_and_gradients(monkeypatch, top_k):
    monkeypatch.setattr(MoE, "_run_at_once", lambda self, x: True)  # as on a GPU in bf16; here in fp32
    moe = make(MoE, top_k=top_k)
    with torch.no_grad():
        moe.router.bias[3] = -100.0 if top_k < 5 else 0.0  # an expert without tokens
    x = torch.randn(2, 16, 32, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 16, 32, dtype=torch.float64)
    theirs, taken = plain_moe(moe, x)
    assert (0 in taken) == (top_k < 5)
    expected = torch.autograd.grad(theirs, [x, *moe.parameters()], cotangent, materialize_grads=True)
    x = x.detach().float().requires_grad_()
    moe.float()
    ours, _ = moe(x)
    found = torch.autograd.grad(ours, [x, *moe.parameters()], cotangent.float())
    for one, other in zip([ours, *found], [theirs, *expected], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_all_experts_at_once_work_in_the_dtype_of_autocast(monkeypatch):
    moe = make(MoE).float()
    x = torch.randn(2, 16, 32)
    expected, _ = moe(x)
    monkeypatch.setattr(MoE, "_run_at_once", lambda self, x: True)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = moe(x)
    assert found.dtype == torch.bfloat16
    assert 1e-4 < (found.float() - expected).norm() / expected.norm() < 2e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_on_a_gpu_in_bf16_the_host_waits_for_nothing_and_the_gradients_are_those_of_the_loop():
    moe = make(MoE).float().cuda()
    x = torch.randn(2, 16, 32, device="cuda", requires_grad=True)
    found = []
    with torch.autocast("cuda", torch.bfloat16):
        assert moe._run_at_once(x)
        for mode in ("error", "default"):
            torch.cuda.set_sync_debug_mode(mode)
            try:
                y, _ = moe(x)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            gradients = torch.autograd.grad(y.float().square().sum(), [x, *moe.parameters()], materialize_grads=True)
            found.append([y, *gradients])
            moe._run_at_once = lambda x: False
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 3e-2 * other.norm()


def test_moe_gradients_are_the_numerical_ones():
    moe = make(MoE, d_model=16, num_heads=1, d_ff=16, num_experts=3)
    x = torch.randn(1, 4, 16, dtype=torch.float64, requires_grad=True)
    names, weights = zip(*moe.named_parameters(), strict=True)

    def outputs(x, *weights):
        found, statistics = torch.func.functional_call(moe, dict(zip(names, weights, strict=True)), (x,))
        return found, statistics.balance_loss

    inputs = (x, *(weight.detach().requires_grad_() for weight in weights))
    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: moe(x)[0], x)


def test_router_statistics_are_what_the_formulas_say():
    moe = make(MoE)
    x = torch.randn(3, 8, 32, dtype=torch.float64)
    _, statistics = moe(x)
    probabilities = F.softmax(x.reshape(-1, 32) @ moe.router.weight.T + moe.router.bias, dim=-1)
    chosen = probabilities.topk(2).indices
    share = torch.stack([(chosen == expert).sum() / 24 for expert in range(5)])
    assert statistics.counts.sum() == 48
    torch.testing.assert_close(statistics.counts / 24, share)
    torch.testing.assert_close(statistics.probability.double().view(24, 5), probabilities, rtol=1e-5, atol=1e-6)
    expected = 5 * (share * probabilities.mean(0)).sum()
    torch.testing.assert_close(statistics.balance_loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(statistics.chosen.view(-1, 2), chosen)
    assert statistics.dropped == 0


def test_balance_loss_is_top_k_when_routing_is_uniform():
    moe = make(MoE, num_experts=6, top_k=3)
    torch.nn.init.zeros_(moe.router.weight)
    torch.nn.init.zeros_(moe.router.bias)
    assert moe(torch.randn(1, 16, 32, dtype=torch.float64))[1].balance_loss.item() == pytest.approx(3.0)


def test_experts_without_tokens_are_never_fetched():
    moe = make(MoE)
    asked = []
    fetch = moe.experts.fetch
    moe.experts.fetch = lambda needed: asked.extend(needed) or fetch(needed)
    _, statistics = moe(torch.randn(1, 1, 32, dtype=torch.float64))
    assert sorted(asked) == statistics.counts.nonzero().flatten().tolist()
    assert len(asked) == 2


def test_experts_may_arrive_in_any_order():
    moe = make(MoE)
    x = torch.randn(2, 8, 32, dtype=torch.float64)
    expected, _ = moe(x)
    fetch = moe.experts.fetch
    moe.experts.fetch = lambda needed: fetch(needed[::-1])
    assert torch.equal(moe(x)[0], expected)


@pytest.mark.parametrize("factor", [0.2, 0.5, 1.0, 3.0])
def test_capacity_drops_and_counts_the_overflow(factor):
    moe = make(MoE, capacity_factor=factor).train()
    x = torch.randn(2, 10, 32, dtype=torch.float64)
    capacity = min(20, math.ceil(factor * 20 * 2 / 5))
    ours, statistics = moe(x)
    theirs, taken = plain_moe(moe, x, capacity)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert statistics.dropped == sum(max(0, count - capacity) for count in taken)
    if factor == 0.2:
        assert statistics.dropped > 0


def test_only_training_drops_tokens_so_logits_do_not_depend_on_the_rest_of_a_batch():
    model = make(DWRTransformer, capacity_factor=0.2)
    tokens = torch.randint(64, (5, 12))
    logits, router = model(tokens)
    torch.testing.assert_close(logits[:1], model(tokens[:1]).logits)
    torch.testing.assert_close(logits, make(DWRTransformer, capacity_factor=None)(tokens).logits)
    assert not any(layer.dropped for layer in router)
    assert all(layer.dropped for layer in model.train()(tokens).router)


def plain_forward(model, tokens):
    """The whole model as DESIGN's formulas read, for one sequence, with explicit attention."""
    config = model.config
    x = model.token_embedding.weight[tokens] + model.position_embedding.weight[: len(tokens)]
    for layer in model.layers:
        a = layer.attention
        heads = []
        for h in range(config.num_heads):
            rows = slice(h * config.d_model // config.num_heads, (h + 1) * config.d_model // config.num_heads)
            q, k, v = (x @ p.weight[rows].T + p.bias[rows] for p in (a.q, a.k, a.v))
            scores = q @ k.T / math.sqrt(q.shape[1])
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v)
        attention = torch.cat(heads, -1) @ a.out.weight.T + a.out.bias
        x = F.layer_norm(x + attention, x.shape[-1:], layer.attention_norm.weight, layer.attention_norm.bias)
        x = F.layer_norm(x + plain_moe(layer.moe, x)[0], x.shape[-1:], layer.moe_norm.weight, layer.moe_norm.bias)
    return F.layer_norm(x, x.shape[-1:], model.norm.weight, model.norm.bias) @ model.output.weight.T


def test_the_model_equals_its_formulas():
    model = make(DWRTransformer)
    tokens = torch.randint(64, (2, 11))
    expected = torch.stack([plain_forward(model, sequence) for sequence in tokens])
    # The router's softmax is float32 by design, so agreement ends there.
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pieces", [[5, 1, 1, 1], [1] * 8, [3, 4, 1], [8]])
def test_decoding_with_a_key_value_cache_equals_one_pass(pieces):
    model = make(DWRTransformer)
    tokens = torch.randint(64, (2, 8))
    cache = KVCache(model.config, 2, like=model.norm.weight)
    logits = torch.cat([model(piece, cache).logits for piece in tokens.split(pieces, 1)], 1)
    torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-6, atol=1e-6)
    assert cache.length == 8


def test_more_tokens_than_positions_is_an_error():
    model = make(DWRTransformer)
    with pytest.raises(ValueError, match="17 tokens; the model has 16 positions"):
        model(torch.zeros(1, 17, dtype=torch.long))
    cache = KVCache(model.config, 1, like=model.norm.weight)
    model(torch.zeros(1, 16, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="17 tokens"):
        model(torch.zeros(1, 1, dtype=torch.long), cache)


def test_initialisation_is_small_normal_matrices_and_zero_biases():
    torch.manual_seed(0)
    model = DWRTransformer(make_config(d_model=128, d_ff=256))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert 0.017 < parameter.std() < 0.023, name
            assert abs(parameter.mean()) < 0.005, name
        elif "norm" in name and "weight" in name:
            assert (parameter == 1).all(), name
        else:
            assert (parameter == 0).all(), name


def test_dropout_acts_in_training_only():
    model = make(DWRTransformer, dropout=0.5)
    tokens = torch.randint(64, (1, 8))
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
