"""Checks the keys: which take effect, which do not, which are refused, and which defaults differ from ERNIEKit's."""

from importlib.util import find_spec

from erniekit import config
from erniekit.cli.check.report import Section
from erniekit.config import Config
from erniekit.utils.wording import count_of


def inspect(section: Section, cfg: Config, command: str) -> None:
    """Add the findings about the keys of the configuration."""
    refused = config.unsupported(cfg, command)
    for line in refused:
        section.add("error", f"this version does not have {line}")
    named = {name for note in cfg.notes for name in note.partition(": no effect: ")[0].split(", ")}
    given = cfg.given | {name for name, _ in cfg.extras}
    without = len(given & named)
    section.add(
        "ok",
        f"{count_of(len(given), 'key')} given: {len(given) - without - len(refused)} honoured, "
        f"{without} without effect, {len(refused)} refused",
    )
    for note in cfg.notes:
        section.add("note", note)
    if command == "train":
        _find_boards(section, cfg)


def _find_boards(section: Section, cfg: Config) -> None:
    """Warn of boards of report_to whose package is not on this machine, which may not be the one that trains."""
    for name in cfg.report_to:
        if name != "none" and find_spec("tensorboardX" if name == "tensorboard" else name) is None:
            section.add(
                "warning",
                f"report_to: the package of {name} is not installed here, without which `train` refuses to start. "
                f'Install it with `pip install "erniekit[{name}]"`, or remove {name} from report_to',
            )
