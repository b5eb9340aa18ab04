"""Which part of a model one process holds."""

from dataclasses import dataclass

from erniekit.nn.cut import Cut


@dataclass(frozen=True)
class Partition:
    """A share of every projection (tensor ranks), of the experts (expert ranks times tensor ranks), and some of the
    layers (None: all), with or without the embedding in front and the head behind.
    """

    tensor_rank: int = 0
    tensor_degree: int = 1
    expert_rank: int = 0
    expert_degree: int = 1
    layers: tuple[int, ...] | None = None
    has_embedding: bool = True
    has_head: bool = True

    @property
    def expert_shares(self) -> int:
        """Into how many shares the experts of a layer are divided."""
        return self.expert_degree * self.tensor_degree

    def share(self, cut: Cut) -> tuple[int, int]:
        """(index, count) of this process's share of a parameter that is divided by `cut`."""
        if cut.over == "tensor":
            return self.tensor_rank, self.tensor_degree
        return self.expert_rank * self.tensor_degree + self.tensor_rank, self.expert_shares


WHOLE = Partition()
