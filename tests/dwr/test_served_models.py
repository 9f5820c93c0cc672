"""Models of transformers served from their own checkpoints: the same logits in a bounded memory."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_moe import MODELS, load_eager, save_moe

from dynaroute.dwr import export_model as export_module
from dynaroute.dwr import hub
from dynaroute.dwr.experts import kernel, precision
from dynaroute.dwr.experts.cache import ExpertCache
from dynaroute.dwr.experts.mapping import drop_from_page_cache
from dynaroute.dwr.experts.policies import make_policy
from dynaroute.dwr.experts.prefetch import make_prefetcher
from dynaroute.dwr.experts.usage import UsageCounter, backbone_hash, load_profile
from dynaroute.dwr.export_model import export_model
from dynaroute.dwr.hub import HubModel, locate_checkpoint
from dynaroute.errors import DynarouteError

TOKENS = torch.randint(300, (40,), generator=torch.Generator().manual_seed(3)).tolist()


@torch.inference_mode()
def decoded(model: HubModel, cache: ExpertCache, tokens=TOKENS) -> torch.Tensor:
    """The logits [14, V] after a prompt of 27 tokens and each of 13 more."""
    model.bind(cache)
    forward = model.start_text()
    return torch.stack([forward(tokens[:27]), *(forward([token]) for token in tokens[27:])])


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_transformers_eager_experts(tmp_path, monkeypatch, kind, dtype, shard):
    monkeypatch.setattr(precision, "WIDENED_AT_ONCE", 500)  # a few rows at a time
    folder = save_moe(tmp_path, kind, dtype, shard)
    assert (len(list(folder.glob("*.safetensors"))) > 3) == (shard == "40KB")
    model, eager = HubModel(folder), load_eager(folder)
    with ExpertCache(model.store, 3) as cache, torch.inference_mode():
        found = decoded(model, cache)
        expected = eager(torch.tensor([TOKENS])).logits[0, 26:]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert model.model.model.layers[0].self_attn.o_proj.weight.dtype == dtype
        if dtype == torch.float32:  # the same products
            model.bind(cache)
            assert torch.equal(model.model(torch.tensor([TOKENS])).logits[0], eager(torch.tensor([TOKENS])).logits[0])


@pytest.mark.parametrize("kind", ["olmoe", "deepseek_v3"])
def test_no_capacity_policy_or_prefetcher_changes_a_logit(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(hub, "WAVE", 10)
    model = HubModel(save_moe(tmp_path, kind, torch.bfloat16))
    config = model.store.config
    counter = UsageCounter("", config.num_layers, config.num_experts)
    with ExpertCache(model.store, 16, counter=counter) as cache:
        expected = decoded(model, cache)
    counter.save(tmp_path / "usage.json")
    model.store.usage = load_profile(tmp_path / "usage.json", "", config.num_layers, config.num_experts)
    assert [sum(layer) for layer in model.store.usage.load] == [2 * 40, 2 * 40]
    assert sum(map(sum, model.store.usage.transitions[0])) == 2 * 2 * 40
    cells = itertools.product(
        [(1, False), (3, False), (9, True)],
        ["lru", "pinned", "next_use", "least_stale", "token_path"],
        ["none", "transition", "gate"],
    )
    for (capacity, per_layer), policy, prefetch in cells:
        prefetcher = make_prefetcher(prefetch, model.store, model.routers(), 3)
        load = model.store.usage.load
        with ExpertCache(model.store, capacity, make_policy(policy, load), per_layer, prefetcher) as cache:
            assert torch.equal(decoded(model, cache), expected)
            assert cache.statistics.misses > 0


def test_a_prompt_is_read_in_waves(tmp_path, monkeypatch):
    model = HubModel(save_moe(tmp_path))
    lengths = []
    model.model.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    with ExpertCache(model.store, 2) as cache:
        whole = decoded(model, cache)
        monkeypatch.setattr(hub, "WAVE", 10)
        assert lengths == [27] + [1] * 13
        torch.testing.assert_close(decoded(model, cache), whole, rtol=0, atol=1e-5)
        assert lengths[14:] == [10, 10, 7] + [1] * 13


@pytest.mark.parametrize("kind", MODELS)
def test_gate_lookahead_predicts_what_the_next_layers_router_chooses(tmp_path, kind):
    groups = {"n_group": 2, "topk_method": "group_limited_greedy"} if kind == "deepseek_v2" else {}
    model = HubModel(save_moe(tmp_path, kind, **groups))
    gate = list(hub.expert_blocks(model.model).values())[1].gate
    if kind == "deepseek_v3":
        gate.e_score_correction_bias.normal_(generator=torch.Generator().manual_seed(1))
    prefetcher = make_prefetcher("gate", model.store, model.routers(), 5)
    for state in torch.randn(20, 1, 32, generator=torch.Generator().manual_seed(2)):
        chosen = gate.forward(state)[2].flatten().tolist()
        assert {*prefetcher.predict(0, state, None).experts[:2]} == {*chosen}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize(("tokens", "compiler"), [(1, True), (1, False), (5, True)])
def test_a_product_with_fewer_bits_is_that_of_the_widened_weights(monkeypatch, dtype, tokens, compiler):
    if not compiler:
        monkeypatch.setattr(kernel, "_compiled", dict)
    weights, scale = (torch.randn(3000, 333) * 9).to(dtype), torch.rand(3000) if dtype == torch.int8 else None
    x = torch.randn(tokens, 333)
    expected = x.double() @ weights.double().T * (1 if scale is None else scale.double())
    torch.testing.assert_close(precision.linear(x, weights, scale).double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
@pytest.mark.parametrize("dtype", kernel.DTYPES)
def test_one_tokens_product_is_the_same_wherever_weights_are(dtype):
    memory, x = torch.empty(100 * 333 + 64, dtype=dtype), torch.randn(1, 333)
    weights = (torch.randn(100, 333) * 9).to(dtype)
    found = [kernel.product(x, memory[start:][: 100 * 333].view(100, 333).copy_(weights)) for start in (0, 1, 7, 32)]
    assert all(torch.equal(one, found[0]) for one in found[1:])


def test_without_a_compiler_there_is_no_kernel(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert kernel._compiled.__wrapped__() == {}
    assert kernel.product(torch.zeros(1, 8), torch.zeros(4, 8, dtype=torch.float16)) is None


@torch.inference_mode()
@pytest.mark.parametrize("kind", MODELS)
def test_preferred_experts_are_chosen_by_the_routers_own_rule_and_weighed_by_its_scores_alone(tmp_path, kind):
    model = HubModel(save_moe(tmp_path, kind, num_experts_per_tok=2))
    gate = next(block for block in model._blocks.values()).gate
    x, cache = torch.randn(1, 30, 32), ExpertCache(model.store, 4, cache_aware=0.0)
    model.bind(cache)
    scores, weights, chosen = gate(x)
    monkey = torch.zeros(8)  # what is preferred
    cache.preference = lambda layer: monkey
    own = gate(x)
    assert torch.equal(own[2], chosen)
    torch.testing.assert_close(own[1], weights)
    monkey[[2, 3]] = 3.0  # of one group
    bias = getattr(gate, "e_score_correction_bias", torch.zeros(8))
    for token in range(30):
        raised = scores[token] + monkey
        rank = raised.sigmoid() + bias if kind == "deepseek_v3" else raised
        if kind == "deepseek_v3":  # the best group of two, by its best two
            best = max(range(2), key=lambda group: rank.view(2, 4)[group].topk(2).values.sum())
            rank = rank.masked_fill(torch.arange(8) // 4 != best, -torch.inf)
        own = gate(x[:, token])
        assert set(own[2][0].tolist()) == set(rank.topk(2).indices.tolist())
        probability = scores[token].sigmoid() if kind == "deepseek_v3" else scores[token].softmax(0)
        expected = probability[own[2][0]]
        if kind in ("mixtral", "qwen3_moe", "deepseek_v3"):
            expected = expected / expected.sum()
        torch.testing.assert_close(own[1][0], expected * getattr(gate, "routed_scaling_factor", 1.0))
    cache.close()


@pytest.mark.parametrize("kind", ["olmoe", "deepseek_v3"])
def test_cache_aware_routing_hits_more_and_is_exact_when_it_is_off(tmp_path, kind):
    model = HubModel(save_moe(tmp_path, kind))
    found = []
    for cache_aware in (0.0, 5.0):
        with ExpertCache(model.store, 6, cache_aware=cache_aware) as cache:
            logits = decoded(model, cache)
            found.append((logits, cache.statistics.hits))
            with cache.exact_routing():
                assert torch.equal(decoded(model, cache), found[0][0])
    assert found[1][1] > found[0][1]
    assert not torch.equal(found[0][0], found[1][0])


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_oss"}, "model_type = 'gpt_oss': supported are deepseek_v2, deepseek_v3, mixtral,"),
        ({"model_type": None}, "model_type = None: supported are"),
        ({"model_type": []}, r"config.json: model_type = \[\]: supported are"),
        ({"hidden_act": "tilu"}, "config.json: hidden_act = 'tilu': must be one of gelu, "),
        (
            {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
            "config.json: rope_type = 'spiral': must be one of default,",
        ),
        ({"num_experts_per_tok": 9}, "config.json: num_experts_per_tok = 9: must be 1 to 8, the experts of a layer"),
        ({"num_experts_per_tok": 0}, "config.json: num_experts_per_tok = 0: must be 1 to 8"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: the weights must be fp32, bf16 or"),
        ({"num_experts": 9}, r"no file has the tensor model.layers.0.mlp.experts.8.gate_proj.weight"),
        ({"vocab_size": 301}, r"embed_tokens.weight is \[300, 32\], not \[301, 32\] as config.json says"),
        ({"num_hidden_layers": "two"}, "its config.json cannot be loaded: "),
    ],
)
def test_a_model_that_cannot_be_served_is_refused(tmp_path, changes, message):
    edit_config(save_moe(tmp_path), **changes)
    with pytest.raises(DynarouteError, match=message) as caught:
        HubModel(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_stacked_experts_are_refused(tmp_path):
    folder = save_moe(tmp_path)
    load_eager(folder).save_pretrained(folder, save_original_format=False)
    with pytest.raises(DynarouteError, match=r"no file has the tensor model.layers.0.mlp.experts.0.gate_proj.weight"):
        HubModel(folder)


def test_a_model_of_the_hub_is_fetched_at_its_commit(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *path, **how: asked.update(how) or tmp_path)
    assert locate_checkpoint("some/model", "0" * 40) == tmp_path
    assert asked["revision"] == "0" * 40
    with pytest.raises(DynarouteError, match=r"^--model.revision = None: .* a commit must be named"):
        locate_checkpoint("some/model", None)
    with pytest.raises(DynarouteError, match=r"--revision main: must be a commit of some/model"):
        locate_checkpoint("some/model", "main")
    with pytest.raises(DynarouteError, match="no such folder"):
        locate_checkpoint("./nowhere", None)
    with pytest.raises(DynarouteError, match=r"--revision main: .* is a local folder"):
        locate_checkpoint(str(tmp_path), "main")


def test_a_profile_is_refused_for_another_model(tmp_path):
    model, other = HubModel(save_moe(tmp_path / "a")), HubModel(save_moe(tmp_path / "b", num_hidden_layers=1))
    UsageCounter(backbone_hash(model.model), 2, 8).save(tmp_path / "usage.json")
    assert load_profile(tmp_path / "usage.json", backbone_hash(model.model), 2, 8).load == [[0.0] * 8] * 2
    with pytest.raises(DynarouteError, match=r"usage.json: model = \w{12}: the profile must be of this model, \w{12}$"):
        load_profile(tmp_path / "usage.json", backbone_hash(other.model), 1, 8)
    with pytest.raises(DynarouteError, match=r"usage.json: usage: must be 3 layers of 8 experts"):
        load_profile(tmp_path / "usage.json", backbone_hash(model.model), 3, 8)


# --- the budget ----------------------------------------------------------------------------------------------------

CONSTANT, MEMORY = 24 * 2**20, 12 * 2**20
LIMITED = f"""
import sys, json, torch
from pathlib import Path
group = Path(sys.argv[2])
(group / "cgroup.procs").write_text("0")
def usage(): return int((group / "memory.usage_in_bytes").read_text())
from dynaroute.dwr.export_model import export_model
from typing import get_args
from dynaroute.config.dwr import PolicyName
from dynaroute.dwr.hub import HubModel
from dynaroute.dwr.experts.cache import ExpertCache
from dynaroute.dwr.experts.policies import make_policy
from dynaroute.dwr.experts.prefetch import make_prefetcher
model = HubModel(Path(sys.argv[1]))
config, size = model.store.config, model.store.expert_bytes
tokens = torch.randint(300, (410,), generator=torch.Generator().manual_seed(0)).tolist()
@torch.inference_mode()
def run(capacity, policy="lru", prefetch="none"):
    prefetcher = make_prefetcher(prefetch, model.store, model.routers(), config.top_k)
    policy = make_policy(policy, [[0.0] * config.num_experts] * config.num_layers)
    with ExpertCache(model.store, capacity, policy, False, prefetcher) as cache:
        model.bind(cache)
        forward = model.start_text()
        forward(tokens[:400])
        return [forward([token])[:8].tolist() for token in tokens[400:]]
