"""Times a training step of a DAGFormer predictor, and the encoder that would read its texts, with random weights.

    python benchmarks/benchmark_dagformer_step.py        (`make scale NAME=gpu` runs it at the published sizes)

The base has the sizes of `dagformer.base` and OLMo-2's vocabulary, the encoder those of Qwen3-Embedding-0.6B; the
variant is P1. A step is what train_dagformer does: forward through predictor and base, NLL and density, backward to the
predictor, clipping, AdamW. It reads vectors that encode_windows made once; training that encodes its texts at every
step would add the encoder's time. Both have the dtype that dagformer.precision selects on the device, and take turns.

Writes  reports/benchmarks/dagformer_step.json
"""

from collections.abc import Callable

import torch
from timing import interleaved, milliseconds, training_step
from torch import nn

from dynaroute.config import Settings
from dynaroute.config.dagformer import PretrainedBase, Variant
from dynaroute.dagformer.bases import new_base
from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.objective import DagObjective
from dynaroute.dagformer.predictor import StructurePredictor
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.artifacts import write_json
from dynaroute.pipeline.machine import compute_dtype, describe_machine, peak_memory, require_device
from dynaroute.pipeline.stage import run
from dynaroute.training.loop import Batch, make_accelerator

ROUNDS, WARM_UP = 15, 3
VOCABULARY = 100352  # of allenai/OLMo-2-0425-1B, by its config.json
ENCODER = {  # Qwen/Qwen3-Embedding-0.6B, by its config.json
    "vocab_size": 151669, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip


def main(settings: Settings) -> None:
    """Measures and writes the report."""
    require_device(settings.device)
    torch.set_num_threads(settings.num_threads)
    torch.manual_seed(settings.seed)
    if not isinstance(settings.dagformer.base, PretrainedBase):
        raise DynarouteError("params.yaml: dagformer.base.kind = 'load': must be pretrain, whose sizes are taken")
    variant, seq_len, device = settings.variant("P1"), settings.dagformer.seq_len, settings.device
    dtype = compute_dtype(device, settings.dagformer.precision)
    with torch.device(device):  # drawing a billion weights takes a GPU no time
        base = new_base(settings.dagformer.base, VOCABULARY, seq_len, eot_id=0).to(dtype).eval()
        encoder = make_encoder().to(dtype)
    graph = DagForward(base)
    predictor = StructurePredictor(variant, graph.num_layers, graph.num_heads, ENCODER["hidden_size"])
    texts = torch.randint(ENCODER["vocab_size"], (variant.batch_size, seq_len), device=device)

    @torch.no_grad()
    def encode() -> None:
        encoder(input_ids=texts, use_cache=False).last_hidden_state.float().mean(1).cpu()

    steps = {"step": predictor_step(predictor, graph, variant, seq_len, device), "encoder": encode}
    times = interleaved(steps, ROUNDS, WARM_UP, device, "training step")
    models = {"base": base, "encoder": encoder, "predictor": predictor}
    report = {
        "batch_size": variant.batch_size,
        "micro_batch_size": variant.micro_batch_size,
        "seq_len": seq_len,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        **{name: milliseconds(values) for name, values in times.items()},
        "peak_memory_bytes": peak_memory(device),
        "machine": describe_machine(device),
    }
    print(f"one step {report['step']['milliseconds']:.1f} ms, encoder {report['encoder']['milliseconds']:.1f} ms")
    write_json("reports/benchmarks/dagformer_step.json", report)


def make_encoder() -> nn.Module:
    """A random encoder of the sizes of the paper's."""
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(**ENCODER)).eval()


def predictor_step(
    predictor: StructurePredictor, graph: DagForward, variant: Variant, seq_len: int, device: str
) -> Callable[[], None]:
    """One optimizer step on random windows and vectors."""
    generator = torch.Generator().manual_seed(variant.seed)
    tokens = torch.randint(VOCABULARY, (variant.batch_size, seq_len + 1), generator=generator).to(device)
    vectors = torch.randn(variant.batch_size, ENCODER["hidden_size"], generator=generator)
    predictor.fit_normalisation(vectors)
    windows = torch.arange(variant.batch_size, device=device)
    batches = [Batch(tokens[part, :-1], tokens[part, 1:], part) for part in windows.split(variant.micro_batch_size)]
    objective = DagObjective(graph.to(device), variant, vectors, vectors, variant.seed)
    return training_step(predictor, objective, batches, variant, make_accelerator(device, "fp32"))


if __name__ == "__main__":
    run(main, __doc__)
