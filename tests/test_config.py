"""Settings: what params.yaml may say, and what it is told when it says something else."""

import copy
import math
from functools import reduce
from operator import getitem

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from repository import REPOSITORY
from ruamel.yaml import YAML

from dynaroute import config
from dynaroute.config import load_settings, read_yaml
from dynaroute.config.dwr import DWRArchitecture
from dynaroute.config.schema import Section
from dynaroute.errors import DynarouteError

DEFAULT = REPOSITORY / "params.yaml"
PAPER = REPOSITORY / "params/paper.yaml"
STREAM = {"kind": "dolma_stream", "path": "somebody/texts", "revision": "abc", "addresses": "urls/v1.txt"}


def load_with(tmp_path, changes):
    """Loads the default with `changes`, {dotted key: value}; None as a value is a value, `...` removes the key."""
    data = copy.deepcopy(read_yaml(DEFAULT))
    for key, value in changes.items():
        *path, last = key.split(".")
        at = data
        for part in path:
            at = at[part]
        if value is ...:
            del at[last]
        else:
            at[last] = value
    path = tmp_path / "params.yaml"
    YAML(typ="safe").dump(data, path)
    return load_settings(path)


def keys_of(section):
    """The nested keys of a settings class; what is a dictionary of names or a choice of kinds has no fixed ones."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from (f"{name}.{key}" for key in keys_of(field.annotation))
        else:
            yield name


def keys_in(data):
    for name, value in data.items():
        if (
            isinstance(value, dict)
            and "kind" not in value
            and name not in ("corpora", "dwr_runs", "machines", "models", "planted", "primary", "variants")
        ):
            yield from (f"{name}.{key}" for key in keys_in(value))
        else:
            yield name


@pytest.mark.parametrize("path", [DEFAULT, PAPER], ids=["default", "paper"])
def test_both_parameter_files_validate_and_hold_exactly_the_keys_of_the_settings(path):
    settings = load_settings(path)
    assert sorted(keys_in(read_yaml(path))) == sorted(keys_of(type(settings)))


@pytest.mark.parametrize("path", [*REPOSITORY.glob("*.yaml"), *REPOSITORY.glob("*/*.yaml")], ids=lambda path: path.name)
def test_dvc_reads_what_the_project_reads(path):
    """DVC's parser is libyaml, which refuses a plain `a?` in a flow mapping, for one."""
    assert YAML(typ="safe").load(path.read_text()) == read_yaml(path)


def test_the_paper_file_is_the_seeds_model():
    dwr = load_settings(PAPER).dwr
    own, training = dwr.model_dump(), dwr.training
    sizes = [own[key] for key in ("d_model", "d_ff", "num_layers", "num_heads", "num_experts", "top_k", "max_seq_len")]
    assert sizes == [512, 2048, 6, 8, 16, 2, 512]
    assert (training.batch_size, training.epochs, training.warmup_steps) == (16, 10, 200)
    assert (training.lr, training.min_lr, training.betas, training.weight_decay) == (3e-4, 3e-5, [0.9, 0.95], 0.1)


