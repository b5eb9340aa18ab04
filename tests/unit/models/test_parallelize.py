"""Which part of a model a process holds."""

from dataclasses import replace

from erniekit.models.parallelize import rank_shard_of
from erniekit.nn.shard import WHOLE
from erniekit.parallel.mesh import Mesh, ParallelDims


def test_one_process_holds_the_whole_and_says_so():
    """Reading a checkpoint is strict about what is left over only where a process should hold everything."""
    assert rank_shard_of(Mesh.single(), [(0, 1, 2)]) == WHOLE


def test_a_stage_holds_its_layers_and_one_end():
    last = replace(Mesh.single(), degrees=ParallelDims(pipeline=2), pipe=1)
    part = rank_shard_of(last, [(1,), (3,)])
    assert (part.layers, part.has_embedding, part.has_head) == ((1, 3), False, True)
