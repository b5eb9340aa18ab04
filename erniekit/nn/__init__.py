"""Layers for one device with plain arguments: they know nothing of configurations, parallelism or precision."""