def test_scientific_notation_as_dvc_writes_it_is_a_float(tmp_path):
    text = DEFAULT.read_text().replace("tau_final: 0.2\n", "tau_final: 1e-05\n")
    (tmp_path / "params.yaml").write_text(text)
    assert load_settings(tmp_path / "params.yaml").tau_final == 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dwr.top_k": 9}, "dwr.top_k = 9: must be at most num_experts = 8"),
        ({"dwr.d_model": 130}, "dwr.d_model = 130: must be divisible by num_heads = 4"),
        ({"dwr.d_ff": 250}, "dwr.d_ff = 250: must be a multiple of 16"),
        ({"dwr.top_k": "2"}, "dwr.top_k = '2': input should be a valid integer"),
        ({"dwr.top_k": True}, "dwr.top_k = True: input should be a valid integer"),
        ({"dwr.training.lr": -1.0}, "dwr.training.lr = -1.0: input should be greater than 0"),
        ({"dwr.training.lr": float("nan")}, "dwr.training.lr = nan: input should be"),
        ({"dwr.training.micro_batch_size": 5}, "dwr.training.micro_batch_size = 5: must divide batch_size = 8"),
        ({"dwr.training.min_lr": 1.0}, "dwr.training.min_lr = 1.0: must be at most lr"),
        ({"dwr.training.validate_every": "never"}, "dwr.training.validate_every = 'never': input should be 'epoch' or"),
        ({"dwr.topk": 3}, "dwr.topk = 3: unknown key; did you mean top_k?"),
        ({"sed": 3}, "sed = 3: unknown key; did you mean seed?"),
        ({"dwr.d_ff": ...}, "dwr.d_ff is missing"),
        ({"dwr.balance": "none"}, "dwr.balance = 'none': input should be 'auxiliary', 'auxiliary_accumulated' or"),
        ({"dwr.balance": "loss_free"}, "dwr.balance_coefficient = 0.01: must be 0.0 with balance = loss_free"),
        ({"dwr.cache_prior": 1.0, "dwr.cache_prior_experts": 9}, "dwr.cache_prior_experts = 9: must be top_k = 2"),
        ({"dwr.corpus": "wiki"}, "dwr.corpus = 'wiki': must be among corpora: docs"),
        ({"corpora.docs.source.kind": "ftp"}, "corpora.docs.source.kind = 'ftp': must be one of"),
        ({"corpora.docs.source.kind": ...}, "corpora.docs.source.kind = None: must be one of installed_text, hub"),
        ({"corpora.docs.source": "hub"}, "corpora.docs.source = 'hub': must be a mapping with a kind: installed_text,"),
        ({"corpora.docs.tokenizer": None}, "corpora.docs.tokenizer = None: must be a mapping with a kind: bpe, gpt2"),
        ({"corpora.docs.split": 3}, "corpora.docs.split = 3: must be official, or a mapping with the keys validation,"),
        ({"corpora.docs.split": "offical"}, "corpora.docs.split = 'offical': must be official, or a mapping"),
        ({"corpora": None}, "corpora = None: must be a mapping"),
        ({"dwr": 3}, "dwr = 3: must be a mapping with the keys d_model, d_ff"),
        ({"dwr.training": []}, "dwr.training = []: must be a mapping with the keys batch_size"),
        ({"dagformer.encoder": {}}, "dagformer.encoder.kind = None: must be one of base, hub"),
        ({"dwr.also_validate_on": ["dosc"]}, "dwr.also_validate_on = 'dosc': must be among corpora: docs"),
        ({"dwr.also_validate_on": ["docs"]}, "dwr.also_validate_on = 'docs': must not name dwr.corpus"),
        ({"launcher": " "}, "launcher = ' ': must be a command"),
        ({"launcher": "torchrun 'x"}, """launcher = "torchrun 'x": must be a command"""),
        ({"seed": 2**63}, "seed = 9223372036854775808: input should be less than or equal to 9223372036854775807"),
        ({"steps": 5, "warmup_steps": 6}, "warmup_steps = 6: must be at most steps = 5"),
        ({"variants.A5.steps": 1, "warmup_steps": 2}, "variants.A5.warmup_steps = 2: must be at most steps = 1"),
        ({"variants.A5.from": []}, "variants.A5.from = []: must be one of base, planted, A1"),
        ({"corpora.docs.split": "official"}, "corpora.docs.split = 'official': installed_text has no official splits"),
        ({"corpora.docs.split": {"skip": 3, "test": 1}}, "corpora.docs.split.validation is missing"),
        ({"corpora.docs.split": {"skip": -1, "validation": 1, "test": 1}}, "split.skip = -1: input should"),
        ({"corpora.docs.split": {"skip": 1, "validation": 0.1, "test": 1}}, "split.validation = 0.1: input"),
        ({"corpora.docs.source": {**STREAM, "files": 3}}, "corpora.docs.tokenizer.kind = 'bpe': must be gpt2 or"),
        ({"corpora.docs.source": {**STREAM, "files": 0}}, "corpora.docs.source.files = 0: input should be greater"),
        ({"corpora.docs.split.test": 0.97}, "corpora.docs.split.test = 0.97: validation + test must be below 1"),
        ({"tau_final": 0.0}, "tau_final = 0.0: input should be greater than or equal to 0.000001"),
        ({"variants.A5.tau_init": -1.0}, "variants.A5.tau_init = -1.0: input should be greater than or equal to"),
        ({"variants.A5.tau_int": 1.0}, "variants.A5.tau_int = 1.0: unknown key; did you mean tau_init?"),
        ({"variants.A5.micro_batch_size": 3}, "variants.A5.micro_batch_size = 3: must divide batch_size"),
        ({"variants.A5.early_stopping_patience": 3}, "variants.A5.early_stopping_patience = 3: is no knob of a"),
        ({"variants.A5.precision": "bf16"}, "variants.A5.precision = 'bf16': is no knob of a variant: a predictor is"),
        ({"precision": "fp32"}, "precision = 'fp32': is no knob of a variant: a predictor is trained in fp32"),
        ({"dagformer.precision": "fp16"}, "dagformer.precision = 'fp16': input should be 'fp32' or 'bf16'"),
        ({"early_stopping_patience": None}, "early_stopping_patience = None: is no knob of a variant: its tau and"),
        ({"variants.A5.from": "B1"}, "variants.A5.from = 'B1': must be one of base, planted, A1"),
        ({"variants.A5": {}}, "variants.A5.from = None: must be one of base, planted, A1"),
        ({"variants.P2": {"from": "P1", "rank": 16}}, "variants.P2.rank = 16: must be 4, as in P1"),
        ({"variants.P2": {"from": "P1", "cascade": "learnable"}}, "variants.P2.cascade = 'learnable': must be off"),
        ({"variants.P2": {"from": "A11", "cascade": "off"}}, "variants.P2.cascade = 'off': must be learnable, as in"),
        ({"variants.P2": {"from": "A11", "cascade_k": 1.0}}, "variants.P2.cascade_k = 1.0: must be 5.0, as in A11"),
        ({"variants.P2": {"from": "P1", "init_logit": -3.0}}, "variants.P2.init_logit = -3.0: must be 15.0, as in P1"),
        ({"variants.P2": {"from": "P1", "base_lr": 1e-4}}, "variants.P2.base_lr = 0.0001: must be 0, as in P1"),
        ({"variants.P2": {"from": "J1", "base_lr": 0.0}}, "variants.P2.base_lr = 0.0: must be above 0, as in J1"),
        ({"variants.baseline": {"from": "base"}}, "variants.baseline = {'from': 'base'}: this name stands for the"),
        ({"variants.random": {"from": "base"}}, "variants.random = {'from': 'base'}: this name stands for the base"),
        ({"dagformer.planted": None}, "variants.planted_C1.from = 'planted': must be one of base, A1"),
        ({"dagformer.planted.open_share": 1.0}, "dagformer.planted.open_share = 1.0: input should be less than 1"),
        ({"analysis.variants": ["P1", "planted_P1"]}, "analysis.variants = 'planted_P1': must start from base"),
        ({"analysis.primary.text.right": ["planted_C1"]}, "analysis.primary.text = ['P1', 'P1s1', 'P1s2'"),
        ({"variants.P1.from": "P2"}, "variants.P2.from = 'P1': must be one of base, planted, A1"),
        ({"variants.a/b": {"from": "base"}}, "a/b"),
        ({"dwr_runs": {}}, "dwr_runs = []: must have a reference, which the others override"),
        ({"dwr_runs.reference": 3}, "dwr_runs.reference = 3: must be a mapping"),
        ({"dwr_runs.new": {"d_ff": 32}}, "dwr_runs.new.corpus = None: must be among corpora: docs"),
        ({"dwr_runs.reference.corpus": []}, "dwr_runs.reference.corpus = []: must be among corpora: docs"),
        ({"dwr_runs.reference.train_windows": ...}, "dwr_runs.reference.train_windows is missing"),
        ({"dwr_runs.reference.d_ff": 30}, "dwr_runs.reference.d_ff = 30: must be a multiple of 16"),
        ({"dwr_runs.lambda_0.num_experts": 1}, "dwr_runs.lambda_0.num_experts = 1: must be at least 2: with"),
        ({"dwr_runs.lambda_0.experts": 1}, "dwr_runs.lambda_0.experts = 1: unknown key; did you mean num_exp"),
        ({"dwr_runs.more_text.training.lr": 0}, "dwr_runs.more_text.training.lr = 0: input should be greater than 0"),
        ({"dwr_runs.more_text.training": 3}, "dwr_runs.more_text.training = 3: must be a mapping with the keys batch"),
        ({"dwr_runs.more_text.training.validate_every": "x"}, "dwr_runs.more_text.training.validate_every = 'x'"),
        ({"dwr_runs.more_text.also_validate_on": ["docs"]}, "dwr_runs.more_text.also_validate_on = ['docs']: must"),
        ({"dagformer.prefix_tokens": 128}, "dagformer.prefix_tokens = 128: must be below seq_len = 128"),
        ({"dagformer.base.num_heads": 3}, "dagformer.base.hidden_size = 128: must be a multiple of 2 * num_heads = 6"),
        ({"analysis.variants": ["P1", "B7"]}, "analysis.variants = 'B7': must be among variants: A1, A10"),
        ({"analysis.primary.text.right": ["C7"]}, "analysis.primary.text.right = 'C7': must be among variants: A1"),
        ({"analysis.primary.text.left": ["baseline"]}, "analysis.primary.text.left = 'baseline': must be among"),
        ({"analysis.primary.text.right": ["C1", "baseline"]}, "analysis.primary.text.right = 'baseline': must be"),
        ({"analysis.primary.text.mode": "firm"}, "analysis.primary.text.mode = 'firm': input should be 'soft' or"),
        ({"analysis.primary": {}}, "analysis.primary = {}: must have at least 1"),
        ({"analysis.removal_fractions": [1.5]}, "analysis.removal_fractions.0 = 1.5: input should be less than or"),
        ({"analysis.oracle_windows": 1}, "analysis.oracle_windows = 1: input should be greater than or equal to 2"),
        ({"analysis.domain_windows": 1}, "analysis.domain_windows = 1: input should be greater than or equal to 2"),
        ({"dagformer.eval_windows": 1}, "dagformer.eval_windows = 1: input should be greater than or equal to 2"),
        ({"analysis.swaps": 200}, "analysis.swaps = 200: must be below dagformer.eval_windows = 200"),
        ({"benchmark_cache.capacities": [3, 3]}, "benchmark_cache.capacities = [3, 3]: must not hold an entry twice"),
        ({"simulate_cache.capacities": [3, 3]}, "simulate_cache.capacities = [3, 3]: must not hold an entry twice"),
        ({"benchmark_cache.policies": ["lru", "lru"]}, "policies = ['lru', 'lru']: must not hold an entry twice"),
        ({"benchmark_cache.prefetchers": ["none"] * 2}, "prefetchers = ['none', 'none']: must not hold an entry twice"),
        ({"analysis.removal_fractions": [1, 1.0]}, "removal_fractions = [1, 1.0]: must not hold an entry twice"),
        ({"analysis.variants": ["P1", "P1"]}, "analysis.variants = ['P1', 'P1']: must not hold an entry twice"),
        ({"dwr.also_validate_on": ["x", "x"]}, "dwr.also_validate_on = ['x', 'x']: must not hold an entry twice"),
        ({"corpora.docs.source.domains": {}}, "corpora.docs.source.domains = {}: must have at least 1"),
        ({"corpora.docs.source.domains.code.read": "lines"}, "code.read = 'lines': input should be 'text' or"),
        ({"corpora.docs.source": {"kind": "files", "paths": ["*", "*"]}}, "corpora.docs.source.paths = ['*', '*']"),
        ({"simulate_cache.machines": {}}, "simulate_cache.machines = {}: must have at least 1"),
        ({"simulate_cache.models": {}}, "simulate_cache.models = {}: must have at least 1"),
        ({"simulate_cache.models.seed.expert_mib": 1e-7}, "expert_mib = 1e-07: input should be greater than or equal"),
        ({"benchmark_cache.capacities": []}, "benchmark_cache.capacities = []: must have at least 1"),
        ({"variants.A5.seed": 10**20}, "variants.A5.seed = 100000000000000000000: input should be less than or equal"),
        ({"dwr.d_model": 16 * 10**20}, "dwr.d_model = 1600000000000000000000: input should be less than or equal"),
        ({"dwr.training.epochs": 1e308}, "dwr.training.epochs = 1e+308: input should be less than or equal to"),
        ({"num_threads": 100_000}, "num_threads = 100000: input should be less than or equal to 1024"),
        ({"launcher": 10**400}, "launcher = 10000"),
        ({"benchmark_cache.capacities": [99]}, "benchmark_cache.capacities = [99]: must be at most num_layers"),
        ({"simulate_cache.capacities": [99]}, "simulate_cache.capacities = [99]: must be at most num_layers"),
        ({"benchmark_cache.lookahead": 9}, "benchmark_cache.lookahead = 9: must be at most dwr.num_experts = 8"),
        ({"benchmark_cache.policies": ["mru"]}, "benchmark_cache.policies.0 = 'mru': input should be 'lru', 'lfu'"),
        ({"export_experts.precision": "fp8"}, "export_experts.precision = 'fp8': input should be 'fp32', 'bf16'"),
        ({"benchmark_cache.new_tokens": 10_000}, "benchmark_cache.new_tokens = 10000: with prompt_tokens must be"),
    ],
)
def test_a_mistake_is_one_line_with_the_key_the_value_and_what_is_allowed(tmp_path, changes, message):
    with pytest.raises(DynarouteError) as caught:
        load_with(tmp_path, changes)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("corpora.docs.source", {"kind": "hub", "name": None, "text_column": "text", "rows": "joined"}),
        ("corpora.docs.tokenizer", {"kind": "hub"}),
        ("dagformer.base", {"kind": "load"}),
        ("dagformer.encoder", {"kind": "hub"}),
    ],
)
def test_a_local_directory_has_no_revision(tmp_path, key, value):
    here = str(tmp_path)
    load_with(tmp_path, {key: {**value, "path": here, "revision": None}})
    load_with(tmp_path, {key: {**value, "path": "somebody/something", "revision": "abc"}})
    with pytest.raises(DynarouteError, match=f"{key}.revision = 'abc': must be null, since path = '{here}' is local"):
        load_with(tmp_path, {key: {**value, "path": here, "revision": "abc"}})


