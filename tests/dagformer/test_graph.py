import gc

import pytest
import torch
import torch.nn.functional as F
from dag_reference import reference_forward
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from dynaroute.dagformer import graph
from dynaroute.dagformer.gates import cascade, dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.errors import DynarouteError

VOCAB = 61
INPUT_NORMS = ["none", "gate_mean", "rms_post", "ln_post", "rms_pre"]
BASES = {  # settings of each architecture, for an even number of heads
    "olmo2": {},
    "olmo2_gqa": {"num_key_value_heads": 2},
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama_gqa": {"model_type": "llama", "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "llama_mqa": {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 6},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 10, "attention_bias": True},
}
OTHERS = [name for name in BASES if name != "olmo2"]


def make_base(layers: int = 3, heads: int = 2, d_model: int = 16, dtype=torch.float32, **settings) -> PreTrainedModel:
    """A random base whose norms differ from 1, its biases from 0, and whose eps matters, in the given dtype."""
    torch.manual_seed(layers * 100 + heads)
    sizes = {"hidden_size": d_model, "intermediate_size": 2 * d_model, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "vocab_size": VOCAB, "max_position_embeddings": 64}
    sizes |= {"pad_token_id": None, "eos_token_id": None, "initializer_range": 0.2, "model_type": "olmo2"}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes | settings))
    for name, parameter in base.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return base.to(dtype).eval()


def make_tokens(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(batch * length))


def open_gates(base: PreTrainedModel, batch: int, dtype=torch.float32) -> Tensor:
    mask = dag_mask(base.config.num_hidden_layers, base.config.num_attention_heads)
    return mask.to(dtype).repeat(batch, 1, 1)


def random_gates(base: PreTrainedModel, batch: int, dtype=torch.float64) -> Tensor:
    mask = open_gates(base, batch, dtype)
    return torch.rand(mask.shape, generator=torch.Generator().manual_seed(3), dtype=dtype) * mask


