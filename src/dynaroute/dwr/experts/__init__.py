"""Experts on disk and on demand: the store that they are exported to, and the cache that a model runs them from."""

from dynaroute.dwr.experts.cache import CachedExperts, CacheStatistics, ExpertCache
from dynaroute.dwr.experts.store import ExpertStore, export_store

__all__ = ["CacheStatistics", "CachedExperts", "ExpertCache", "ExpertStore", "export_store"]
