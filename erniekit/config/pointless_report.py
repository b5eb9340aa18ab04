"""Keys about report_to that its names make pointless (see pointless.py)."""

from erniekit.config.methods import join_names
from erniekit.config.pointless_rule import Rule
from erniekit.config.schema_train import TRACKERS

REPORT_RULES = [
    Rule(
        "logging_dir",
        lambda c, f: not set(c.report_to) - {"none"},
        "report_to is none; metrics.jsonl and loss.png go to output_dir",
    ),
    Rule(
        "logging_dir",
        lambda c, f: set(c.report_to) == {"trackio"},
        "trackio writes to its own directory (TRACKIO_DIR)",
    ),
    Rule(
        "run_name project",
        lambda c, f: not set(c.report_to) & set(TRACKERS),
        f"read only with report_to: {join_names(TRACKERS, 'or')}",
    ),
]
