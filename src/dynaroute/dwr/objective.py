"""What DWR is trained on: next-token NLL and the balance loss of its routers."""

import torch
from torch import Tensor, nn

from dynaroute.data.tokens.shards import IGNORED_TARGET
from dynaroute.dwr.model import DWRConfig
from dynaroute.training.loop import Batch
from dynaroute.training.nll import nll


class DWRObjective:
    """NLL plus `balance_coefficient` times the balance loss summed over layers.

    The balance loss of a layer is `E * sum_e f_e * P_e` (Switch Transformer, eq. 4, with `f` counting all top-k
    assignments, so that uniform routing gives top_k; its validation metric is divided by top_k, where 1 is ideal).
    In training, `f` and `P` are those of a micro-batch: the loss is not linear in both, so its mean over micro-batches
    depends on their size. In validation they are those of the whole split.
    """

    def __init__(self, config: DWRConfig, balance_coefficient: float) -> None:
        self.config = config
        self.balance_coefficient = balance_coefficient

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss of a batch, and NLL (nats per token), balance loss by layer and the share of
        assignments dropped for the record."""
        logits, router = model(batch.tokens)
        loss = nll(logits, batch.targets)
        balance = torch.stack([layer.balance_loss for layer in router])  # [L]
        dropped = torch.stack([layer.dropped for layer in router]).sum()
        assignments = batch.tokens.numel() * self.config.top_k * self.config.num_layers
        metrics = {"loss": loss, "dropped_share": dropped / assignments}
        metrics |= {f"balance_loss_layer{index}": value for index, value in enumerate(balance)}
        return loss + self.balance_coefficient * balance.sum(), metrics

    def validation_sums(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """Sums over the tokens that have one to predict: NLL and their number; by layer and expert, [L, E], assignments
        and probability, and the gate norm, the same for each token. What the last window is padded with has none.
        """
        logits, router = model(batch.tokens)
        predicts = batch.targets != IGNORED_TARGET  # [B, T]
        counts = [layer.chosen[predicts].flatten().bincount(minlength=self.config.num_experts) for layer in router]
        norms = torch.stack([layer.weight.double().norm(dim=1) for layer in router])
        return {
            "nll": nll(logits, batch.targets, "none").double().sum(),
            "predicted": predicts.sum(),
            "gate_norm": norms * predicts.sum(),
            "assigned": torch.stack(counts).double(),
            "probability": torch.stack([layer.probability[predicts].double().sum(0) for layer in router]),
        }

    def validation_metrics(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Mean NLL in nats per token; of each layer, the balance loss over the whole set, divided by top_k, and the
        least, the largest and the mean gate norm."""
        share = sums["assigned"] / sums["predicted"]  # [L, E], sums to top_k
        probability = sums["probability"] / sums["predicted"]  # [L, E], sums to one
        balance = self.config.num_experts * (share * probability).sum(1) / self.config.top_k  # [L]
        norms = sums["gate_norm"] / sums["predicted"]  # [L, E]
        metrics = {"loss": sums["nll"] / sums["predicted"]}
        metrics |= {f"balance_layer{index}": value for index, value in enumerate(balance)}
        for index, own in enumerate(norms):
            metrics |= {f"gate_norm_{name}_layer{index}": getattr(own, name)() for name in ("min", "max", "mean")}
        return {name: float(value) for name, value in metrics.items()}
