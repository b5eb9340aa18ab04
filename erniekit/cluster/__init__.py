"""Starts, supervises, ends and restarts a job of many processes on one or more hosts. Nothing here imports Paddle."""
