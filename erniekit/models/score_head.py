"""The head of a reward model, which turns a text into one number."""

import paddle
from paddle import nn

from erniekit.nn.roles import Role
from erniekit.nn.shard import Shardable


class ScoreHead(Shardable):
    """The product of hidden states with one vector, weight [D, 1], in fp32. Every tensor rank has the whole vector and
    all tokens.
    """

    def __init__(self, hidden_size: int, init_std: float) -> None:
        super().__init__()
        self.weight = self.create_parameter([hidden_size, 1], default_initializer=nn.initializer.Normal(0.0, init_std))
        self.num_ranks = 1  # tensor ranks that compute the same scores

    def roles(self) -> dict[str, Role]:
        """See DeclaresRoles."""
        return {"weight": Role.HEAD}

    def partial_gradients(self) -> tuple[str, ...]:
        """See Shardable: each rank has an equal part, see `forward`."""
        return ("weight",)

    def forward(self, hidden_ND: paddle.Tensor) -> paddle.Tensor:
        """Hidden states behind the final norm [N, D] -> scores fp32 [N].

        The ranks before it sum the gradients of their copies (TensorRanks.enter), so that of each is divided by their
        number.
        """
        scores = (hidden_ND.astype("float32") @ self.weight.astype("float32")).squeeze(-1)
        share = 1 / self.num_ranks
        return scores if self.num_ranks == 1 else scores * share + (scores * (1 - share)).detach()
