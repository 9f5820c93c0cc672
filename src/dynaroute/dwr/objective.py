"""What DWR is trained on: next-token NLL, and losses of its routers for balance and for reuse of experts."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from dynaroute.data.tokens.shards import IGNORED_TARGET
from dynaroute.dwr.locality import SimulatedCache, reuse_loss
from dynaroute.dwr.model import DWRConfig, DWRTransformer
from dynaroute.training.loop import Batch
from dynaroute.training.nll import nll


class DWRObjective:
    """NLL plus `balance_coefficient` times the balance loss summed over layers.

    The balance loss of a layer is `E * sum_e f_e * P_e` (Switch Transformer, eq. 4, with `f` counting all top-k
    assignments, so that uniform routing gives top_k; its validation metric is divided by top_k, where 1 is ideal).
    In training, `f` and `P` are those of a micro-batch: the loss is not linear in both, so its mean over micro-batches
    depends on their size. In validation they are those of the whole split.

    The model's `balance` says what else is done; both remedies leave a single sequence free to use few experts:

    - `auxiliary_accumulated`: `f` also counts the assignments of earlier steps, which fade by `1 - 1 / balance_window`
      a step (over a window, as in Qiu et al., 2025). The gradient still reaches the router by `P` of the micro-batch.
    - `loss_free`: after every `balance_window` steps, the bias of an expert rises by `balance_rate` if the window gave
      it fewer tokens than the mean, and falls by that if more (Wang et al., 2024, eq. 3, there after every step).

    `reuse_coefficient` adds the mean of `locality.reuse_loss` over tokens, summed over layers.

    With `cache_prior` a simulated cache of `cache_prior_experts` in each layer favours what it holds
    (`locality.choose_with_cache`), by a bonus that is drawn uniformly from 0 to `cache_prior` logits for each window.
    The draw is a function of (seed, step, window) alone. So routing by whatever bonus is in distribution at inference.
    """

    def __init__(
        self,
        config: DWRConfig,
        balance_coefficient: float,
        *,
        balance_window: int = 1,
        balance_rate: float = 0.0,
        reuse_coefficient: float = 0.0,
        reuse_half_life: float = 1.0,
        cache_prior: float = 0.0,
        cache_prior_experts: int = 1,
        seed: int = 0,
    ) -> None:
        """See the settings of the same names. `balance_rate` is in logits, `reuse_half_life` in tokens."""
        self.config, self.balance_coefficient = config, balance_coefficient
        self.balance_window, self.balance_rate = balance_window, balance_rate
        self.reuse_coefficient, self.reuse_half_life = reuse_coefficient, reuse_half_life
        self.cache_prior, self.cache_prior_experts, self.seed = cache_prior, cache_prior_experts, seed
        self._assigned: Tensor | None = None  # [L, E], by this process's micro-batches of the step so far

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss of a batch, and NLL (nats per token), balance and reuse loss by layer and the share of
        assignments dropped for the record."""
        simulated = {"simulated": self.simulated_cache(batch, step)} if self.cache_prior else {}
        logits, router = model(batch.tokens, **simulated)
        loss = nll(logits, batch.targets)
        balance = torch.stack([layer.balance_loss for layer in router])  # [L]
        dropped = torch.stack([layer.dropped for layer in router]).sum()
        assignments = batch.tokens.numel() * self.config.top_k * self.config.num_layers
        metrics = {"loss": loss, "dropped_share": dropped / assignments}
        metrics |= {f"balance_loss_layer{index}": value for index, value in enumerate(balance)}
        if self.config.balance != "auxiliary":
            assigned = torch.stack([layer.counts for layer in router])
            self._assigned = assigned if self._assigned is None else self._assigned + assigned
        total = loss + self.balance_coefficient * balance.sum()
        if self.reuse_coefficient:
            reuse = torch.stack(
                [reuse_loss(layer.scores, layer.chosen, self.reuse_half_life).mean() for layer in router]
            )  # [L]
            metrics |= {f"reuse_loss_layer{index}": value for index, value in enumerate(reuse)}
            total = total + self.reuse_coefficient * reuse.sum()
        return total, metrics

    def simulated_cache(self, batch: Batch, step: int) -> SimulatedCache:
        """The cache that a step simulates for a batch, whose windows each have a bonus of their own."""
        # Beside the draws of the training loop, which are functions of [seed, step, 0, micro-batch].
        draws = [np.random.default_rng([self.seed, step, 1, window]).random() for window in batch.windows.tolist()]
        bonus = torch.tensor(draws, dtype=torch.float32, device=batch.tokens.device)
        return SimulatedCache(self.cache_prior_experts, self.cache_prior * bonus)

    @torch.no_grad()
    def end_step(self, model: DWRTransformer, steps: int, total: Callable[[Tensor], Tensor]) -> None:
        """Counts the assignments of a step, and moves the biases when a window is over.

        Args:
            model: without a wrapper.
            steps: taken so far.
            total: adds up a tensor over all processes.
        """
        if self.config.balance == "auxiliary":
            return
        assigned, self._assigned = total(self._assigned), None
        for moe, counts in zip((layer.moe for layer in model.layers), assigned, strict=True):
            moe.assigned += counts
            if self.config.balance == "auxiliary_accumulated":
                moe.assigned *= 1 - 1 / self.balance_window
            elif steps % self.balance_window == 0:
                moe.selection_bias += self.balance_rate * (moe.assigned.mean() - moe.assigned).sign()
                moe.assigned.zero_()

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
