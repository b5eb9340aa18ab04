"""The words about keys: `erniekit help` and docs/config.md, which is made from the schema."""

import make_config_page as tool
import wrap_docs

from erniekit.cli import info
from erniekit.config import pointless, reference, schema
from erniekit.config.compat_keys import RULES
from erniekit.config.methods import METHODS


def test_the_page_is_current():
    page = tool.page()
    assert tool.PAGE.read_text(encoding="utf-8") == page, "run python tools/make_config_page.py"
    assert wrap_docs.wrap(page) == page


def test_the_page_has_every_key_and_every_other_name_once():
    lines = tool.page().splitlines()
    for name in schema.fields():
        assert sum(line.startswith(f"| `{name}` | ") for line in lines) == 1, name
    for name in RULES:
        assert sum(f"`{name}`" in line for line in lines) >= 1, name


def test_a_row_says_type_default_limits_meaning_and_erniekits_name():
    rows = {line.split("`")[1]: line for line in tool.page().splitlines() if line.startswith("| `")}
    assert rows["lora_rank"].startswith("| `lora_rank` | whole number | `8` | at least 1 | Rank of the adapters")
    assert rows["save_strategy"].count("no, steps, epoch") == 1
    assert rows["lora_rank"].endswith("| same |") and rows["truncation"].endswith("| own |")


def test_every_group_is_listed_for_some_command_and_no_key_twice():
    listed = {group for groups, _ in reference.KEYS.values() for group in groups.split(",") if group}
    assert listed == set(schema.GROUPS)
    for command in reference.KEYS:
        names = [entry.name for entries in reference.by_group(command).values() for entry in entries]
        assert len(names) == len(set(names))


def test_a_command_lists_no_key_that_it_never_reads():
    """Also none that it would report as having no effect whatever else is given."""
    listed = {
        command: {entry.name for entries in reference.by_group(command).values() for entry in entries}
        for command in reference.KEYS
    }
    for command, names in listed.items():
        assert not names & pointless.never_read(command), command
    of_training = {"train_dataset_path", "mix_strategy", "recompute", "adaptive_max_imgtoken_rate", "scale_loss"}
    assert of_training <= listed["train"] and not of_training & (listed["eval"] | listed["chat"])
    assert {"vision_config_path", "max_pixels", "checkpoint", "stage"} <= listed["eval"] & listed["chat"]
    assert {"eval_dataset_path", "box_coordinates", "packing"} <= listed["eval"] - listed["chat"]
    assert "stream" in listed["chat"] - listed["eval"] and "chat_tools" not in listed["train"]


def test_a_group_names_the_methods_that_read_it():
    assert reference.group_doc("vision").endswith("Read only with stage: VL-SFT, VL-PT, VL-DPO or VL-RL.")
    assert reference.group_doc("rewards").endswith("Read only with stage: RL or VL-RL.")
    of_pairs = "DPO or VL-DPO; `max_prompt_len` also with RM, RL or VL-RL; `beta` also with KTO."
    assert reference.group_doc("preference").endswith(f"Read only with stage: {of_pairs}")
    assert "stage:" not in reference.group_doc("optimizer")
    written = [group.__doc__ or "" for group in schema.GROUPS.values()]
    assert not any("with stage:" in text for text in written)


def test_commands_list_what_methods_that_generate_read():
    """`train` the sampling of rollouts, `eval` what it takes to score completions."""
    listed = {
        command: {entry.name for entries in reference.by_group(command).values() for entry in entries}
        for command in ("train", "eval")
    }
    assert {key for facts in METHODS.values() for key in facts.also_reads} <= listed["train"]
    assert {"reward_funcs", "max_completion_length", "tools", "max_prompt_len", "soft_max_length"} <= listed["eval"]


def test_defaults_of_methods_are_in_the_page_and_in_help():
    assert ("learning_rate", "1e-06", "RL or VL-RL") in reference.method_defaults()
    assert ("top_p", "1.0", "GKD, RL or VL-RL") in reference.method_defaults()
    page, text = tool.page(), info.usage("train")
    for key, value, stages in reference.method_defaults():
        assert f"| {stages} | `{key}` | `{value}` |" in page and f"  {key}: {value} with stage: {stages}" in text
