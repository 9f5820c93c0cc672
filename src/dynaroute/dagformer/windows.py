"""Which windows of a split DAGFormer reads."""

from dynaroute.config.dagformer import DAGFormer
from dynaroute.data.tokens.shards import TokenShards, Windows
from dynaroute.data.tokens.windows import Subset, evenly_spaced

NUMBERS = {"train": "train_windows", "validation": "validation_windows", "test": "eval_windows"}  # settings, by split


def variant_windows(shards: TokenShards, settings: DAGFormer) -> Subset:
    """The windows of a split that variants are trained, validated or evaluated on.

    Raises:
        DynarouteError: the split has fewer than the settings ask for.
    """
    windows, key = Windows(shards, settings.seq_len, keep_tail=False), NUMBERS[shards.split]
    return evenly_spaced(windows, getattr(settings, key), f"dagformer.{key}")