def test_a_variant_has_the_top_level_knobs_with_its_overrides(tmp_path):
    settings = load_with(tmp_path, {"tau_final": 0.07, "variants.A5.seed": 4})
    assert settings.variant("P1").tau_final == 0.07
    a5 = settings.variant("A5")
    assert (a5.tau_init, a5.tau_final, a5.seed, a5.rank) == (1.0, 1.0, 4, settings.rank)


def test_a_variant_that_continues_another_stays_at_its_final_tau_and_lambda(tmp_path):
    settings = load_with(tmp_path, {"tau_final": 0.07, "variants.P1.rank": 5})
    p1, p2 = settings.variant("P1"), settings.variant("P2")
    assert (p2.tau_init, p2.tau_final) == (0.07, 0.07)
    assert p2.lambda_init == p2.lambda_final == p1.lambda_final
    assert (p2.rank, p2.steps) == (5, p1.steps)


@pytest.mark.parametrize(
    "overrides",
    [
        {"from": "J1", "base_lr": 5e-5},
        {"from": "P1", "cascade": "off"},
        {"from": "P1", "cascade_k": 2.0},
        {"from": "P1", "init_logit": 15.0},
        {"from": "P1", "input_norm": "rms_post", "seed": 3},
    ],
)
def test_what_continues_a_variant_may_change_what_makes_no_difference_to_its_weights(tmp_path, overrides):
    p2 = load_with(tmp_path, {"variants.P2": overrides}).variant("P2").model_dump()
    assert {key: p2[key] for key in overrides if key != "from"}.items() <= overrides.items()


