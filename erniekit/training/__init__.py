"""Training: one trainer for all methods, each of which is a row of methods.py."""
