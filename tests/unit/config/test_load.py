"""Files, blocks and overrides become one Config; what is wrong is said with its key and place."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erniekit.config import Config, load, schema
from erniekit.config.fields import from_saved
from erniekit.config.values import split_list
from erniekit.utils.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[3]
BASE = "model_name_or_path: m\ntrain_dataset_path: a.jsonl\noutput_dir: out\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file (named x.yaml unless given) into an empty directory that is the current one, and gives its name."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str, name: str = "x.yaml") -> str:
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write_file


def message(path: str | None = None, overrides: object = None, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides, **options)
    return str(caught.value)


def test_values_become_the_type_of_their_key(write):
    text = "learning_rate: 1e-5\nmax_steps: '10'\nmax_estimate_samples: 1e5\npacking: 'True'\nlogging_dir: null\n"
    cfg = load(write(BASE + text))
    assert cfg.learning_rate == 1e-5 and isinstance(cfg.learning_rate, float)
    assert cfg.max_steps == 10 and cfg.max_estimate_samples == 100_000 and isinstance(cfg.max_estimate_samples, int)
    assert cfg.packing is True and cfg.logging_dir is None


def test_a_path_of_a_list_may_hold_a_comma(write):
    text = (
        "model_name_or_path: m\noutput_dir: out\ntrain_dataset_type: [erniekit]\ntrain_dataset_path:\n  - a, b.jsonl\n"
    )
    cfg = load(write(text))
    assert cfg.train_dataset_path == ("a, b.jsonl",)
    assert load(write(cfg.to_yaml(), "again.yaml")) == cfg
    two = load(write(text + '  - "c.jsonl"\n'), ["train_dataset_type=erniekit,alpaca"])
    assert two.train_dataset_path == ("a, b.jsonl", "c.jsonl")
    assert load(write(BASE), ["train_dataset_path=[x,y]"]).train_dataset_path == ("x", "y")
    assert load(write(BASE), ['train_dataset_path="x, y",z']).train_dataset_path == ("x, y", "z")


@given(st.lists(st.text(alphabet='a," \n')))
def test_quotes_protect_commas_and_quotes(items):
    wanted = [item.strip() for item in items if item.strip()]
    quoted = ",".join('"' + item.replace('"', '""') + '"' for item in wanted)
    assert split_list(quoted) == wanted


@pytest.mark.parametrize("value", ["True", "true", "1", "yes", "'on'", "'1'"])
def test_many_spellings_of_true(write, value):
    assert load(write(BASE + f"amp_master_grad: {value}\n")).amp_master_grad is True


def test_no_is_a_word_where_a_word_is_expected(write):
    assert load(write(BASE + "save_strategy: no\n")).save_strategy == "no"  # YAML 1.1 reads the bare word as false


def test_none_is_null_where_null_is_allowed(write):
    cfg = load(write("model_name_or_path: m\noutput_dir: None\n"), command="chat")
    assert cfg.output_dir is None


def test_a_date_is_text(write):
    assert load(write(BASE + "logging_dir: 2025-11-21\n")).logging_dir == "2025-11-21"


def test_words_of_choices_may_be_in_any_case(write):
    assert load(write(BASE + "stage: sft\nfine_tuning: full\n")).fine_tuning == "Full"


def test_sources_and_shares_are_lists(write):
    cfg = load(write("train_dataset_path: [a.jsonl, b.jsonl]\ntrain_dataset_prob: [0.2, 0.8]\n"), command="version")
    assert (cfg.train_dataset_path, cfg.train_dataset_prob) == (("a.jsonl", "b.jsonl"), (0.2, 0.8))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("max_steps: abc", "max_steps: expected an integer, got 'abc' (x.yaml:4)"),
        ("max_steps: 1.5", "max_steps: expected an integer, got 1.5 (x.yaml:4)"),
        ("max_steps: True", "max_steps: expected an integer, got True (x.yaml:4)"),
        ("max_steps: 0", "max_steps: must be at least 1 (or -1), got 0 (x.yaml:4)"),
        ("learning_rate: fast", "learning_rate: expected a number, got 'fast' (x.yaml:4)"),
        ("learning_rate: .nan", "learning_rate: expected a number, got .nan (x.yaml:4)"),
        ("learning_rate: [1]", "learning_rate: expected a number, got [1] (x.yaml:4)"),
        ("adam_beta2: 1", "adam_beta2: must be at least 0 and less than 1, got 1.0 (x.yaml:4)"),
        ("packing: 2", "packing: expected True or False, got 2 (x.yaml:4)"),
        ("seed: 4294967296", "seed: must be at least 0 and less than 4294967296, got 4294967296 (x.yaml:4)"),
        ("profile_step_start: 9", "profile_step_start: 9 is after profile_step_end: 5 (x.yaml:4)"),
        ("save_steps: -5", "save_steps: must be at least 1, got -5 (x.yaml:4)"),
        ("compute_type: bf17", "compute_type: expected one of bf16, fp16, fp32, wint8"),
        ("logging_dir: {a: 1}", "logging_dir: expected text, got {'a': 1} (x.yaml:4)"),
        ("rope_scaling: {type: yarn}", "rope_scaling: expected one of '' (nothing), linear, dynamic, yarn, got {'type"),
        ("from_scratch: perhaps", "from_scratch: expected True or False, got 'perhaps' (x.yaml:4)"),
    ],
)
def test_a_wrong_value_names_key_expectation_and_place(write, line, expected):
    assert expected in message(write(BASE + line + "\n"))


def test_a_mapping_on_the_command_line_is_shown_as_in_a_file(write):
    text = message(write(BASE), ["logging_dir={a: [1, {b: 2}]}"])
    assert text == "logging_dir: expected text, got {'a': [1, {'b': 2}]} (command line)"


@pytest.mark.parametrize("word", ["=3", "--", "--=3", " =3"])
def test_a_word_without_a_key_is_an_error(write, word: str):
    assert message(write(BASE), [word]) == f"{word!r} names no key. Example: max_steps=100"


def test_a_block_on_the_command_line_is_read_as_in_a_file(write):
    cfg = load(write(BASE), ["training_args={seed: 3, max_steps: 7}", "model_args.max_seq_len=64"])
    assert (cfg.seed, cfg.max_steps, cfg.max_seq_len) == (3, 7, 64)
    assert message(write(BASE), ["training_args={sed: 3}"]) == "sed: unknown key; did you mean seed? (command line)"
    assert message(write(BASE), ["training_args="]) == "training_args: unknown key (command line)"


def test_every_problem_is_told_at_once(write):
    text = message(write(BASE + "max_steps: abc\nmax_seq_lenn: 5\nlerning_rate: 1\n"), ["packing=maybe"])
    assert "max_steps: expected an integer" in text
    assert "max_seq_lenn: unknown key; did you mean max_seq_len? (x.yaml:5)" in text
    assert "lerning_rate: unknown key; did you mean learning_rate? (x.yaml:6)" in text
    assert "packing: expected True or False, got 'maybe' (command line)" in text


def test_an_unknown_key_can_be_let_through_but_is_named(write):
    path = write(BASE + "my_own_key: 5\n")
    assert message(path) == "my_own_key: unknown key (x.yaml:4)"
    assert any("my_own_key" in note for note in load(path, allow_extra=True).notes)


def test_blocks_only_group_keys(write):
    flat = load(write(BASE + "seed: 7\nmax_steps: 3\n"))
    blocks = (
        "model_args: {model_name_or_path: m}\ndata_args:\n  train_dataset_path: a.jsonl\nx_args:\n  output_dir: out\n"
    )
    nested = load(
        write(blocks + "  inner_config:\n    seed: 7\ntrainer_args: {max_steps: 3}\nlora_config:\n", "y.yaml")
    )
    assert nested == flat


def test_a_known_key_with_a_mapping_is_no_block(write):
    cfg = load(write(BASE + "vision_config: {depth: 3}\n"), ["amp_custom_white_list.async_save=true"])
    assert dict(cfg.extras) == {"vision_config": {"depth": 3}, "amp_custom_white_list": {"async_save": True}}


def test_one_key_in_two_blocks_must_not_contradict_itself(write):
    text = message(write(BASE + "training_args:\n  seed: 1\nfinetuning_args:\n  seed: 2\n"))
    assert text == "seed: given twice: seed: 1 (x.yaml:5) and seed: 2 (x.yaml:7). Keep one of them."
    assert load(write(BASE + "training_args:\n  seed: 1\nfinetuning_args:\n  seed: 1\n")).seed == 1


def test_the_same_key_twice_in_a_file_is_an_error(write):
    assert (
        message(write("seed: 1\npacking: True\nseed: 1\n"))
        == "seed: given twice (lines 1 and 3 of x.yaml). Keep one of them."
    )
    assert "x.json: the key 'seed' stands twice in one object" in message(write('{"seed": 1, "seed": 2}', "x.json"))


def test_merge_keys_of_yaml_work_and_give_way(write):
    cfg = load(write(BASE + "env: &common\n  seed: 5\n  max_steps: 9\ntraining_args:\n  <<: *common\n  seed: 6\n"))
    assert (cfg.seed, cfg.max_steps) == (6, 9)


def test_overrides_win_over_the_file_and_the_last_one_over_the_others(write):
    cfg = load(write(BASE + "seed: 1\nmax_steps: 2\n"), ["seed=3", "training_args.max_steps=4", "seed=5"])
    assert (cfg.seed, cfg.max_steps) == (5, 4)


def test_what_overrides_replace_is_said_in_their_order(write):
    """The order of a set of texts differs from process to process."""
    replaced = {
        "max_seq_len: 8": "max_seq_length=9",
        "lora_rank: 2": "lora_r=3",
        "recompute: true": "use_recompute=false",
        "random_shuffle: false": "dataloader_shuffle=true",
        "buffer_size: 7": "packing_interval=6",
        "chat_template: text": "template=vl",
        "lr_scheduler_type: cosine": "lr_scheduler=linear",
    }
    notes = load(write(BASE + "\n".join(replaced)), list(replaced.values())).notes
    said = [note.partition(":")[0] for note in notes if note.endswith("decides")]
    assert said == [line.partition(":")[0] for line in replaced]


def test_an_override_by_another_name_wins_over_the_file(write):
    path = write(BASE + "batch_size: 1\ncontinue_training: True\n")
    cfg = load(path, ["per_device_train_batch_size=4", "from_scratch=1"])
    assert (cfg.batch_size, cfg.continue_training) == (4, False)


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("learning_rate=1e-3", "learning_rate", 1e-3),
        ("packing=true", "packing", True),
        ("train_dataset_path=[a.jsonl,'b c.jsonl']", "train_dataset_path", ("a.jsonl", "b c.jsonl")),
        ("output_dir='a=b: c'", "output_dir", "a=b: c"),
        ("output_dir=2025", "output_dir", "2025"),
        ("train_dataset_path=*.jsonl", "train_dataset_path", ("*.jsonl",)),
        ("save_total_limit=null", "save_total_limit", None),
        ("logging_dir=", "logging_dir", None),
        ("--max_steps=12", "max_steps", 12),
    ],
)
def test_override_syntax(write, word, key, value):
    assert vars(load(write(BASE + "save_total_limit: 3\n"), [word]))[key] == value


def test_a_word_without_a_value_says_which_value_it_removes(write):
    """max_steps=$STEPS with an empty STEPS would otherwise train by the default in silence."""
    path = write(BASE + "save_total_limit: 3\n")
    notes = load(path, ["save_total_limit="]).notes
    why = "the command line gives save_total_limit no value, so that its default holds: None"
    assert [note for note in notes if "save_total_limit" in note] == [
        f"save_total_limit: 3 ({Path(path).name}:{len(BASE.splitlines()) + 1}): no effect: {why}"
    ]
    assert not [note for note in load(path, ["seed="]).notes if "seed" in note]  # the file has no other value


def test_a_switch_that_needs_a_value_says_that_it_has_none(write):
    text = message(write(BASE), ["--max_steps", "--packing"])
    assert text == "max_steps: expected an integer, got True (command line: a switch without a value)"


def test_options_alone_are_a_configuration():
    words = (
        "--model_name_or_path m --train_dataset_path a b --output_dir out --packing --max_steps 7 --learning_rate 1e-4"
    )
    cfg = load(None, words.split())
    assert (cfg.train_dataset_path, cfg.packing, cfg.max_steps, cfg.learning_rate) == (("a", "b"), True, 7, 1e-4)


def test_a_mapping_of_overrides(write):
    assert load(write(BASE), {"max_steps": 5, "training_args": {"seed": 9}}).seed == 9


def test_a_word_that_is_no_override(write):
    assert message(write(BASE), ["faster"]).startswith("'faster' is neither key=value nor --key value. Example: ")
    for words in (["max_steps", "=", "3"], ["max_steps=", "3"]):
        assert message(write(BASE), words).endswith("max_steps=100, without spaces around =")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("x.py", "seed = 1", "Config file only supports Yaml/Json/Arguments."),
        ("x.yaml", "", "x.yaml: the file is empty."),
        ("x.yaml", "# only a comment\n", "x.yaml: the file is empty."),
        ("x.yaml", "- a\n- b\n", "expected `key: value` lines, got a list"),
        ("x.yaml", "seed\n", "expected `key: value` lines, got plain text"),
        ("x.yaml", "seed: 1\npacking: [True\n", "x.yaml:3: not valid YAML"),
        ("x.yaml", "seed: 1\n\tpacking: True\n", "x.yaml:2: not valid YAML"),
        ("x.yaml", "env: &a {b: *a}\n", "x.yaml:1: an alias (*a) stands inside what it names"),
        ("x.yaml", "seed: \x01\n", "x.yaml:1: not valid YAML: the character #x0001"),
        ("x.json", "{'seed': 1}", "x.json: not JSON: Expecting property name enclosed in double quotes at column 2"),
        ("x.json", "[1]", "expected keys and values at the top, got a list"),
        ("x.json", "", "x.json: the file is empty."),
    ],
)
def test_a_file_that_is_no_configuration(write, name, text, expected):
    assert expected in message(write(text, name))


def test_a_file_that_is_not_there(write, tmp_path):
    assert "missing.yaml: there is no such file" in message("missing.yaml")
    (tmp_path / "d.yaml").mkdir()
    assert "d.yaml: a directory, not a file" in message("d.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"output_dir: caf\xe9\n")
    assert "latin.yaml: not UTF-8 text" in message("latin.yaml")
    assert message() == "Missing configuration files. Give a YAML or JSON file, or --key value."


def test_json_is_the_same_as_yaml(write):
    text = '{"model_name_or_path": "m", "train_dataset_path": "a.jsonl", "x_args": {"output_dir": "out", "seed": 3}}'
    assert load(write(text, "x.json")) == load(write(BASE + "seed: 3\n"))


def test_a_configuration_cannot_be_changed(write):
    cfg = load(write(BASE))
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.seed = 1  # type: ignore[misc]


def test_the_saved_yaml_is_the_same_configuration(write):
    text = """
