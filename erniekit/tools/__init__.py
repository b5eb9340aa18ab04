"""Tools that a model may call: what they do, how they are described to it, and what becomes of a call."""
