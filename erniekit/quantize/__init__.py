"""Quantised models: which weights a scheme makes codes of, how, and by which algorithm."""