batch_size: 2
stage: PT
learning_rate: 3.0e-4
lr_scheduler_type: wsd:10
early_stopping_patience: 3
evaluation_strategy: steps
eval_dataset_path: "a b.jsonl"
save_strategy: no
bf16: False
sharding: stage1
lora_rank: 32
amp_custom_white_list: [matmul, lookup_table]
fp8_mem_configs: {dequant_input: true, recompute_fwd_gate_up: [1, 2]}
env: {HOME: null}
"""
    cfg = load(write(BASE + text))
    again = load(write(cfg.to_yaml(), "config.yaml"))
    assert again == cfg and again.eval_steps == 500 and again.compute_type == "fp32"
    assert dict(again.extras)["amp_custom_white_list"] == ["matmul", "lookup_table"]
    assert isinstance(cfg, Config)


@settings(max_examples=25, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
    number=st.floats(0, 1e30),
)
def test_any_text_and_number_survives_saving(text, number, tmp_path_factory):
    cfg = load(None, {"metric_for_best_model": text.replace("${", "$${"), "moe_z_loss_lambda": number}, "version")
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    path.write_text(cfg.to_yaml(), encoding="utf-8", newline="")
    assert load(str(path), None, "version") == cfg


def test_every_key_stands_in_the_saved_yaml_with_its_documentation(write):
    text = load(write(BASE)).to_yaml()
    assert "# Length of a row in tokens.\nmax_seq_len: 4096\n" in text
    assert text.count("\n# ") >= 90


def test_loading_needs_no_paddle_and_no_numpy(write):
    path = str(Path(write(BASE)).resolve())
    heavy = "print([name for name in ('paddle', 'numpy', 'omegaconf') if name in sys.modules])"
    words = [sys.executable, "-c", f"import sys, erniekit.config as c; c.load({path!r}); {heavy}"]
    assert subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--max_steps 5 seed=3", (5, 3, False)),
        ("--max_steps 5 training_args.seed=3", (5, 3, False)),
        ("--packing max_steps=5 --seed 3", (5, 3, True)),
        ("max_steps=5 --packing seed=3", (5, 3, True)),
    ],
)
def test_an_option_ends_where_another_key_begins(words, expected):
    cfg = load(None, words.split(), "version")
    assert (cfg.max_steps, cfg.seed, cfg.packing) == expected


def test_an_option_may_have_a_value_with_an_equals_sign():
    assert load(None, ["--output_dir", "a=b"], "version").output_dir == "a=b"
    assert load(None, ["--train_dataset_path", "a=1.jsonl", "./b=2.jsonl"], "version").train_dataset_path == (
        "a=1.jsonl",
        "./b=2.jsonl",
    )
    assert "lr: unknown key" in message(None, ["--output_dir", "out", "lr=1"])


@pytest.mark.parametrize("word", ["a #1", "a: b", "&x", "!!int 5", "- a", "'a", "{a", "|", "%x", "@x"])
def test_a_value_on_the_command_line_is_text_unless_it_is_a_list_or_quoted(word):
    assert load(None, [f"output_dir={word}"], "version").output_dir == word


def test_another_name_on_the_command_line_that_replaces_a_key_of_the_file_is_named(write):
    cfg = load(write(BASE + "compute_type: fp32\n"), ["bf16=true"])
    assert cfg.compute_type == "bf16"
    assert "compute_type: fp32 (x.yaml:4): no effect: bf16: True (command line) decides" in cfg.notes
    assert not load(write(BASE + "compute_type: fp32\n"), ["compute_type=bf16"]).notes
    assert not load(write(BASE + "compute_type: bf16\n"), ["bf16=true"]).notes


def test_a_message_stays_readable(write):
    text = message(write("".join(f"unknown_{number}: 1\n" for number in range(3000))))
    assert text.startswith("x.yaml: 3000 problems:") and text.endswith("\n  and 2950 more")
    assert len(message(write(f"{'k' * 900}: 1\n"))) < 200
    assert len(message(write(f"x_args: {{seed: 1}}\nseed: '{'0' * 5000}'\n"))) < 400


LISTS = [
    ("no_recompute_layers", ["0, 2,5", "[0,2,5]", [0, 2, 5], ["0", 2, "5"]], (0, 2, 5)),
    ("train_dataset_type", ["alpaca, chatml,", "ALPACA,chatml", ["alpaca", "chatml"]], ("alpaca", "chatml")),
    ("train_dataset_prob", ["0.3, 7e-1", [0.3, "7e-1"], ["0.3", 0.7]], (0.3, 0.7)),
    ("eval_dataset_path", ["a, b c", ["a", "b c"], '"a",b c'], ("a", "b c")),
    ("split", ["8,2", "8/2", [8, 2], "[8, 2]", ["8", "2.0"]], (8.0, 2.0)),
    ("split", [100, "100", [100]], (100.0,)),
    ("input_dir", ["0.4 a '0.6' \"b c\"", "0.4,a,0.6,'b c'", [0.4, "a", "0.6", "b c"]], ("0.4", "a", "0.6", "b c")),
    ("lora_target_modules", ["q_proj, l.[1,2].x", ["q_proj", "l.[1,2].x"]], ("q_proj", "l.[1,2].x")),
    ("modules_to_save", ["norm,lm_head", ["norm", "lm_head"]], ("norm", "lm_head")),
    ("pp_seg_method", ["[0,29,57]", "0, 29,57", [0, 29, 57]], (0, 29, 57)),
    ("pp_seg_method", ["balanced"], "balanced"),
]


@pytest.mark.parametrize(("key", "given", "expected"), [(k, g, e) for k, every, e in LISTS for g in every])
def test_a_list_is_read_once(write, key, given, expected):
    more = {"train_dataset_path": ["a", "b"]} if key.startswith("train_") else {}
    cfg = load(write(BASE), {key: given, "recompute": True} | more)
    assert vars(cfg)[key] == expected
    assert load(write(cfg.to_yaml(), "again.yaml")) == cfg


@pytest.mark.parametrize(("key", "given"), [(key, every[0]) for key, every, _ in LISTS])
def test_yaml_and_the_command_line_read_a_list_alike(write, key, given):
    more = ["train_dataset_path=a,b"] if key.startswith("train_") else []
    from_words = vars(load(write(BASE), [f"{key}={given}", *more]))[key]
    assert vars(load(write(BASE + f"{key}: {json.dumps(given)}\n"), more))[key] == from_words


@settings(max_examples=25)  # each reads a configuration twice
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0$~:"), min_size=1), max_size=4))
def test_any_texts_of_a_list_survive_saving(items):
    cfg = load(None, {"modules_to_save": items}, "version")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.yaml"
        path.write_text(cfg.to_yaml(), encoding="utf-8")
        assert load(str(path), None, "version").modules_to_save == cfg.modules_to_save


def test_a_list_that_is_not_given_is_empty_after_saving(write):
    again = load(write(load(write(BASE)).to_yaml()))
    assert (again.no_recompute_layers, again.eval_dataset_path, again.split) == ((), (), (998.0, 1.0, 1.0))


def test_the_annotation_of_a_list_says_what_its_items_are():
    for name, field in schema.fields().items():
        if "item" in field.metadata:
            item = field.metadata["item"]
            kind = tuple[item, ...]
            assert field.type == (str | kind if field.metadata["or_word"] else kind), name
        else:
            assert "tuple" not in str(field.type), name


@pytest.mark.parametrize(
    ("name", "saved", "value"),
    [
        ("train_dataset_path", "a.jsonl,b.jsonl", ("a.jsonl", "b.jsonl")),  # as earlier versions wrote it
        ("train_dataset_path", ["a.jsonl"], ("a.jsonl",)),
        ("train_dataset_prob", None, ()),
        ("split", "998,1,1", (998.0, 1.0, 1.0)),
        ("max_seq_len", 64, 64),
    ],
)
def test_a_value_that_a_run_saved_becomes_the_type_of_its_key(name, saved, value):
    assert from_saved(schema.fields()[name], saved) == value


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("no_recompute_layers", "0,one", r"no_recompute_layers: expected an integer, got 'one' \(.*:5\)"),
        ("no_recompute_layers", "[0, -1]", r"no_recompute_layers: must be at least 0, got -1 \(.*:5\)"),
        ("no_recompute_layers", "{a: 1}", r"no_recompute_layers: expected a flat list"),
        ("train_dataset_prob", "0.5,much", r"train_dataset_prob: expected a number, got 'much' \(.*:5\)"),
        ("train_dataset_prob", "1,0", r"train_dataset_prob: must be more than 0, got 0.0 \(.*:5\)"),
        (
            "train_dataset_type",
            "ernikit",
            r"train_dataset_type: expected one of erniekit, .*, got 'ernikit'; did you mean erniekit\? \(.*:5\)",
        ),
        ("split", "a,b", r"split: expected a number, got 'a' \(.*:5\)"),
        ("split", "1,-1", r"split: must be at least 0, got -1.0 \(.*:5\)"),
        ("split", "1,nan", r"split: expected a number, got 'nan' \(.*:5\)"),
        ("input_dir", "'1 \"a 1 b'", r"input_dir: no closing quotation: .*. Close the quotes \(.*:5\)"),
        ("pp_seg_method", "[0,x,4]", r"pp_seg_method: expected an integer, got 'x' \(.*:5\)"),
        ("pp_seg_method", "'[0,1'", r"pp_seg_method: expected an integer, got '\[0' \(.*:5\)"),
        ("pp_seg_method", "[0, 1.5, 4]", r"pp_seg_method: expected an integer, got 1.5 \(.*:5\)"),
        ("pp_seg_method", "quick", r"pp_seg_method: expected layer:DecoderLayer .*; got 'quick' \(.*:5\)"),
        ("lora_target_modules", "'q_proj,(k'", r"lora_target_modules: '\(k' is not a valid regular expression.*:5\)"),
    ],
)
def test_a_wrong_item_of_a_list_is_refused_with_its_place(write, key, value, expected):
    text = "model_name_or_path: m\ntrain_dataset_path: a\noutput_dir: o\nfine_tuning: LoRA\n"
    with pytest.raises(ConfigError, match=expected):
        load(write(f"{text}{key}: {value}\n"))
