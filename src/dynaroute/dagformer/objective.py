"""The training loss of a predictor: the NLL of a frozen base under the predicted wiring, and the wiring's density.

The loss of step t is `NLL + lambda_t * mean_A`. A variant may minimise the KL divergence from the base instead of NLL,
as Edge Pruning does (arXiv 2406.16778). Temperature and lambda follow the schedules below; noise is a function of
(seed, step, window), so it does not depend on batches or processes.
"""

import math

import torch
from torch import Tensor, nn

from dynaroute.config.dagformer import Variant
from dynaroute.dagformer.gates import dag_mask, density, gate_fraction, gate_slope, layer_distance
from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.predictor import StructurePredictor, sequence_noise, sequence_signs
from dynaroute.data.tokens.shards import IGNORED_TARGET
from dynaroute.training.loop import Batch
from dynaroute.training.nll import kl_divergence, nll, token_nll

RAMP = 0.2  # of all steps, while lambda rises


def tau_at(step: int, total_steps: int, variant: Variant) -> float:
    """The temperature of step `step`: half a cosine from tau_init at step 0 to tau_final at `total_steps`."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))
    return variant.tau_final + (variant.tau_init - variant.tau_final) * cosine


def lambda_at(step: int, total_steps: int, variant: Variant) -> float:
    """The weight of mean_A at step `step`: from lambda_init to lambda_final over the first fifth of the steps."""
    return variant.lambda_init + (variant.lambda_final - variant.lambda_init) * min(1.0, step / (RAMP * total_steps))


class DagObjective:
    """Trains and validates a `StructurePredictor` in front of a frozen base."""

    def __init__(
        self,
        graph: DagForward,
        variant: Variant,
        training_embeddings: Tensor,
        validation_embeddings: Tensor,
        noise_seed: int,
        dense: DagForward | None = None,
    ) -> None:
        """Embeddings are [windows, E], in the order of the windows trained and validated on.

        The baseline is `dense` with all gates at one; if not given, the base of `graph`, which must then be frozen.
        """
        self.graph, self.variant, self.noise_seed = graph, variant, noise_seed
        if dense is None:  # a baseline never has an input norm
            dense = graph if graph.input_norm == "none" else DagForward(graph.base)
        self.dense = dense
        self.training_embeddings, self.validation_embeddings = training_embeddings, validation_embeddings
        self.valid = dag_mask(graph.num_layers, graph.num_heads)
        self.distance = layer_distance(graph.num_layers, graph.num_heads)
        self._baseline: dict[int, Tensor] = {}  # NLL sums at A = 1: the same at every validation

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss, and for the record NLL, mean_A and two measures of the gradient through the gates.

        gate_slope is the mean of dA/dZ, before the cascade. gate_gradient is the norm of the gradient of a window's
        loss with respect to its A, as a root mean square over windows, so that it does not depend on the batch size;
        the backward pass fills it in.
        """
        tau, weight = tau_at(step, self.variant.steps, self.variant), lambda_at(step, self.variant.steps, self.variant)
        device = batch.tokens.device
        embeddings = self.training_embeddings[batch.windows.cpu()].to(device)
        noise = sequence_noise(self.noise_seed, step, batch.windows, len(self.valid)).to(device)
        adjacency = model(embeddings, tau, "train", noise)  # [B, N, N]
        with torch.no_grad():
            expected = self.dense(batch.tokens, torch.ones_like(adjacency)) if self.variant.loss == "kl" else None
        logits = self.graph(batch.tokens, adjacency)
        loss = nll(logits, batch.targets)
        minimised = loss if expected is None else kl_divergence(expected, logits).mean()
        mean_a = density(adjacency, self.valid).mean()
        gradient = torch.zeros((), device=device)
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        share = processes / self.variant.batch_size  # of a window in the loss that is differentiated

        def note(at_gates: Tensor) -> None:
            gradient.copy_(at_gates.norm() / share / math.sqrt(len(at_gates)))

        adjacency.register_hook(note)
        if self.variant.flip_gradients:
            signs = sequence_signs(self.noise_seed, step, batch.windows).to(device)
            adjacency.register_hook(lambda at_gates: at_gates * signs[:, None, None])
        with torch.no_grad():
            slope = gate_slope(_bare(model).logits(embeddings, "train"), tau, noise, self.variant.gates)
            slope = density(slope, self.valid).mean()
        return minimised + weight * mean_a, {
            "loss": loss,
            "mean_A": mean_a,
            "gate_slope": slope,
            "gate_gradient": gradient,
        }

    def validation_sums(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """NLL in the three modes, summed over tokens, and measures of the topology, summed over windows."""
        tau = tau_at(step, self.variant.steps, self.variant)
        embeddings = self.validation_embeddings[batch.windows.cpu()].to(batch.tokens.device)
        soft = model(embeddings, tau, "soft")
        hard = model(embeddings, tau, "hard")
        unknown = [index for index in batch.windows.tolist() if index not in self._baseline]
        if unknown:
            sums = self._nll(self.dense, batch, torch.ones_like(soft))
            self._baseline |= dict(zip(batch.windows.tolist(), sums, strict=True))
        baseline = torch.stack([self._baseline[index] for index in batch.windows.tolist()])
        adjacent, skip = self.distance == 1, self.distance > 1
        return {
            "predicted": (batch.targets != IGNORED_TARGET).sum(),
            "nll_soft": self._nll(self.graph, batch, soft).sum(),
            "nll_hard": self._nll(self.graph, batch, hard).sum(),
            "nll_baseline": baseline.sum(),
            "windows": torch.tensor(len(soft), device=soft.device),
            "mean_A": density(soft, self.valid).double().sum(),
            "density_hard": density(hard, self.valid).double().sum(),
            "seq_gate_frac": gate_fraction(soft, adjacent).double().sum(),
            "hyp_gate_frac": gate_fraction(soft, skip).double().sum(),
            "tau": torch.tensor(tau * len(soft), dtype=torch.float64, device=soft.device),
            "lambda": torch.tensor(
                lambda_at(step, self.variant.steps, self.variant) * len(soft),
                dtype=torch.float64,
                device=soft.device,
            ),
        }

    def validation_metrics(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """NLL by mode in nats per token, and mean measures of the topology; `loss` is the soft NLL."""
        metrics = {name: float(sums[name] / sums["predicted"]) for name in ("nll_soft", "nll_hard", "nll_baseline")}
        names = ("mean_A", "density_hard", "seq_gate_frac", "hyp_gate_frac", "tau", "lambda")
        metrics |= {name: float(sums[name] / sums["windows"]) for name in names}
        return {"loss": metrics["nll_soft"], **metrics}

    def _nll(self, graph: DagForward, batch: Batch, adjacency: Tensor) -> Tensor:
        """NLL of each window, summed over its tokens, float64 [B]."""
        return token_nll(graph(batch.tokens, adjacency), batch.targets).double().sum(1)


def _bare(model: nn.Module) -> StructurePredictor:
    """The predictor without the wrappers of several processes or joint training."""
    model = getattr(model, "module", model)
    return getattr(model, "predictor", model)