def test_an_unknown_variant_is_named(tmp_path):
    with pytest.raises(DynarouteError, match=r"variants\.B7: no such name; known: A1"):
        load_with(tmp_path, {}).variant("B7")


def test_a_dwr_run_is_the_reference_with_its_overrides_and_that_is_dwr_with_its_own(tmp_path):
    reference = {"corpus": "docs", "train_windows": 8, "validation_windows": None, "eval_windows": 4}
    reference |= {"d_ff": 64, "training": {"epochs": 3.0, "lr": 0.5}}
    runs = {"reference": reference, "other": {"corpus": "docs", "dropout": 0.3, "training": {"lr": 0.25}}}
    settings = load_with(tmp_path, {"dwr_runs": runs, "dwr.training.clip_norm": 7.0})
    reference, other = settings.dwr_run("reference"), settings.dwr_run("other")
    assert (reference.d_ff, reference.dropout, reference.d_model) == (64, settings.dwr.dropout, settings.dwr.d_model)
    assert (other.d_ff, other.dropout, other.train_windows) == (64, 0.3, 8)
    assert (reference.training.lr, other.training.lr) == (0.5, 0.25)
    assert (other.training.epochs, other.training.clip_norm) == (3.0, 7.0)
    with pytest.raises(DynarouteError, match=r"dwr_runs\.more: no such name; known: other, reference"):
        settings.dwr_run("more")


