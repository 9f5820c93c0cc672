"""Subsets of a split's windows, the same in every run and every evaluation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dynaroute.data.tokens.shards import Windows
from dynaroute.errors import DynarouteError

if TYPE_CHECKING:
    import torch


class Subset:
    """Some of a set of windows: window i is window `indices[i]` of the set."""

    def __init__(self, windows: "WindowSet", indices: Sequence[int]) -> None:
        self.windows, self.seq_len, self.indices = windows, windows.seq_len, indices

    def __len__(self) -> int:
        """The number of windows."""
        return len(self.indices)

    def batch(self, indices: Sequence[int]) -> "tuple[torch.Tensor, torch.Tensor]":
        """Windows as (tokens, targets), both int64 [B, T]. Raises IndexError: there is no such window."""
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"window {index} of {len(self)}")
        return self.windows.batch([self.indices[index] for index in indices])


WindowSet = Windows | Subset


def evenly_spaced(windows: WindowSet, number: int | None, setting: str) -> Subset:
    """`number` evenly spaced windows; all for None. Raises DynarouteError, naming the setting, if there are fewer."""
    total = len(windows)
    if number is None:
        return Subset(windows, range(total))
    if number > total:
        split, seq_len = windows.shards.split, windows.seq_len
        allowed = f"must be at most {total}, the number of windows of {seq_len} tokens in the {split} split"
        raise DynarouteError(f"params.yaml: {setting} = {number}: {allowed}")
    return Subset(windows, [i * total // number for i in range(number)])
