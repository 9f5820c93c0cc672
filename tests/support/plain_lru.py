"""What LRU hits, by a plain loop over an ordered dictionary."""

from collections import OrderedDict


def lru_hit_rate(tokens: list[list[list[int]]], capacity: int) -> float:
    """Of [tokens][layers][top_k] experts that are asked for token by token, with room for a call and no less."""
    held, hits, requests = OrderedDict(), 0, 0
    for token in tokens:
        for layer, experts in enumerate(token):
            needed = [(layer, expert) for expert in sorted(experts)]
            hits, requests = hits + sum(key in held for key in needed), requests + len(needed)
            for key in needed:
                held[key] = held.pop(key, None)
            while len(held) > capacity:
                held.popitem(last=False)
    return hits / requests
