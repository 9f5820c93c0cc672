"""Tokenizers, token shards and windows."""
