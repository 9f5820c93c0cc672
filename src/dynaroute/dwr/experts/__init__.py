"""Experts on disk and on demand: the store they are exported to, and the cache a model uses them from."""
