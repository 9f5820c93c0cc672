"""Experts on disk and on demand: the store they are exported to, and the cache a model uses them from."""

from dynaroute.dwr.experts.cache import CachedExperts, ExpertCache
from dynaroute.dwr.experts.policies import make_policy
from dynaroute.dwr.experts.prefetch import make_prefetcher
from dynaroute.dwr.experts.residency import CacheStatistics
from dynaroute.dwr.experts.store import ExpertStore, Usage, export_store

__all__ = [
    "CacheStatistics",
    "CachedExperts",
    "ExpertCache",
    "ExpertStore",
    "Usage",
    "export_store",
    "make_policy",
    "make_prefetcher",
]
