"""A base whose best wiring is known: pretrained so that a text of source s needs the mask M_s (a positive control).

The masks are random and fixed. Training lowers the NLL of every text under the mask of its source, and a second forward
pass of the same batch, under a wrong wiring, keeps the NLL there higher by a margin. Without it the base would learn to
do without its edges.

    B batch   T tokens   V vocabulary   N nodes   C sources
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dynaroute.config import Settings
from dynaroute.config.dagformer import PlantedBase
from dynaroute.dagformer.bases import new_base
from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.dagformer.windows import variant_windows
from dynaroute.data.tokens.documents import window_sources
from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.training.checkpoints import load_checkpoint, save_checkpoint
from dynaroute.training.loop import Batch, Trainer, steps_in_epochs
from dynaroute.training.nll import token_nll

MASKS = "masks.safetensors"  # beside the base's own files


def make_trainer(
    settings: Settings, accelerator: Accelerator, shards: dict[str, TokenShards], masks: Tensor, scratch: Path
) -> Trainer:
    """The trainer of a new planted base on the training split, for one process.

    Raises:
        DynarouteError: the training does not fit the windows.
    """
    wanted, seq_len, train = settings.dagformer.planted, settings.dagformer.seq_len, shards["train"]
    training, validation = (
        Windows(train, seq_len, keep_tail=False),
        variant_windows(shards["validation"], settings.dagformer),
    )
    sources = (
        torch.from_numpy(window_sources(own, seq_len, list(indices)))
        for own, indices in ((train, range(len(training))), (shards["validation"], validation.indices))
    )
    torch.manual_seed(settings.seed)
    model = new_base(wanted, train.padded_vocab_size, seq_len, train.eot_id)
    return Trainer(
        model,
        PlantedObjective(DagForward(model, trainable=True), wanted, masks, *sources),
        training,
        validation,
        wanted.training,
        total_steps=steps_in_epochs(wanted.training, len(training)),
        accelerator=accelerator,
        seed=settings.seed,
        scratch=scratch,
        keep_best=False,
    )


def plant_masks(settings: PlantedBase, sources: int, seed: int) -> Tensor:
    """A random mask for each source, bool [C, N, N]: `open_share` of the valid edges of each are open."""
    valid = dag_mask(settings.num_layers, settings.num_heads)
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(sources, *valid.shape, dtype=torch.bool)
    for mask in masks:
        order = torch.randperm(int(valid.sum()), generator=generator)
        mask[valid] = order < round(settings.open_share * len(order))
    return masks


def save_masks(folder: Path, masks: Tensor, sources: list[str]) -> None:
    """Writes the masks beside the base, with the names of their sources."""
    save_checkpoint(folder / MASKS, {"masks": masks}, {"sources": sources})


def load_masks(folder: Path) -> tuple[Tensor, list[str]]:
    """The masks of a planted base, bool [C, N, N], and the names of their sources.

    Raises:
        DynarouteError: the file is missing or damaged.
    """
    tensors, state = load_checkpoint(folder / MASKS)
    return tensors["masks"], state["sources"]


class PlantedObjective:
    """NLL under the mask of a text's source, with a wrong wiring kept worse.

    The wrong wiring of a step is, in turn, A = 1 and the mask of the source k places on, k = 1 .. C - 1. The loss is

        own - w * min(wrong, own + margin)      per window, own not differentiated inside of min

    where w is `contrast`, and 0 for the first `contrast_from` steps.
    """

    def __init__(
        self, graph: DagForward, settings: PlantedBase, masks: Tensor, training: Tensor, validation: Tensor
    ) -> None:
        """Takes a trainable graph, and the source of every window trained and validated on, int64 [windows]."""
        self.graph, self.settings, self.masks = graph, settings, masks.float()
        self.open = dag_mask(graph.num_layers, graph.num_heads).float()
        self.training, self.validation = training, validation

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss, and for the record NLL under the own and the wrong wiring."""
        sources = self.training[batch.windows.cpu()]
        own = self._nll(batch, self.masks[sources])
        if step < self.settings.contrast_from:
            return own.mean(), {"loss": own.mean(), "wrong": own.mean()}
        turn = (step - self.settings.contrast_from) % len(self.masks)
        wrong = self._nll(batch, self._wrong(sources, turn))
        kept = torch.minimum(wrong, own.detach() + self.settings.margin)
        return (own - self.settings.contrast * kept).mean(), {"loss": own.mean(), "wrong": wrong.mean()}

    def validation_sums(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """NLL under the own mask and with all gates at one, and windows."""
        sources = self.validation[batch.windows.cpu()]
        return {
            "own": self._nll(batch, self.masks[sources]).double().sum(),
            "one": self._nll(batch, self._wrong(sources, 0)).double().sum(),
            "windows": torch.tensor(len(sources), device=batch.tokens.device),
        }

    def validation_metrics(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Both means over windows, in nats per token; `loss` is that under the own mask."""
        return {"loss": float(sums["own"] / sums["windows"]), "all_gates_one": float(sums["one"] / sums["windows"])}

    def _wrong(self, sources: Tensor, turn: int) -> Tensor:
        """A wrong wiring for each text, [B, N, N]."""
        if turn == 0:
            return self.open.expand(len(sources), -1, -1)
        return self.masks[(sources + turn) % len(self.masks)]

    def _nll(self, batch: Batch, adjacency: Tensor) -> Tensor:
        """Mean NLL of each window, [B]; every token has a target."""
        logits = self.graph(batch.tokens, adjacency.to(batch.tokens.device))  # [B, T, V]
        return token_nll(logits, batch.targets).mean(1)
