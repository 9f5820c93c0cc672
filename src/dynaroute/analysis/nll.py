"""The negative log-likelihood of a frozen base, window by window, under the wirings that a predictor gives them.

Nothing here draws noise: the same weights, windows and batch size give the same bytes. Gates and predictor are those
of `dynaroute.dagformer`; what is measured on the wirings themselves is in `topology`.

    n windows   B batch   T tokens   V vocabulary   N nodes
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynaroute.dagformer.gates import dag_mask
from dynaroute.dagformer.graph import DagForward
from dynaroute.data.tokens.shards import IGNORED_TARGET, TokenShards
from dynaroute.errors import DynarouteError

if TYPE_CHECKING:
    from dynaroute.dagformer.predictor import StructurePredictor

# The columns of nll.csv that do not depend on the variant, only on the base and the windows.
BASELINE_COLUMNS = ("protocol", "window", "source", "tokens", "nll_baseline")


class WindowSet(Protocol):
    """`Windows`, or some of them."""

    def __len__(self) -> int:
        """The number of windows."""

    def batch(self, indices: range) -> tuple[Tensor, Tensor]:
        """Tokens and targets, both int64 [B, T]."""


class Wiring(NamedTuple):
    """What a predictor makes of n texts, on the CPU; float32 [n, N, N] each."""

    logits: Tensor  # Z, -inf where not valid
    soft: Tensor  # A of mode soft, cascade included
    hard: Tensor


class Baseline(NamedTuple):
    """A base with all gates at one, through the DAG and by transformers itself."""

    nll: Tensor  # [n, T] float32, of the DAG
    transformers_nll: float  # mean over tokens of the loss that transformers computes from labels
    largest_logit_difference: float


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """NLL of every target in nats, float32 [B, T], from logits [B, T, V] of any float dtype; 0 where it is ignored."""
    # One sequence at a time: fp32 logits of a whole batch can be larger than all else together.
    return torch.stack(
        [
            F.cross_entropy(row.float(), target, ignore_index=IGNORED_TARGET, reduction="none")
            for row, target in zip(logits, targets, strict=True)
        ]
    )


def sequence_nll(nll: Tensor, targets: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """Adds up the NLL of each sequence.

    Args:
        nll: [n, T] float32, from `token_nll`.
        targets: [n, T]; what is ignored is not counted.
        first: the first position that counts. For an encoder that has read tokens 0 .. p-1 it is p - 1: that position
            predicts token p, the first one that the encoder has not seen.

    Returns:
        The sums in nats, float64 [n], and the numbers of tokens counted, int64 [n].
    """
    counted = targets != IGNORED_TARGET
    counted[:, :first] = False
    return nll.double().where(counted, 0).sum(1), counted.sum(1)


@torch.no_grad()
def wire(predictor: "StructurePredictor", embeddings: Tensor, tau: float, batch_size: int) -> Wiring:
    """The wirings of n texts, without noise, from their embeddings [n, E] at temperature tau."""
    device = next(predictor.parameters()).device
    parts = []
    for batch in embeddings.split(batch_size):
        batch = batch.to(device)
        parts.append((predictor.logits(batch), predictor(batch, tau, "soft"), predictor(batch, tau, "hard")))
    return Wiring(*(torch.cat([part.float().cpu() for part in kind]) for kind in zip(*parts, strict=True)))


@torch.no_grad()
def wired_nll(graph: DagForward, windows: WindowSet, adjacency: Tensor, batch_size: int) -> Tensor:
    """NLL of every token of the first n windows, each under its own wiring, float32 [n, T] on the CPU.

    Args:
        graph: the base.
        windows: at least n.
        adjacency: [n, N, N].
        batch_size: changes results in the last bits, as float sums do.
    """
    losses = []
    for indices in _batches(len(adjacency), batch_size):
        tokens, targets = (part.to(graph.base.device) for part in windows.batch(indices))
        wirings = adjacency[indices.start : indices.stop].to(graph.base.device)
        losses.append(token_nll(graph(tokens, wirings), targets).cpu())
    return torch.cat(losses)


@torch.no_grad()
def baseline_nll(graph: DagForward, windows: WindowSet, batch_size: int) -> Baseline:
    """NLL of every token with all gates at one, and how far that is from transformers' own model and loss.

    Args:
        graph: with the input_norm "none". Any other changes the sum of the heads, and is no baseline.
    """
    device = graph.base.device
    gates = dag_mask(graph.num_layers, graph.num_heads, device).float()
    losses, total, count, difference = [], 0.0, 0, 0.0
    for indices in _batches(len(windows), batch_size):
        tokens, targets = (part.to(device) for part in windows.batch(indices))
        logits = graph(tokens, gates.expand(len(tokens), -1, -1))
        losses.append(token_nll(logits, targets).cpu())
        # transformers shifts labels by itself. So it gets the stream with one more token, unshifted.
        labels = torch.cat([tokens[:, :1], targets], dim=1)
        last = targets[:, -1:].clamp(min=0)  # an ignored target is no token; nothing after it is predicted
        theirs = graph.base(torch.cat([tokens, last], dim=1), labels=labels)
        predicted = int((targets != IGNORED_TARGET).sum())
        total += float(theirs.loss) * predicted
        count += predicted
        difference = max(difference, float((logits - theirs.logits[:, :-1]).abs().max()))
    return Baseline(torch.cat(losses), total / count, difference)


def tokens_by_source(shards: TokenShards, start: int, stop: int) -> np.ndarray:
    """How many of the tokens [start, stop) of a stream are of each of `shards.sources`, int64 [sources]."""
    first = int(np.searchsorted(shards.offsets, start, side="right")) - 1
    last = int(np.searchsorted(shards.offsets, stop, side="left"))  # one past the last document
    borders = np.clip(shards.offsets[first : last + 1], start, stop)
    return np.bincount(
        shards.document_sources[first:last], weights=np.diff(borders), minlength=len(shards.sources)
    ).astype(np.int64)


def read_nll(path: Path, protocol: str) -> dict[str, np.ndarray]:
    """The NLL of every window by a protocol, float64 [n] for the modes soft, hard and baseline, from an nll.csv.

    Raises:
        DynarouteError: the file is missing or lacks what is asked for.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["protocol"] == protocol]
        found = {mode: np.array([float(row[f"nll_{mode}"]) for row in rows]) for mode in ("soft", "hard", "baseline")}
    except OSError as error:
        raise DynarouteError(f"{path}: cannot be read: {error.strerror}: run the stage evaluate_nll") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DynarouteError(f"{path}: damaged: {error}: run the stage evaluate_nll again") from error
    if not rows:
        raise DynarouteError(f"{path}: has no rows of the {protocol} protocol: run the stage evaluate_nll again")
    return found


def check_same_baseline(paths: list[Path]) -> None:
    """Checks that the results of several variants, nll.csv each, have the very same windows and baseline NLL.

    Raises:
        DynarouteError: a file is missing, lacks a column, or differs from the first one.
    """
    expected = None
    for path in paths:
        try:
            with path.open(encoding="utf-8", newline="") as file:
                found = [tuple(row[name] for name in BASELINE_COLUMNS) for row in csv.DictReader(file)]
        except OSError as error:
            raise DynarouteError(f"{path}: cannot be read: {error.strerror}: run the stage evaluate_nll") from error
        except KeyError as error:
            raise DynarouteError(f"{path}: lacks the column {error}: run the stage evaluate_nll again") from error
        expected = found if expected is None else expected
        if found != expected:
            raise DynarouteError(
                f"{path}: its baseline NLL or windows differ from those of {paths[0]}: not of the same base and text; "
                f"run the stage evaluate_nll again for both"
            )


def _batches(length: int, batch_size: int) -> Iterator[range]:
    return (range(start, min(start + batch_size, length)) for start in range(0, length, batch_size))
