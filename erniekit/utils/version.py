"""The version, apart from the root package so that every layer may ask for it."""

__version__ = "0.2.0"