def test_a_dwr_run_may_be_trained_on_what_the_model_is_also_validated_on(tmp_path):
    corpora = {name: read_yaml(DEFAULT)["corpora"]["docs"] for name in ("docs", "other")}
    changes = {"corpora": corpora, "dwr.also_validate_on": ["other"], "dwr_runs.more_text.corpus": "other"}
    settings = load_with(tmp_path, changes)
    assert settings.dwr.also_validate_on == ["other"]
    assert [settings.dwr_run(name).also_validate_on for name in settings.dwr_runs] == [[]] * len(settings.dwr_runs)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: [1, 2\n", r", line \d+: not valid YAML"),
        ("a: \x14\n", ": not valid YAML: unacceptable character"),
        ("just a string", ".* must be a mapping"),
        *((text, ": not valid YAML: ") for text in ("a: 2001-99-99", "a: " + "9" * 5000, "a: !!int ''")),
        (None, ": cannot be read"),
    ],
)
def test_text_that_is_not_yaml_is_named_with_its_line(tmp_path, text, problem):
    if text is not None:
        (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(DynarouteError, match=rf"params\.yaml{problem}[^\n]*$"):
        load_settings(tmp_path / "params.yaml")


PARAMS = read_yaml(DEFAULT)
SIZES = {"hidden_size", "intermediate_size", "seq_len", "rank", "predictor_hidden", "batch_size", "micro_batch_size"}
SIZES |= {"vocab_size", *DWRArchitecture.model_fields}
EDGES = [0, -1, 1, 2**31, 2**63 - 1, 2**63, 10**20, 10**400, -0.0, 1e-320, 1e-40, 1e40, 1e308, math.inf, math.nan]
EDGES += [True, None, "", "\ud800", [], {}, [0], [{}], {"a": 1}, {1: 2}]


def places(data, path=()):
    """The paths of all values in nested mappings and lists."""
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield (*path, key)
        yield from places(data[key], (*path, key))


def loaded(place, value):
    """The default settings with another value at a place."""
    data = copy.deepcopy(PARAMS)
    *path, last = place
    reduce(getitem, path, data)[last] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "read_yaml", lambda _: data)
        return load_settings("params.yaml")


def test_no_number_is_tiny_and_no_size_is_huge():
    for place in places(PARAMS):
        value = reduce(getitem, place, PARAMS)
        if isinstance(value, float):
            with pytest.raises(DynarouteError, match=r" = 1e-13: must be at least 1e-12"):
                loaded(place, 1e-13)
        elif type(value) is int and place[-1] in SIZES:
            with pytest.raises(DynarouteError, match=rf"{'.'.join(place)} = 2147483632: .*1048576"):
                loaded(place, 2**31 - 16)


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(place=st.sampled_from(list(places(PARAMS))), value=st.sampled_from(EDGES))
def test_any_value_at_any_key_is_a_setting_or_refused_in_one_line(place, value):
    try:
        found = loaded(place, value).model_dump()
    except DynarouteError as error:
        assert str(error).startswith("params.yaml: ")
        assert "\n" not in str(error)
        assert len(str(error)) < 400
        str(error).encode()
    else:
        assert repr(reduce(getitem, place, found)) == repr(value) or reduce(getitem, place, found) == value