def nll(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def values_and_gradients(base: PreTrainedModel, batch: int, length: int, input_norm: str, trainable: bool = False):
    """Of our forward, and of the formulas: logits, and the gradients of all that takes them, by name."""
    tokens, found = make_tokens(batch, length), []
    dag = DagForward(base, input_norm, trainable)
    for forward in (dag, lambda t, a: reference_forward(base, t, a, input_norm)):
        adjacency = random_gates(base, batch).requires_grad_()
        base.zero_grad()
        logits = forward(tokens, adjacency)
        nll(logits, tokens).backward()
        gradients = {name: parameter.grad for name, parameter in base.named_parameters() if trainable}
        found.append((logits.detach(), gradients | {"A": adjacency.grad}))
    return found


SHAPES = [(1, 2, 1, 5), (2, 1, 3, 7), (3, 4, 2, 1), (4, 2, 2, 9), (5, 2, 1, 6), (8, 2, 2, 17), (11, 3, 1, 4)]


@pytest.mark.parametrize(("layers", "heads", "batch", "length"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance", "of_nll"), [("float32", 1e-4, 1e-5), ("float64", 1e-9, 1e-9)])
@pytest.mark.parametrize("name", BASES)
def test_all_ones_adjacency_reproduces_the_base_model(layers, heads, batch, length, dtype, tolerance, of_nll, name):
    dtype, settings = getattr(torch, dtype), BASES[name]
    if heads % settings.get("num_key_value_heads", 1):
        settings = settings | {"num_key_value_heads": 1}
    base = make_base(layers, heads, 8 * heads, dtype, **settings)
    tokens = make_tokens(batch, length)
    with torch.no_grad():
        expected = base(tokens).logits
        for input_norm in ("none", "gate_mean"):
            actual = DagForward(base, input_norm)(tokens, open_gates(base, batch))
            assert actual.dtype == dtype
            assert (actual - expected).abs().max() < tolerance
            if length > 1:
                assert abs(nll(actual, tokens) - nll(expected, tokens)) < of_nll


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 4},
        {"hidden_act": "gelu"},
        {"rms_norm_eps": 1e-2},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", [BASES["olmo2"], BASES["qwen3"]], ids=["olmo2", "qwen3"])
def test_variants_of_rope_activation_and_head_are_the_bases_own(settings, architecture):
    torch.manual_seed(0)
    config = make_base(4, 2, **architecture).config.to_dict() | settings
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).double().eval()
    tokens = make_tokens(2, 12)
    with torch.no_grad():
        assert (DagForward(base)(tokens, open_gates(base, 2)) - base(tokens).logits).abs().max() < 1e-9


def test_bf16_is_no_further_from_fp32_than_transformers_own_bf16():
    tokens = make_tokens(4, 32)
    exact = make_base(8, 4, 64)
    rounded = make_base(8, 4, 64, torch.bfloat16)
    with torch.no_grad():
        truth = exact(tokens).logits
        transformers_error = (rounded(tokens).logits.float() - truth).square().mean().sqrt()
        our_error = (DagForward(rounded)(tokens, open_gates(exact, 4)).float() - truth).square().mean().sqrt()
    assert our_error < 1.02 * transformers_error  # the same error, up to the luck of single roundings


@pytest.fixture
def exact_norms(monkeypatch):
    """transformers' RMSNorm rounds to fp32 inside, also in a float64 model: the formulas do not."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for norm in (Olmo2RMSNorm, LlamaRMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


def match_the_formulas(base: PreTrainedModel, batch: int, input_norm: str, trainable: bool = False) -> None:
    (logits, gradients), (expected_logits, expected) = values_and_gradients(base, batch, 5, input_norm, trainable)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-9, atol=1e-9)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-7, atol=1e-10, msg=name)
    valid, gates = open_gates(base, batch).bool(), gradients["A"]
    if base.config.num_hidden_layers > 1:
        if input_norm != "gate_mean" or base.config.num_attention_heads > 1:  # else a target's one gate is the mean
            assert (gates[valid] != 0).all()
        assert (gates[~valid] == 0).all()


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("input_norm", INPUT_NORMS)
@pytest.mark.parametrize("name", BASES)
def test_values_and_gradients_match_the_formulas_node_by_node(name, input_norm, trainable):
    shapes = [(2, 3, 1), (3, 2, 2), (6, 1, 1), (5, 2, 2)] if name == "olmo2" else [(2, 4, 1), (5, 2, 2)]
    shapes = [(1, 2, 1), *shapes] if trainable else shapes  # of a single layer, the base alone has gradients
    for layers, heads, batch in shapes:
        base = make_base(layers, heads, 8 * heads, torch.float64, rms_norm_eps=1e-2, **BASES[name])
        match_the_formulas(base, batch, input_norm, trainable)
    if trainable and name == "olmo2":  # weights of 0, as of a base that was pruned
        for layer in base.model.layers:
            layer.post_attention_layernorm.weight.data[[1, 4]] = 0
        match_the_formulas(base, 2, input_norm, trainable=True)


@pytest.fixture
def heads_in_one_pass(monkeypatch):
    """Heads are sent as on a GPU."""
    make = graph._Exchange.__init__

    def make_for_a_gpu(self, *arguments):
        make(self, *arguments)
        self.in_one_pass = True

    monkeypatch.setattr(graph._Exchange, "__init__", make_for_a_gpu)


@pytest.mark.usefixtures("exact_norms", "heads_in_one_pass")
@pytest.mark.parametrize("input_norm", ["none", "gate_mean", "rms_post", "ln_post"])
@pytest.mark.parametrize("name", ["olmo2", "llama_gqa"])
def test_heads_sent_in_one_pass_match_the_formulas(name, input_norm, monkeypatch):
    monkeypatch.setattr(graph._Send, "forward", None)  # is not called
    for layers, heads, batch in ((2, 4, 1), (5, 2, 2)):
        base = make_base(layers, heads, 8 * heads, torch.float64, rms_norm_eps=1e-2, **BASES[name])
        match_the_formulas(base, batch, input_norm)


def test_heads_sent_in_one_pass_are_as_close_to_fp32_in_bf16(request):
    tokens = make_tokens(4, 32)

    def results(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        base = make_base(6, 4, 64, dtype)
        gates = (0.5 + 0.5 * random_gates(base, 4, torch.float32)).requires_grad_()
        logits = DagForward(base)(tokens, gates).float()
        nll(logits, tokens).backward()
        return logits.detach(), gates.grad[:, dag_mask(6, 4)]

    exact, usual = results(torch.float32), results(torch.bfloat16)
    request.getfixturevalue("heads_in_one_pass")
    for truth, other, found in zip(exact, usual, results(torch.bfloat16), strict=True):
        assert not torch.equal(found, other)
        assert (found - truth).norm() < 1.1 * (other - truth).norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("input_norm", INPUT_NORMS)
def test_a_gpu_computes_what_a_cpu_does(input_norm):
    base = make_base(5, 4, 64)
    tokens, adjacency = make_tokens(2, 32), random_gates(base, 2, torch.float32)
    found = []
    for device in ("cpu", "cuda"):
        gates = adjacency.to(device).requires_grad_()
        logits = DagForward(base.to(device), input_norm)(tokens.to(device), gates)
        nll(logits, tokens.to(device)).backward()
        found.append((logits.detach().cpu(), gates.grad.cpu()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def test_a_trainable_base_with_all_gates_open_gets_the_gradients_of_transformers():
    base = make_base(8, 2, 32)
    tokens, dag, gradients = make_tokens(3, 9), DagForward(base, trainable=True), []
    for forward in (lambda: dag(tokens, open_gates(base, 3)), lambda: base(tokens).logits):
        base.zero_grad()
        nll(forward(), tokens).backward()
        gradients.append({name: parameter.grad for name, parameter in base.named_parameters()})
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-3, atol=1e-6, msg=name)


def test_a_trainable_base_may_change_between_passes():
    base, tokens = make_base(4, 2), make_tokens()
    dag = DagForward(base, trainable=True)
    nll(dag(tokens, open_gates(base, 2)), tokens).backward()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter -= 0.5 * parameter.grad
        assert (dag(tokens, open_gates(base, 2)) - base(tokens).logits).abs().max() < 1e-4


@pytest.mark.usefixtures("exact_norms")
def test_gradients_match_finite_differences():
    base = make_base(3, 2, 16, torch.float64)
    tokens, dag = make_tokens(1, 4), DagForward(base)
    assert torch.autograd.gradcheck(lambda a: nll(dag(tokens, a), tokens), random_gates(base, 1).requires_grad_())


def test_gradients_in_bf16_follow_those_in_fp32():
    tokens, gradients = make_tokens(2, 32), []
    for dtype in (torch.float32, torch.bfloat16):
        base = make_base(4, 4, 64, dtype)
        adjacency = (0.5 + 0.5 * random_gates(base, 2, torch.float32)).requires_grad_()
        nll(DagForward(base)(tokens, adjacency).float(), tokens).backward()
        assert adjacency.grad.dtype == torch.float32
        gradients.append(adjacency.grad[:, dag_mask(4, 4)].flatten())
    assert F.cosine_similarity(*gradients, dim=0) > 0.99


def test_mixing_in_several_pieces_changes_nothing(monkeypatch):
    base, tokens = make_base(6, 2, 16, torch.float64), make_tokens(2, 30)
    results = []
    for scratch in (graph._SCRATCH, 0):
        monkeypatch.setattr(graph, "_SCRATCH", scratch)
        adjacency = random_gates(base, 2).requires_grad_()
        nll(DagForward(base)(tokens, adjacency), tokens).backward()
        results.append(adjacency.grad)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_entries_that_are_not_valid_have_no_effect():
    base = make_base()
    tokens = make_tokens()
    adjacency = random_gates(base, 2, torch.float32)
    invalid = ~dag_mask(3, 2)
    for input_norm in INPUT_NORMS:
        dag = DagForward(base, input_norm)
        with torch.no_grad():
            expected = dag(tokens, adjacency)
            assert torch.equal(dag(tokens, adjacency.masked_fill(invalid, torch.nan)), expected)


@pytest.mark.parametrize("input_norm", INPUT_NORMS)
def test_closed_gates_stay_finite_forward_and_backward(input_norm):
    base = make_base()
    adjacency = torch.zeros(2, 6, 6, requires_grad=True)
    logits = DagForward(base, input_norm)(make_tokens(), adjacency)
    logits.square().sum().backward()
    assert logits.isfinite().all()
    if input_norm != "gate_mean":  # 0 / 0: its gradient has no limit there
        assert adjacency.grad.isfinite().all()


def test_the_layer_0_bug_of_the_hard_cascade_cannot_return():
    base = make_base(4, 2, 16)
    tokens = make_tokens(2, 16)
    dag = DagForward(base)
    with torch.no_grad():
        dense = base(tokens).logits
        fixed = dag(tokens, cascade(open_gates(base, 2), 5.0, 2, hard=True))
        bug = dag(tokens, cascade(open_gates(base, 2), 5.0, 2, hard=True, exempt_first_layer=False))
    assert (fixed - dense).abs().max() < 1e-4
    assert (bug - dense).abs().max() > 1e-2


def test_two_passes_at_once_do_not_share_buffers():
    base = make_base(4, 2, 16, torch.float64)
    dag = DagForward(base)
    tokens = [make_tokens(2, 7), make_tokens(2, 7).flip(1)]
    separate = []
    for t in tokens:
        adjacency = random_gates(base, 2).requires_grad_()
        nll(dag(t, adjacency), t).backward()
        separate.append(adjacency.grad)
    together = random_gates(base, 2).requires_grad_()
    first = nll(dag(tokens[0], together), tokens[0])
    with torch.no_grad():
        dag(tokens[1], 0 * together)
    second = nll(dag(tokens[1], together), tokens[1])
    (first + second).backward()
    torch.testing.assert_close(together.grad, separate[0] + separate[1], rtol=1e-12, atol=1e-14)


def test_a_second_backward_through_a_retained_graph_gives_the_same_gradient():
    base = make_base(4, 2, 16, torch.float64)
    for input_norm in INPUT_NORMS:
        adjacency = random_gates(base, 2).requires_grad_()
        loss = nll(DagForward(base, input_norm)(make_tokens(), adjacency), make_tokens())
        (first,) = torch.autograd.grad(loss, adjacency, retain_graph=True)
        (second,) = torch.autograd.grad(loss, adjacency)
        assert torch.equal(first, second)


@pytest.mark.parametrize("input_norm", INPUT_NORMS)
def test_a_second_backward_through_a_trainable_base_is_right_or_refused(input_norm):
    base = make_base(4, 2, 16, torch.float64)
    weights = [parameter for layer in base.model.layers for parameter in layer.parameters()]
    dag = DagForward(base, input_norm, trainable=True)
    loss = nll(dag(make_tokens(), random_gates(base, 2).requires_grad_()), make_tokens())
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    if input_norm in ("rms_post", "ln_post"):  # these keep what q, k and v read
        for one, other in zip(first, torch.autograd.grad(loss, weights), strict=True):
            assert torch.equal(one, other)
    else:
        with pytest.raises(DynarouteError, match="a second backward pass through one forward"):
            torch.autograd.grad(loss, weights)


def test_buffers_are_reused_and_hold_two_copies_of_the_heads_and_one_of_the_gradient():
    base, tokens, addresses = make_base(6, 4, 64), make_tokens(2, 16), set()
    dag = DagForward(base)
    for _ in range(3):
        nll(dag(tokens, open_gates(base, 2).requires_grad_()), tokens).backward()
        gc.collect()
        addresses.add(dag._spare.data_ptr())
    assert len(addresses) == 1
    one_copy = tokens.numel() * 5 * (4 + 1) * 64
    assert dag._spare.numel() <= 3 * one_copy + graph._SCRATCH


def test_autocast_around_it_changes_nothing():
    base = make_base()
    with torch.no_grad():
        expected = DagForward(base)(make_tokens(), open_gates(base, 2))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(DagForward(base)(make_tokens(), open_gates(base, 2)), expected)


def test_it_follows_a_cast_of_the_module():
    dag = DagForward(make_base()).double()
    with torch.no_grad():
        assert (dag(make_tokens(), open_gates(dag.base, 2)) - dag.base(make_tokens()).logits).abs().max() < 1e-9


SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DagForward(make_base(attention_bias=True)), "attention_bias = True: must be False for olmo2"),
        (
            lambda: DagForward(make_base(model_type="qwen3", head_dim=8, num_key_value_heads=1, **SLIDING)),
            r"Qwen3ForCausalLM: layer_types.1 = 'sliding_attention': .* 'full_attention'",
        ),
        (lambda: DagForward(make_base(model_type="mistral")), "MistralForCausalLM: must be .* olmo2, llama, qwen3"),
        (lambda: DagForward(make_base().model), "Olmo2Model: must be a causal language model"),
        (lambda: DagForward(make_base(), "rms"), "input_norm = 'rms': must be one of none, gate_mean"),
        (lambda: DagForward(make_base())(make_tokens(2), torch.ones(1, 6, 6)), r"\[1, 6, 6\]: must be \[2, 6, 6\]"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(make, message):
    with pytest.raises(DynarouteError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
