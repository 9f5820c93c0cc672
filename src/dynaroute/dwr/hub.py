"""Mixture-of-Experts models of transformers, served from their own checkpoint with experts in a bounded memory.

The model is built without weights. Everything but the experts is read into memory, matrices as they are stored and the
rest as 32-bit floats; experts are read through a cache, by a function that transformers calls in place of its own. It
computes what transformers' eager experts compute in 32-bit floats, in the same order: to the bit from a checkpoint of
32-bit floats; from one in fewer bits up to rounding, as `precision.linear` adds in another order. Only weights and
configuration are read, never code.
"""

import copy
import functools
import re
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dynaroute.config.data import Hosted
from dynaroute.dwr.experts.cache import CachedExperts, ExpertCache
from dynaroute.dwr.experts.checkpoint import Checkpoint, CheckpointStore
from dynaroute.dwr.experts.precision import linear
from dynaroute.dwr.experts.prefetch import Router
from dynaroute.dwr.experts.store import MANIFEST
from dynaroute.dwr.inference import Forward, Text
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import read_record, sha256

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel  # takes seconds to import

WAVE = 128  # tokens of a prompt in one pass, which bounds what they take beside the experts
KINDS = ("weight", "weight_scale")  # of an expert's tensors; scales only in an export to int8
IMPLEMENTATION = "dynaroute"  # of experts, as transformers registers it


class Layout(NamedTuple):
    """How a type of model names its experts on disk: one tensor for each matrix of each expert."""

    block: str = "mlp"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


# By transformers' model_type. Other types, and experts that are stacked on disk, are refused.
LAYOUTS = {
    "deepseek_v2": Layout(),
    "deepseek_v3": Layout(),
    "mixtral": Layout("block_sparse_moe", ("w1", "w3", "w2")),
    "olmoe": Layout(),
    "qwen2_moe": Layout(),
    "qwen3_moe": Layout(),
}


def locate_checkpoint(path: str, revision: str | None) -> Path:
    """The folder of a checkpoint: the path itself, or what the hub has under that id at a commit, fetched if need be.

    Raises:
        DynarouteError: there is neither, the hub's is not pinned, or cannot be fetched.
    """
    if Path(path).is_dir():
        if revision is not None:
            raise DynarouteError(f"--revision {revision}: {path} is a local folder, which has none")
        return Path(path)
    Hosted(path=path, revision=revision).refuse_unpinned("--model")
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):  # a branch or tag can move
        raise DynarouteError(f"--revision {revision}: must be a commit of {path}, 40 hexadecimal digits")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except Exception as error:  # of a dozen types without a common base class
        reason = " ".join(str(error).split())
        raise DynarouteError(f"--model {path} at {revision}: cannot be fetched: {reason:.300}") from error


def open_checkpoint(folder: Path) -> tuple["PreTrainedModel", CheckpointStore]:
    """A model without weights, and the store of its experts. Of an export, all other files are hashed.

    Raises:
        DynarouteError: the type is not supported, or a file is missing or damaged.
    """
    config = _read_config(folder)
    layout, checkpoint = LAYOUTS[config.model_type], Checkpoint(folder)
    model = _load(folder, "model", lambda *_, **__: _build(config))
    names = [
        [
            [f"{start}.{expert}.{part}.{kind}" for kind in KINDS for part in layout.parts]
            for expert in range(block.experts.num_experts)
        ]
        for number, block in expert_blocks(model).items()
        for start in [f"model.layers.{number}.{layout.block}.experts"]
    ]
    if not names:
        raise DynarouteError(f"{folder / 'config.json'}: no layer of the model has experts")
    if names[0][0][-1] not in checkpoint.places:  # no scales: the experts are not quantized
        names = [[parts[: len(layout.parts)] for parts in layer] for layer in names]
    if config.num_experts_per_tok not in range(1, len(names[0]) + 1):
        found = f"num_experts_per_tok = {config.num_experts_per_tok}"
        raise DynarouteError(f"{folder / 'config.json'}: {found}: must be 1 to {len(names[0])}, the experts of a layer")
    hashes = _read_hashes(folder)
    store = CheckpointStore(checkpoint, names, config.num_experts_per_tok, hashes)
    for name in hashes.keys() - store.files():
        if sha256(folder / name) != hashes[name]:
            raise DynarouteError(f"{folder / name}: SHA-256 is not that of {MANIFEST}: export the model again")
    return model, store


