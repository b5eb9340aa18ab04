"""Completions of a rollout that a server of others generates, which gets the weights of each update."""

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

from erniekit import lora
from erniekit.checkpoint.manager import CheckpointManager
from erniekit.checkpoint.processor import settings_of
from erniekit.checkpoint.reshard import Shares
from erniekit.config.schema import Config
from erniekit.data.chat.template import Template
from erniekit.data.prompts import Prompt
from erniekit.models.decoder import CausalLM
from erniekit.parallel.agree import on_first
from erniekit.training.rl.completions import Completion, Group
from erniekit.training.rl.generate import has_next_turn, never_sampled, stop_ids
from erniekit.training.rl.rollout_server import RolloutServer, ServedTurn
from erniekit.training.rl.tools import ToolLoop
from erniekit.training.rl.track import Track, completion_of
from erniekit.training.trainable import prepare_save, trained_tensors
from erniekit.utils import heartbeat
from erniekit.utils.errors import TrainError

DIRECTORY = "rollout_weights"  # below output_dir


class WeightExport:
    """Writes the weights of a run, or its adapter, for the server, and removes those before. All ranks call it."""

    def __init__(self, cfg: Config, model: CausalLM, template: Template, sources: tuple[Path, Path]) -> None:
        """`sources`: the directories of the model and of the tokenizer."""
        self._model, self._template, self._sources = model, template, sources
        self._root = _output_dir(cfg) / DIRECTORY
        self._shares, self._ranks = Shares.of(model, model.mesh), model.mesh.world_group
        self._processor = settings_of(sources[0])

    def write(self, name: str) -> Path:
        """Write the present weights -> their directory."""
        tensors = trained_tensors(self._model)
        files, add = prepare_save(
            self._model, tensors, self._shares, "pt", self._sources, self._template, self._processor
        )
        on_first(self._ranks, lambda: self._root.mkdir(parents=True, exist_ok=True))
        directory = self._root / name
        CheckpointManager(self._root, None, self._ranks).save_into(directory, add, files)
        return directory

    def keep_only(self, name: str) -> None:
        """Remove the directories of other updates."""
        for directory in self._root.iterdir():
            if directory.name != name:
                shutil.rmtree(directory, ignore_errors=True)


class RemoteGenerator:
    """Samples completions as rl.generate.Generator does, on a server. The first rank asks it, and every rank gets all
    completions.
    """

    def __init__(
        self,
        cfg: Config,
        model: CausalLM,
        template: Template,
        server: RolloutServer | None,
        export: WeightExport,
        tools: ToolLoop | None = None,
    ) -> None:
        """`server`: on the first rank alone."""
        self._cfg, self._model, self._server, self._export, self._tools = cfg, model, server, export, tools
        self._ranks = model.mesh.world_group
        self._stops = stop_ids(model, template)
        self._banned = sorted(never_sampled(model, template) - set(self._stops))

    def begin_rollout(self, step: int) -> None:
        """Bring the weights after `step` optimizer steps to the server."""
        name = f"{_output_dir(self._cfg).name}-step-{step}"
        directory = self._export.write(name)
        on_first(self._ranks, lambda: self._update(name, directory))

    def _update(self, name: str, directory: Path) -> None:
        assert self._server is not None, "the first rank has the server"
        if self._cfg.rollout_update_command is not None:
            self._server.run_command(directory)
        else:
            assert lora.state_of(self._model) is not None, "config/schema_rollout_server.py demands a command"
            self._server.load_adapter(name, directory)
        self._export.keep_only(name)

    def __call__(self, prompts: Sequence[Prompt], draws: Sequence[Sequence[int]], groups: Sequence[int]) -> list[Group]:
        """See Generator."""
        tasks = [(i, draw) for i, of_prompt in enumerate(draws) for draw in of_prompt]
        lines = on_first(self._ranks, lambda: self._lines(prompts, tasks))
        result = [Group(i, []) for i in range(len(prompts))]
        for (i, _), columns in zip(tasks, lines, strict=True):
            result[i].completions.append(completion_of(i, groups[i], columns))
        return result

    def _lines(self, prompts: Sequence[Prompt], tasks: Sequence[tuple[int, int]]) -> list[list[object]]:
        tracks = [Track.begin(prompts[i], draw, self._tools) for i, draw in tasks]
        self._run(tracks)
        return [track.finished() for track in tracks]

    def _run(self, tracks: Sequence[Track]) -> None:
        """Ask for turns in threads until every completion is over; tools run in this one."""
        pool = ThreadPoolExecutor(min(self._cfg.rollout_max_running, len(tracks)), thread_name_prefix="rollouts")
        after_turn = None if self._tools is None else self._tools.after_turn
        try:
            running: dict[Future[ServedTurn], Track] = {pool.submit(self._ask, track): track for track in tracks}
            for future, track in _as_they_end(running):
                turn = future.result()
                track.add_turn(turn.ids, turn.stop_id, turn.logps)
                if has_next_turn(self._cfg, self._model, after_turn, track, turn.ids, turn.stop_id):
                    running[pool.submit(self._ask, track)] = track
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, track: Track) -> ServedTurn:
        assert self._server is not None
        room = self._cfg.max_completion_length - len(track.ids)
        return self._server.complete(
            [*track.prompt.ids, *track.inputs], room, self._stops, self._banned, track.random_draw
        )


def _output_dir(cfg: Config) -> Path:
    assert cfg.output_dir is not None, "a run has one"
    return Path(cfg.output_dir).resolve()


def require_same_weights(cfg: Config, completions: Sequence[Completion]) -> None:
    """Raise TrainError where a server's log-probabilities are far from those of the training computation: it then has
    other weights, such as those of an earlier update.
    """
    differences = [
        np.abs(done.old_logps - done.rollout_logps)[done.is_sampled]
        for done in completions
        if done.old_logps is not None
    ]
    mean = float(np.concatenate(differences).mean())
    if not mean <= cfg.rollout_tolerance:
        raise TrainError(
            f"rollout_base_url: {cfg.rollout_base_url}: its log-probabilities differ from this run's by {mean:.3g} "
            f"nats a token on average (rollout_tolerance {cfg.rollout_tolerance:g}). Does it serve the model of "
            "model_name_or_path with the weights of the last update, and report log-probabilities before filters?"
        )


def _as_they_end(running: dict[Future[ServedTurn], Track]) -> Iterator[tuple[Future[ServedTurn], Track]]:
    """Futures with their tracks as they end; more may be added to `running`."""
    while running:
        heartbeat.waiting(None)
        ended, _ = wait(running, timeout=60.0, return_when=FIRST_COMPLETED)
        for future in ended:
            yield future, running.pop(future)
