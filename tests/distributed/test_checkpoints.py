"""A checkpoint does not depend on the layout that wrote it, and any layout resumes from it."""

import os
import signal

import numpy as np
import pytest
from support import equality
from support.worlds import RankError, World

from erniekit.checkpoint.model_dir import ADAPTER_FILE
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.utils.errors import CheckpointError

CLOSE = 1e-5  # sums of float32 in another order, as in test_equality
SAVED, STEPS = 2, 4

LAYOUTS_2 = {
    "tp2": {"tensor_parallel_degree": 2},
    "pp2": {"pipeline_parallel_degree": 2},
    "ep2": {"expert_parallel_degree": 2},
    "sharding2": {"sharding": "stage2", "sharding_parallel_degree": 2},
    "stage3": {"sharding": "stage3", "sharding_parallel_degree": 2},
}
LAYOUTS_4 = {
    "pp2 x ep2": {"pipeline_parallel_degree": 2, "expert_parallel_degree": 2},
    "tp2 x ep2 x sharding2": {
        "tensor_parallel_degree": 2,
        "expert_parallel_degree": 2,
        "sharding": "stage1",
        "sharding_parallel_degree": 2,
    },
    "ep2 x sharding4": {"expert_parallel_degree": 2, "sharding": "stage2", "sharding_parallel_degree": 4},
    "pp4": {"pipeline_parallel_degree": 4},
}


def fit(keys):
    """A run from its start or a checkpoint to its end: (step, loss, norm) of each step."""
    from erniekit import config
    from erniekit.training.build import build_run
    from erniekit.training.callbacks import Callback
    from erniekit.training.run import join
    from erniekit.training.trainer import Trainer

    steps = []

    class History(Callback):
        def on_step(self, metrics):
            steps.append((metrics.step, metrics.loss, metrics.grad_norm))

    cfg = config.load(None, keys, "train")
    Trainer(build_run(cfg, join(cfg)), [History()]).fit()
    return steps