def expert_blocks(model: nn.Module) -> dict[int, nn.Module]:
    """The blocks with experts and a router (`gate`), by the number of their layer."""
    return {number: layer.mlp for number, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")}


class HubModel:
    """A model whose experts stay in its checkpoint; `bind` connects it to a cache of them.

    Attributes:
        store: its experts.
        model: transformers' own, without experts.
        positions: the longest text.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Reads everything but the experts.

        Raises:
            DynarouteError: the type is not supported, or a file is missing or damaged.
        """
        self.folder, self._device = folder, device
        self.model, self.store = open_checkpoint(folder)
        self.positions = self.model.config.max_position_embeddings
        self._blocks = expert_blocks(self.model)
        self._read_backbone()
        for block in self._blocks.values():
            chooser = _chooser(block.gate)
            block.gate.register_forward_hook(
                lambda gate, inputs, output, block=block, chooser=chooser: self._route(
                    block.experts.source, gate, chooser, inputs[0], output
                )
            )

    def _route(
        self, source: CachedExperts, gate: nn.Module, chooser: nn.Module, x: Tensor, output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """A router's output for x [B, T, D]: (scores [S, E], weights [S, K], experts [S, K]).

        It is unchanged unless the cache prefers experts. Then these are chosen by scores plus preference and by all
        else that the router heeds, such as groups; weights are those that the router gives them by its scores alone.
        """
        scores, weights, chosen = output
        if (preference := source.preference()) is not None:
            chosen = chooser.forward(scores.float() + preference)[2]
            sigmoid = hasattr(gate, "e_score_correction_bias")  # DeepSeek-V3
            weights = (scores.sigmoid() if sigmoid else scores.softmax(-1, dtype=torch.float32)).gather(1, chosen)
            if getattr(gate, "norm_topk_prob", self.model.config.model_type == "mixtral"):  # which always does
                weights = weights / weights.sum(-1, keepdim=True)
            weights = weights * getattr(gate, "routed_scaling_factor", 1.0)
        # A router may choose by other scores.
        source.observe(x.reshape(-1, x.shape[-1]), torch.zeros_like(scores).scatter_(1, chosen, 1))
        return scores, weights, chosen

    def _read_backbone(self) -> None:
        model, checkpoint = self.model, self.store.checkpoint
        block = LAYOUTS[model.config.model_type].block
        tied = set(model.all_tied_weights_keys)
        names = [name for name in model.state_dict() if ".mlp.experts." not in name and name not in tied]
        for name in tqdm(names, desc="backbone", unit="tensor", disable=None, leave=False):
            stored = name.replace(".mlp.", f".{block}.")
            path, _, own = name.rpartition(".")
            module, place = model.get_submodule(path), checkpoint.place(stored)
            expected = getattr(module, own)
            if place.shape != expected.shape:
                found = f"{list(place.shape)}, not {list(expected.shape)} as config.json says"
                raise DynarouteError(f"{place.path}: tensor {stored} is {found}")
            as_stored = isinstance(module, nn.Linear) and own == "weight" and self._device == "cpu"
            dtype = place.dtype if as_stored else torch.float32
            checkpoint.read(stored, tensor := torch.empty(place.shape, dtype=dtype))
            tensor = tensor.to(self._device)
            if dtype != torch.float32:
                module.forward = functools.partial(_apply_linear, module)
            setattr(module, own, nn.Parameter(tensor, False) if isinstance(expected, nn.Parameter) else tensor)
        model.tie_weights()
        # No file has its buffers.
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(self._device)
        model.eval()

    def bind(self, cache: ExpertCache) -> None:
        """Connects the model to a cache of its store, from which it takes its experts."""
        for index, block in enumerate(self._blocks.values()):
            block.experts.source = CachedExperts(cache, index)

    def routers(self) -> list[Router]:
        """The router of each layer with experts, as scores of which those of the experts it chooses are the highest."""
        return [lambda state, gate=block.gate: _scores(gate, state) for block in self._blocks.values()]

    def start_text(self) -> Forward:
        """A forward pass over a new text, for `sample`; a long prompt is read in waves, with a progress bar."""
        from transformers import DynamicCache

        past = DynamicCache(config=self.model.config)

        def forward(tokens: list[int]) -> Tensor:
            waves = torch.tensor([tokens], device=self._device).split(WAVE, dim=1)
            for wave in tqdm(waves, desc="prompt", unit="wave", disable=None if len(waves) > 1 else True, leave=False):
                logits = self.model(wave, past_key_values=past, use_cache=True, logits_to_keep=1).logits
            return logits[0, -1]

        return forward

    def load_text(self) -> Text:
        """The model's tokenizer, chat template and stop tokens.

        Raises:
            DynarouteError: they cannot be loaded.
        """
        from transformers import AutoTokenizer

        tokenizer = _load(self.folder, "tokenizer", AutoTokenizer.from_pretrained)
        path = self.folder / "generation_config.json"
        generation = read_record(path) if path.exists() else {}
        stops = [tokenizer.eos_token_id, self.model.config.eos_token_id, generation.get("eos_token_id")]
        stop = {token for ids in stops if ids is not None for token in (ids if isinstance(ids, list) else [ids])}

        def encode(prompt: str, chat: bool) -> list[int]:
            if not chat:
                return tokenizer(prompt)["input_ids"] or sorted(stop)[:1]
            if not tokenizer.chat_template:
                raise DynarouteError(f"--chat: {self.folder} has no chat template")
            turns = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        def decode(ids: list[int]) -> str:
            return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

        ids = [token for token in tokenizer.get_vocab().values() if token < self.model.config.vocab_size]
        return Text(encode, decode, stop, torch.tensor(sorted(set(ids))))


def _chooser(gate: nn.Module) -> nn.Module:
    """A router that chooses as another does, whose input are scores [S, E]: its matrix is the identity."""
    chooser = copy.deepcopy(gate)
    size = len(gate.weight)
    chooser.weight, chooser.hidden_dim = nn.Parameter(torch.eye(size, device=gate.weight.device), False), size
    return chooser


def _read_config(folder: Path) -> "PretrainedConfig":
    path = folder / "config.json"
    config = read_record(path)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in LAYOUTS:
        raise DynarouteError(f"{path}: model_type = {kind!r:.80}: supported are {', '.join(LAYOUTS)}")
    if config.get("quantization_config"):
        raise DynarouteError(f"{path}: quantization_config: the weights must be fp32, bf16 or fp16, not quantized")
    from transformers import AutoConfig
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = _load(folder, "config.json", AutoConfig.from_pretrained)
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    for key, value, allowed in (
        ("hidden_act", config.hidden_act, sorted(ACT2FN)),
        ("rope_type", rope, sorted({"default", *ROPE_INIT_FUNCTIONS})),
    ):
        if value not in allowed:
            raise DynarouteError(f"{path}: {key} = {value!r:.80}: must be one of {', '.join(allowed)}")
    return config


def _read_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of the files of an export, by its manifest; none without one."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    hashes, present = read_record(path)["files"], {file.name for file in folder.iterdir()}
    if not isinstance(hashes, dict):
        raise DynarouteError(f"{path}: files = {hashes!r:.80}: must be the SHA-256 of each file by its name")
    for name, digest in hashes.items():
        if name not in present:
            raise DynarouteError(f"{path}: files names {name!r:.80}: must be the name of a file beside it")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise DynarouteError(f"{path}: files.{name} = {digest!r:.80}: must be a SHA-256, 64 hexadecimal digits")
    return hashes


def _load(folder: Path, what: str, load: Callable[..., Any]) -> Any:
    try:
        return load(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # missing or damaged files raise a dozen types without a common base class
        raise DynarouteError(f"{folder}: its {what} cannot be loaded: {' '.join(str(error).split()):.300}") from error


def _build(config: "PretrainedConfig") -> "PreTrainedModel":
    """The model on the meta device: shapes without memory."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run_experts)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=IMPLEMENTATION
        )


def _apply_linear(module: nn.Linear, x: Tensor) -> Tensor:
    """A layer [..., I] to [..., O] whose weights have fewer bits than its input."""
    out = linear(x.flatten(0, -2), module.weight).unflatten(0, x.shape[:-1])
    return out if module.bias is None else out + module.bias


def _scores(gate: nn.Module, state: Tensor) -> Tensor:
    """A router's scores [S, E], raised for its own choice, which may also depend on a bias and on groups of experts."""
    logits, _, chosen = gate.forward(state)
    bias = getattr(gate, "e_score_correction_bias", None)
    scores = logits if bias is None else logits.sigmoid() + bias
    above = 1 + scores.amax(1, keepdim=True) - scores.amin(1, keepdim=True)
    return scores.scatter_add(1, chosen, above.expand_as(chosen))


def run_experts(module: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """A layer's experts, from a cache, on the tokens x [S, D], of which each has chosen [S, K] with weights [S, K].

    Whatever the order in which the cache has experts, each token's outputs are summed in that of their numbers.
    """
    top_k = chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)  # [S*K], assignments sorted by expert, then token
    token = order // top_k
    weights = weights.flatten()[order, None]
    counts = chosen.flatten().bincount(minlength=module.num_experts).tolist()
    places = [slice(end - count, end) for count, end in zip(counts, accumulate(counts), strict=True)]
    needed = sorted((expert for expert, count in enumerate(counts) if count), key=counts.__getitem__)
    outputs = x.new_empty(len(order), x.shape[1])
    for expert, stored in module.source.fetch(needed):  # the most used last: a cache keeps those
        place = places[expert]
        hidden = module._apply_gate(linear(x[token[place]], stored.gate_up, stored.gate_up_scale))  # [S', F]
        outputs[place] = linear(hidden, stored.down, stored.down_scale) * weights[place]
        del stored  # a cache may need its place for the next
    total = torch.zeros_like(x)
    for rows in token.argsort(stable=True).view(-1, top_k).unbind(1):  # each token's first expert, second, ...
        total += outputs[rows]
    return total
