"""`erniekit eval`: loss, perplexity and accuracy on an evaluation set, and scores of generated answers."""

from erniekit.evaluate.run import evaluate

__all__ = ["evaluate"]
