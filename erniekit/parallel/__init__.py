"""Ranks, their groups and communication, and every form of parallelism as arithmetic and plans."""
