"""A part of a split's windows: the same ones for every run and every evaluation."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dynaroute.config.dagformer import DAGFormer
from dynaroute.config.dwr import BenchmarkCache
from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.errors import DynarouteError

if TYPE_CHECKING:
    import torch

KEYS = {"train": "train_windows", "validation": "validation_windows", "test": "eval_windows"}


def evenly_spaced(windows: Windows, number: int, setting: str) -> list[int]:
    """Indices of `number` windows, evenly spaced over all.

    Raises:
        DynarouteError: there are fewer; it names the setting that asks for that many.
    """
    total = len(windows)
    if number > total:
        split, seq_len = windows.shards.split, windows.seq_len
        allowed = f"must be at most {total}, the number of windows of {seq_len} tokens in the {split} split"
        raise DynarouteError(f"params.yaml: {setting} = {number}: {allowed}")
    return [i * total // number for i in range(number)]


class Selection:
    """Some windows of a `Windows`, and used like one: window i of it is window `indices[i]` of all."""

    def __init__(self, windows: Windows, indices: Sequence[int]) -> None:
        self.windows, self.seq_len, self.indices = windows, windows.seq_len, indices

    def __len__(self) -> int:
        """The number of windows."""
        return len(self.indices)

    def batch(self, indices: Sequence[int]) -> "tuple[torch.Tensor, torch.Tensor]":
        """Windows as (tokens, targets), both int64 [B, T].

        Raises:
            IndexError: there is no such window.
        """
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"window {index} of {len(self)}")
        return self.windows.batch([self.indices[index] for index in indices])


class Subset(Selection):
    """Evenly spaced windows of a split, as many as the settings ask for."""

    def __init__(self, windows: Windows, number: int | None, section: str = "dagformer") -> None:
        """Takes `number` windows, or all for None.

        Raises:
            DynarouteError: there are fewer; it names the setting, one of a section, that asks for that many.
        """
        setting = f"{section}.{KEYS[windows.shards.split]}"
        chosen = range(len(windows)) if number is None else evenly_spaced(windows, number, setting)
        super().__init__(windows, chosen)


def dagformer_windows(shards: Mapping[str, TokenShards], settings: DAGFormer) -> dict[str, Subset]:
    """The windows of each split that DAGFormer variants train on, are validated and evaluated on.

    Raises:
        DynarouteError: a split has fewer than the settings ask for.
    """
    return {
        split: Subset(Windows(own, settings.seq_len, keep_tail=False), getattr(settings, KEYS[split]))
        for split, own in shards.items()
    }


def cache_benchmark_windows(shards: TokenShards, settings: BenchmarkCache) -> Selection:
    """The texts that the cache benchmark reads, prompts and what follows them: windows of a split.

    Raises:
        DynarouteError: there are fewer than the settings ask for.
    """
    windows = Windows(shards, settings.prompt_tokens + settings.new_tokens, keep_tail=False)
    return Selection(windows, evenly_spaced(windows, settings.num_prompts, "benchmark_cache.num_prompts"))