expected = run(1)
kv = 2 * config.num_layers * 256 * 4 * len(tokens)
base = usage()
limit = base - size + kv + {CONSTANT} + {MEMORY}
assert limit < base + model.store.num_experts * size / 2, "the limit must be below what all experts take"
(group / "memory.limit_in_bytes").write_text(str(limit))
(group / "memory.failcnt").write_text("0")
for policy in get_args(PolicyName):
    assert run({MEMORY} // size, policy, "none" if policy == "lru" else "gate") == expected
print((group / "memory.failcnt").read_text())
"""


def test_memory_beyond_backbone_and_a_constant_stays_within_the_budget(tmp_path):
    """The limit is never reached, by the page cache included: `failcnt` counts when it is."""
    group = Path("/sys/fs/cgroup/memory") / f"dynaroute-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_experts": 32, "num_hidden_layers": 4}
        folder = save_moe(tmp_path, "olmoe", torch.bfloat16, "9MB", **sizes, max_position_embeddings=512)
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            drop_from_page_cache(path)  # so that what is read counts for the group
        command = [sys.executable, "-c", LIMITED, folder, group]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr
    finally:
        group.rmdir()


# --- export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_an_export_serves_the_same_model(tmp_path, kind, precision):
    folder = save_moe(tmp_path / "model", kind, torch.bfloat16 if precision == "bf16" else torch.float32)
    export_model(folder, tmp_path / "export", precision)
    exported, model = HubModel(tmp_path / "export"), HubModel(folder)
    with ExpertCache(exported.store, 3) as cache, ExpertCache(model.store, 3) as own:
        found, expected = decoded(exported, cache), decoded(model, own)
    if precision == "int8":
        assert 0.02 > (found - expected).abs().max() / expected.abs().max() > 0
        assert exported.store.expert_bytes < 0.3 * model.store.expert_bytes
    else:
        assert torch.equal(found, expected)
        tokens = torch.tensor([TOKENS])
        assert torch.equal(load_eager(tmp_path / "export")(tokens).logits, load_eager(folder)(tokens).logits)


def test_an_interrupted_export_resumes(tmp_path, monkeypatch):
    folder = save_moe(tmp_path / "model")
    export_model(folder, tmp_path / "whole", "bf16")
    written = []
    original = export_module.contents

    def failing(store, file, *arguments):
        written.append(file)
        if len(written) == 6:
            raise KeyboardInterrupt
        return original(store, file, *arguments)

    monkeypatch.setattr(export_module, "contents", failing)
    with pytest.raises(KeyboardInterrupt):
        export_model(folder, tmp_path / "export", "bf16")
    assert not (tmp_path / "export").exists()
    export_model(folder, tmp_path / "export", "bf16")
    assert len(written) == 6 + 17 - 5
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "export").iterdir())
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "export" / name).read_bytes() for name in names)


def test_an_export_killed_while_it_hashes_keeps_its_files(tmp_path, monkeypatch):
    folder = save_moe(tmp_path / "model")

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "sha256", killed)
        with pytest.raises(KeyboardInterrupt):
            export_model(folder, tmp_path / "export", "bf16")
    monkeypatch.delattr(export_module, "contents")  # no file is written again
    export_model(folder, tmp_path / "export", "bf16")
    assert not (tmp_path / "export" / "source.json").exists()
    assert "source.json" not in json.loads((tmp_path / "export" / "manifest.json").read_text())["files"]
    HubModel(tmp_path / "export")


def test_an_export_is_refused_without_room_and_in_place_of_another(tmp_path, monkeypatch):
    folder = save_moe(tmp_path / "model")
    with pytest.raises(DynarouteError, match=f"--output {folder}: exists"):
        export_model(folder, folder, "bf16")
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(DynarouteError, match=r"export: 0.00 GiB are needed, 0.00 GiB are free"):
        export_model(folder, tmp_path / "export", "bf16")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"files = \[\]: must be the SHA-256 of each file"),
        ({"../m/config.json": "0" * 64}, "files names '../m/config.json': must be the name of a file beside it"),
        ({"..": "0" * 64}, "files names '..': must be the name of a file beside it"),
        ({"a\nb": "0" * 64}, r"files names 'a\\nb': must be the name of a file beside it"),
        ({"config.json": None}, "files.config.json = None: must be a SHA-256"),
        ({"config.json": "0"}, "files.config.json = '0': must be a SHA-256"),
        (None, "lacks 'files'"),
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path, files, message):
    folder = save_moe(tmp_path / "m")
    (folder / "manifest.json").write_text(json.dumps({} if files is None else {"files": files}))
    with pytest.raises(DynarouteError, match=f"manifest.json: {message}") as caught:
        HubModel(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["expert_layer1_id2.safetensors", "backbone.safetensors", "config.json"])
def test_a_changed_file_of_an_export_is_refused(tmp_path, file):
    export_model(save_moe(tmp_path / "model"), tmp_path / "export", "bf16")
    path = tmp_path / "export" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content if file != "config.json" else content + b" ")
    with pytest.raises(DynarouteError, match=f"{file}: .*(SHA-256 is|damaged)"):
        model = HubModel(tmp_path / "export")
        with ExpertCache(model.store, 3) as cache:
            list(cache.fetch(1, [0, 2]))
