"""Keys of the stages DPO and VL-DPO."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from erniekit.config.fields import key

# Names that other toolkits use for the same loss; orpo is ORPO's odds-ratio term with its sft_loss_ratio of 1.
ALIASES = {"orpo": "or", "exo": "exo_pair", "apo": "apo_zero"}
AVERAGED = ("ipo", "simpo", "or")  # defined on log-probabilities per token
REFERENCE_FREE = ("simpo", "or")  # defined without a reference
SMOOTHED = ("sigmoid", "simpo", "dpop", "robust", "exo_pair")  # the losses that read label_smoothing
LOSS_TYPES = (
    "sigmoid hinge ipo simpo or orpo dpop kto_pair sppo_hard nca_pair robust exo exo_pair apo apo_zero apo_down"
).split()


def option_problems(loss_type: str, label_smoothing: float, offset_alpha: float) -> Iterator[str]:
    """The options that do not fit a loss, each as "key: what is wrong". `loss_type` is one of LOSS_TYPES."""
    name = ALIASES.get(loss_type, loss_type)
    if label_smoothing and name not in SMOOTHED:
        yield f"label_smoothing: loss_type: {loss_type} has no label smoothing; these have: {', '.join(SMOOTHED)}"
    if name == "exo_pair" and not label_smoothing:
        yield f"label_smoothing: loss_type: {loss_type} needs a value above 0; its paper uses 1e-3"
    if offset_alpha and name != "sigmoid":
        yield f"offset_alpha: only loss_type: sigmoid has an offset, not {loss_type}"


@dataclass(frozen=True, kw_only=True)
class PreferenceArgs:
    """The preference loss, what it is compared with, and how long prompts may be (docs/preference.md)."""

    group: ClassVar[str] = "preference"

    max_prompt_len: int = key(
        2048, "A longer prompt loses its earliest turns; that of reinforcement learning is left out, and counted.", ge=1
    )
    loss_type: str = key(
        "sigmoid",
        "The loss; formulas and papers are in erniekit/losses/preference.py.",
        choices=LOSS_TYPES,
    )
    beta: float = key(0.1, "How strongly the policy is kept near the reference.", gt=0)
    label_smoothing: float = key(
        0.0, "Assumed share of pairs whose answers are labelled the wrong way round.", ge=0, lt=0.5
    )
    pref_loss_ratio: float = key(1.0, "Weight of the preference loss.", ge=0)
    sft_loss_ratio: float = key(0.0, "Weight of the chosen answers' next-token loss (orpo: 1).", ge=0)
    offset_alpha: float = key(
        0.0, "sigmoid: require a larger margin where the two `sort` scores differ more (ODPO).", ge=0
    )
    simpo_gamma: float = key(0.5, "simpo: the target margin.", ge=0)
    dpop_lambda: float = key(50.0, "dpop: penalty on a chosen answer that becomes less likely.", ge=0)
    normalize_logps: bool = key(
        False,
        "Scale each log-probability to the mean length of its pair (ERNIEKit's default is True; the papers do not).",
    )
    reference_free: bool = key(False, "No reference; its log-probabilities count as 0.")
    ref_model_update_steps: int = key(-1, "The reference becomes the policy every N steps; -1: never.", ge=1, off=-1)
    ref_logps_cache: str | None = key(
        None,
        "A file for the reference's log-probabilities: computed once, before training, and read by later "
        "runs on the same model and data; the reference then needs no memory.",
        path=True,
    )


def wants_reference(args: PreferenceArgs) -> bool:
    """Whether the loss that these keys ask for compares with a reference."""
    return not args.reference_free and ALIASES.get(args.loss_type, args.loss_type) not in REFERENCE_FREE