def keys_of(directory, out, layout, ranks=1, **keys):
    """A run of 8 rows a step under a layout, whose data ranks follow from `ranks`."""
    stages, tensors = (layout.get(f"{name}_parallel_degree", 1) for name in ("pipeline", "tensor"))
    more = layout | {"output_dir": f"{directory}/{out}", "max_steps": STEPS, "save_steps": SAVED, "ema_decay": 0.5}
    return equality.keys_for(str(directory), "moe", ranks // stages // tensors, **(more | keys))


def tensors_of(directory):
    """Every tensor below a checkpoint; pieces of the optimizer's state joined."""
    from erniekit.checkpoint.stored_state import StoredState

    found = {}
    for name in ("", "ema", "optimizer"):
        if (directory / name).is_dir():
            stored = StoredState(directory / name)
            found |= {f"{name}/{key}": stored.read(key) for key in stored.keys()}  # noqa: SIM118
    return found


def assert_close(directory, expected):
    left, right = tensors_of(directory), tensors_of(expected)
    assert left.keys() == right.keys()
    for name, array in left.items():
        np.testing.assert_allclose(array, right[name], rtol=0, atol=CLOSE, err_msg=name)


def assert_same_steps(steps, expected):
    assert [step for step, _, _ in steps] == [step for step, _, _ in expected]
    np.testing.assert_allclose(steps, expected, rtol=0, atol=CLOSE)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A directory with models and data, and `one`: what one process wrote; the losses of its steps."""
    directory = tmp_path_factory.mktemp("alone")
    equality.prepare(directory)
    return directory, fit(keys_of(directory, "one", {}))


def save_and_resume(world, alone, layout, name):
    """Train under a layout from the start; then go on under it from the checkpoint of one process."""
    directory, steps = alone
    out = name.replace(" ", "")
    for history in world.run(fit, keys=keys_of(directory, out, layout, world.size)):
        assert_same_steps(history, steps)
    assert_close(directory / out / f"checkpoint-{SAVED}", directory / "one" / f"checkpoint-{SAVED}")
    assert_close(directory / out, directory / "one")
    source = str(directory / "one" / f"checkpoint-{SAVED}")
    keys = keys_of(directory, f"{out}-on", layout, world.size, resume_from_checkpoint=source)
    for history in world.run(fit, keys=keys):
        assert_same_steps(history, steps[SAVED:])
    assert_close(directory / f"{out}-on" / f"checkpoint-{STEPS}", directory / "one" / f"checkpoint-{STEPS}")


@pytest.mark.parametrize("name", LAYOUTS_2)
def test_two_ranks_save_and_resume_like_one_process(name, world2, alone):
    save_and_resume(world2, alone, LAYOUTS_2[name], name)


@pytest.mark.parametrize("name", LAYOUTS_4)
def test_four_ranks_save_and_resume_like_one_process(name, world4, alone):
    save_and_resume(world4, alone, LAYOUTS_4[name], name)


def test_a_checkpoint_of_two_ranks_resumes_on_four_and_on_one(world2, world4, alone):
    """tp2 -> pp2 x ep2 -> one process, each going on from the one before."""
    directory, steps = alone
    keys = keys_of(directory, "a", LAYOUTS_2["tp2"], 2, save_steps=1, max_steps=STEPS)
    world2.run(fit, keys=keys)
    source = str(directory / "a" / "checkpoint-1")
    keys = keys_of(directory, "b", LAYOUTS_4["pp2 x ep2"], 4, resume_from_checkpoint=source, save_steps=1)
    assert_same_steps(world4.run(fit, keys=keys)[0], steps[1:])
    source = str(directory / "b" / "checkpoint-2")
    assert_same_steps(fit(keys_of(directory, "c", {}, resume_from_checkpoint=source)), steps[2:])


def test_coded_moments_of_four_ranks_resume_on_one(world4, alone):
    """Tensor shards, pieces of experts and chunks of ZeRO are coded as whole matrices. The losses, which are about 5,
    differ from those with fp32 moments by less than 2e-4 (8 bits), and the codes by what sums in another order change.
    """
    directory, steps = alone
    layout, coded = LAYOUTS_4["tp2 x ep2 x sharding2"], {"ckpt_quant_stage": "O1"}
    for history in world4.run(fit, keys=keys_of(directory, "coded", layout, 4, **coded)):
        assert_same_steps(history, steps)  # saving changes nothing
    source = str(directory / "coded" / f"checkpoint-{SAVED}")
    resumed = fit(keys_of(directory, "coded-on", {}, resume_from_checkpoint=source, **coded))
    again = world4.run(fit, keys=keys_of(directory, "coded-on-4", layout, 4, resume_from_checkpoint=source, **coded))[0]
    assert_same_steps(again, resumed)
    difference = np.abs(np.array(resumed)[:, 1] - np.array(steps[SAVED:])[:, 1])
    assert difference[0] == pytest.approx(0, abs=CLOSE)  # the weights are those that were trained
    assert 0 < difference[-1] < 2e-4
    keys = {name.partition("[")[0].rpartition("/")[2] for name in Reader(f"{source}/optimizer").keys()}  # noqa: SIM118
    assert {"moment1_scale", "moment2_lowest", "moment2_highest"} < keys


def test_an_asynchronous_save_writes_the_same(world2, alone):
    directory, steps = alone
    keys = keys_of(directory, "async", LAYOUTS_2["ep2"], 2, use_async_save=True, save_total_limit=1, save_steps=1)
    for history in world2.run(fit, keys=keys):
        assert_same_steps(history, steps)
    kept = [path.name for path in (directory / "async").iterdir() if "checkpoint" in path.name]
    assert kept == [f"checkpoint-{STEPS}"]
    assert_close(directory / "async" / kept[0], directory / "one" / kept[0])


def fail_beside(keys):
    """As `fit`, with a second rank whose disk is full: what each rank says."""
    import errno

    from erniekit.checkpoint.rank_files import RankFiles
    from erniekit.parallel import backend

    real = RankFiles.write

    def write(self, root):
        if backend.world().rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, root)

    RankFiles.write = write
    try:
        fit(keys)
    except CheckpointError as error:
        return str(error)
    finally:
        RankFiles.write = real


@pytest.mark.parametrize("beside", [False, True])
def test_a_rank_that_cannot_write_fails_all_ranks_with_one_message(beside, world2, alone):
    directory, _ = alone
    keys = keys_of(directory, f"full-{beside}", LAYOUTS_2["pp2"], 2, use_async_save=beside)
    for said in world2.run(fail_beside, keys=keys):
        assert f"checkpoint-{SAVED} could not be written" in said and "the disk is full" in said
    assert not [path for path in (directory / f"full-{beside}").iterdir() if "checkpoint" in path.name]


def die_while_saving(keys):
    """As `fit`, with a second rank that is killed when it writes its part of the last checkpoint."""
    from erniekit.checkpoint.rank_files import RankFiles
    from erniekit.parallel import backend

    real = RankFiles.write

    def write(self, root):
        if backend.world().rank == 1 and root.name == f".checkpoint-{STEPS}.new.tmp":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, root)

    RankFiles.write = write
    fit(keys)


@pytest.mark.parametrize("beside", [False, True])
def test_a_rank_killed_while_saving_leaves_the_last_whole_checkpoint(beside, alone):
    directory, steps = alone
    world = World(2)  # its own: it does not live
    with pytest.raises(RankError, match="process ended"):
        world.run(
            die_while_saving, keys=keys_of(directory, f"killed-{beside}", LAYOUTS_2["ep2"], 2, use_async_save=beside)
        )
    out = directory / f"killed-{beside}"
    left = {f"checkpoint-{SAVED}", f".checkpoint-{STEPS}.new.tmp"}
    assert {path.name for path in out.iterdir() if path.is_dir()} == left
    assert_same_steps(fit(keys_of(directory, out.name, {})), steps[SAVED:])
    assert {path.name for path in out.iterdir() if path.is_dir()} == {
        f"checkpoint-{SAVED}",
        f"checkpoint-{STEPS}",
        "ema",
    }


@pytest.fixture(scope="module")
def adapted(alone):
    """Keys of a run that adapts the model of one process; `lora` is what one process wrote."""
    directory, _ = alone
    base = str(directory / "one")
    keys = {"fine_tuning": "LoRA", "continue_training": True, "lora_rank": 4, "model_name_or_path": base}
    fit(keys_of(directory, "lora", {}, **keys))
    return keys


@pytest.mark.parametrize("name", ["tp2", "pp2", "ep2"])
def test_an_adapter_saved_by_any_layout_is_whole(name, world2, alone, adapted):
    directory, _ = alone
    world2.run(fit, keys=keys_of(directory, f"lora-{name}", LAYOUTS_2[name], 2, **adapted))
    source = str(directory / "lora" / f"checkpoint-{SAVED}")
    keys = keys_of(directory, f"lora-{name}-on", LAYOUTS_2[name], 2, **adapted, resume_from_checkpoint=source)
    world2.run(fit, keys=keys)
    written = [f"lora-{name}/checkpoint-{SAVED}", f"lora-{name}", f"lora-{name}/ema", f"lora-{name}-on"]
    alone_wrote = [f"lora/checkpoint-{SAVED}", "lora", "lora/ema", "lora"]
    for mine, one in zip(written, alone_wrote, strict=True):
        found, expected = (Reader(directory / place / ADAPTER_FILE) for place in (mine, one))
        assert found.keys() == expected.keys()
        for tensor in found.keys():  # noqa: SIM118
            np.testing.assert_allclose(found.read(tensor), expected.read(tensor), rtol=0, atol=CLOSE)
