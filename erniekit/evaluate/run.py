"""`erniekit eval`: measure, print a table, write eval_results.json."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from erniekit.build import PreparedModel
from erniekit.checkpoint.model_shape import require_pictures
from erniekit.config import Config
from erniekit.data.loader import Loader
from erniekit.evaluate.answers import Prediction, Question, answer_questions, read_questions, score
from erniekit.evaluate.benchmark import Choice, measure_benchmark, print_benchmark
from erniekit.evaluate.reference import find_reference, open_reference
from erniekit.generation.load import ChatModel, find_model
from erniekit.join import join, require_same_files
from erniekit.models.decoder import CausalLM
from erniekit.models.pipeline_layout import chunks_to_use
from erniekit.parallel.agree import all_or_none
from erniekit.parallel.mesh import Mesh
from erniekit.training.data import DataContext
from erniekit.training.evaluators import EvaluatedModel, EvaluationData
from erniekit.training.evaluators import score as score_data
from erniekit.training.methods import method_of
from erniekit.training.reference import PairScorer
from erniekit.utils import atomic, log
from erniekit.utils.directory_lock import make_directory
from erniekit.utils.errors import ConfigError, UserError
from erniekit.utils.user_files import read_json_object
from erniekit.utils.wording import count_of

Watch = Callable[[CausalLM], AbstractContextManager[None]]

RESULTS_FILE, PREDICTIONS_FILE = "eval_results.json", "eval_predictions.jsonl"

# metric -> (its name in the table, its format)
_SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "loss_text": ("loss of text without pictures", "{:.4f}"),
    "loss_image": ("loss of texts with images", "{:.4f}"),
    "loss_video": ("loss of texts with videos", "{:.4f}"),
    "perplexity": ("perplexity", "{:.4g}"),
    "token_accuracy": ("token accuracy", "{:.2%}"),
    "reward_accuracy": ("reward accuracy", "{:.2%}"),
    "reward_margin": ("reward margin", "{:.4f}"),
    "reward_chosen": ("reward of the chosen", "{:.4f}"),
    "reward_rejected": ("reward of the rejected", "{:.4f}"),
    "logp_chosen": ("log-probability of the chosen", "{:.2f}"),
    "logp_rejected": ("log-probability of the rejected", "{:.2f}"),
    "kl": ("log(policy / reference)", "{:.4f}"),
    "reward": ("reward", "{:.4f}"),
    "completion_length": ("tokens of a completion", "{:.1f}"),
    "truncated": ("completions without an end token", "{:.2%}"),
    "exact_match": ("exact match", "{:.2%}"),
    "tool_call_exact_match": ("calls: exact match", "{:.2%}"),
    "tool_name_match": ("calls: right functions", "{:.2%}"),
    "tool_call_decision": ("calls: made exactly if due", "{:.2%}"),
    "num_unreadable_calls": ("calls: unreadable", "{:d}"),
    "accuracy": ("accuracy", "{:.2%}"),
    "macro_f1": ("macro F1", "{:.2%}"),
    "anls": ("ANLS of texts about pictures", "{:.2%}"),
    "option_accuracy": ("options: right letter", "{:.2%}"),
    "box_iou50": ("boxes: F1 at IoU 0.5", "{:.2%}"),
    "box_mean_iou": ("boxes: mean IoU", "{:.2%}"),
    "num_boxes_overshooting": ("boxes: beyond 0 to 1000", "{:d}"),
    "num_boxes_refused": ("boxes: corners swapped", "{:d}"),
    "rouge_l": ("ROUGE-L", "{:.2%}"),
    "bleu": ("BLEU", "{:.2f} of 100"),
}


def evaluate(cfg: Config) -> dict[str, Any]:
    """Evaluate the model that `cfg` names (see generation.load.find_model) on eval_dataset_path, or, with dataset_type:
    pretrain and without it, on the second part of `split` of input_dir.

    The scores are those of the method's evaluator (training/evaluators.py), as evaluations during training report them:
    for most methods `loss` (mean -log p over supervised tokens, natural logarithm), `perplexity` (its exponential) and
    `token_accuracy` (share of supervised tokens that are the model's first choice), with pictures also the loss by
    modality. With predict_with_generate the
    model also answers the last question of each sample and those whose answers call tools, choosing tokens as
    temperature, top_p and so on say, and the metrics of evaluate.text_metrics are added, for conversations with tools
    those of call_answers too, and for questions with pictures those of picture_answers. In pairs of answers, the
    model's is compared with the chosen one.

    With eval_benchmark the questions of a benchmark are scored instead (evaluate/benchmark.py).

    The model and the data are divided over the ranks of the job as the degrees in `cfg` say; the numbers are those of
    one process, and every rank has them. The first rank writes them to `eval_output` or `output_dir` and prints a
    table: eval_results.json, and with answers eval_predictions.jsonl, a line each.

    Returns what is in eval_results.json. Raises UserError that names the key, file or line, on every rank.
    """
    started = time.monotonic()
    cfg = replace(cfg, context_parallel_degree=-1)  # every data rank has whole rows
    mesh = join(cfg, command="eval")
    reports = mesh.rank == 0
    with all_or_none(mesh.world_group):
        target = _target(cfg) if reports else None
    predictions: Sequence[Prediction | Choice]
    if cfg.eval_benchmark is None:
        results, predictions = measure(cfg, mesh)
    else:
        results, predictions = measure_benchmark(cfg, mesh)
    results["seconds"] = round(time.monotonic() - started, 2)
    try:
        with all_or_none(mesh.world_group):
            if target is not None:
                _write(target, results, predictions if cfg.predict_with_generate or cfg.eval_benchmark else None)
    finally:  # on a full disk, the table is all that is left of the evaluation
        if reports:
            (print_table if cfg.eval_benchmark is None else print_benchmark)(results)
    return results


def measure(cfg: Config, mesh: Mesh, watch: Watch | None = None) -> tuple[dict[str, Any], Sequence[Prediction]]:
    """What `evaluate` returns, without the seconds, and the model's answers; nothing is written. `watch`: a context
    around the pass over the data for the scores, made with the model.
    """
    world = mesh.world_group
    predictions: Sequence[Prediction] = ()
    with ExitStack() as stack:
        with all_or_none(world):
            found = find_model(cfg)
            require_pictures(cfg, found.prepared.config, found.path)
            chunks = chunks_to_use(cfg, found.prepared.config, mesh.degrees, mesh.pipe)
            reference = find_reference(cfg, found)
            context = DataContext(cfg, found.tokenizer, found.template, mesh, found.vision)
            data = method_of(cfg).open_evaluation_data(context)
            stack.callback(data.close)
            questions: list[Question] = []
            if cfg.predict_with_generate:
                assert isinstance(data, Loader), "config/checks.py refuses prompts without answers"
                questions = read_questions(cfg, data.dataset, found)
        require_same_files(found.prepared.path, found.prepared.adapter_dir, data.identity, world)
        opened = found.load(mesh, chunks)  # keys and data are checked: from here on weights are read
        with nullcontext() if watch is None else watch(opened.model):
            results = {"model": str(opened.path)} | _scores(cfg, opened, data, reference)
        if cfg.predict_with_generate:
            predictions = answer_questions(cfg, opened, questions)
            results |= score(predictions)
    return results, predictions


def print_table(results: dict[str, Any]) -> None:
    """The metrics as a table on stdout."""
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, (shown, form) in _SHOWN.items():
        if name in results:
            table.add_row(shown, form.format(results[name]))
    console = Console()
    with console.capture() as text:  # printed by us: where nobody reads, a console ends the process by itself
        console.print(f"{results['model']}: {count_of(results['num_samples'], 'sample')}", markup=False, soft_wrap=True)
        console.print(table)
    print(text.get(), end="", flush=True)


def _scores(cfg: Config, opened: ChatModel, data: EvaluationData, reference: PreparedModel | None) -> dict[str, Any]:
    """The scores of the method's evaluator, with the numbers of samples, and of those dropped or cut."""
    model = opened.model
    compared_with = open_reference(cfg, model, opened.path, reference, PairScorer(cfg.loss_subbatch_seqlen))
    evaluated = EvaluatedModel(str(opened.path), cfg, model, compared_with)
    cure = "Evaluate an earlier checkpoint (checkpoint: ...)."
    scores = score_data(method_of(cfg).evaluator, evaluated, data, cure)
    read = data.report()
    counts = {f"num_{name}": read[name] for name in ("dropped", "cut") if name in read}
    return scores.counts | counts | scores.metrics


def _target(cfg: Config) -> Path:
    """The directory for the results, made now so that an evaluation of hours does not fail at its end."""
    directory = cfg.eval_output or cfg.output_dir
    assert directory, "config/checks.py requires one of the two"
    target, key = Path(directory), "eval_output" if cfg.eval_output else "output_dir"
    make_directory(target, key)
    for name in (RESULTS_FILE, PREDICTIONS_FILE):
        if (target / name).is_dir():
            raise ConfigError(f"{key}: {target / name} is a directory. Remove or rename it, or choose another {key}.")
    return target


def _write(target: Path, results: dict[str, Any], predictions: Sequence[Prediction | Choice] | None) -> None:
    """Write the files atomically; predictions first, since the results mark a finished evaluation."""
    _log_replaced(target / RESULTS_FILE, results)
    files = {RESULTS_FILE: json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"}
    if predictions is not None:
        lines = (json.dumps(prediction.record(), ensure_ascii=False) for prediction in predictions)
        files = {PREDICTIONS_FILE: "\n".join(lines) + "\n"} | files
    for name, text in files.items():
        try:
            atomic.write_text(target / name, text)
        except OSError as error:
            raise UserError(
                f"{target / name}: cannot be written: {error.strerror}. Free space, or set eval_output."
            ) from None
    log.info(f"results: {', '.join(str(target / name) for name in files)}")


def _log_replaced(file: Path, results: dict[str, Any]) -> None:
    """Log if the results of another model, or of another kind of evaluation, are replaced."""
    try:
        before = read_json_object(file, UserError)
    except (FileNotFoundError, UserError):
        return
    if any(before.get(name) != results.get(name) for name in ("model", "benchmark")):
        benchmark = f" on {before['benchmark']}" if "benchmark" in before else ""
        log.info(f"{file}: replaces the results of {before.get('model')}{benchmark}; eval_output keeps them apart")
