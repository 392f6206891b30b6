"""Adapters: their format, store, registry and sources."""
