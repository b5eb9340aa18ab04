"""${...} is resolved, or refused with its key and place."""

import itertools
from pathlib import Path

import pytest

from erniekit.config import environment_variables, load
from erniekit.utils.errors import ConfigError


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNROOT", "/runs")
    monkeypatch.setenv("STEPS", "12")
    monkeypatch.delenv("ABSENT", raising=False)


def output_dir(value: str, **others: object) -> str | None:
    return load(None, {"output_dir": value, **others}, "version").output_dir


def message(value: object, key: str = "output_dir", **others: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(None, {key: value, **others}, "version")
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("${oc.env:RUNROOT}/x", "/runs/x"),
        ("${env:RUNROOT}/x", "/runs/x"),
        ("${RUNROOT}/x", "/runs/x"),
        ("${oc.env:RUNROOT,other}", "/runs"),
        ("${oc.env:ABSENT,other}/x", "other/x"),
        ("${oc.env:ABSENT,a,b}", "a,b"),
        ("${oc.env:ABSENT,}x", "x"),
        ("${oc.env:ABSENT,${RUNROOT}}/x", "/runs/x"),
        ("a${RUNROOT}b${STEPS}", "a/runsb12"),
        ("${seed}/x", "7/x"),
        ("${training_args.seed}", "7"),
        ("${logging_dir}/x", "/runs/logs/x"),
        ("$${RUNROOT}", "${RUNROOT}"),
        ("a$${b}${seed}", "a${b}7"),
    ],
)
def test_what_a_reference_stands_for(value: str, expected: str):
    assert output_dir(value, seed=7, logging_dir="${RUNROOT}/logs") == expected


def test_a_reference_can_be_a_number_or_a_list():
    cfg = load(None, {"max_steps": "${oc.env:STEPS}", "save_steps": "${max_steps}"}, "version")
    assert (cfg.max_steps, cfg.save_steps) == (12, 12)
    given = {"train_dataset_path": ["a", "${RUNROOT}/b"], "eval_dataset_path": "${train_dataset_path}"}
    assert load(None, given, "version").eval_dataset_path == ("a", "/runs/b")


def test_a_reference_keeps_the_text_of_a_number_and_sees_overrides(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text("logging_dir: 2024_06_01\noutput_dir: out/${logging_dir}/${seed}\nseed: 1\n")
    assert load(str(path), None, "version").output_dir == "out/2024_06_01/1"
    assert load(str(path), ["seed=5"], "version").output_dir == "out/2024_06_01/5"
    assert load(str(path), ["output_dir=${seed}x"], "version").output_dir == "1x"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("${oc.env:ABSENT}/x", "no key that is given and no environment variable is called ABSENT"),
        ("${ABSENT}", "no key that is given and no environment variable is called ABSENT"),
        ("${now:%Y}", "unknown resolver now"),
        ("${oc.env:}", "is not a valid name of an environment variable"),
        ("${}", "neither a key nor"),
        ("${a b}", "neither a key nor"),
        ("${RUNROOT", "the closing } is missing"),
        ("${oc.env:ABSENT,${RUNROOT}", "the closing } is missing"),
        ("${output_dir}/x", "refers to itself"),
        ("${logging_dir}", "refers to itself"),
        ("\\${RUNROOT}", "write $${"),
        ("x${train_dataset_path}", "not a text or number"),
    ],
)
def test_what_is_refused(value: str, expected: str):
    text = message(value, logging_dir="${output_dir}", train_dataset_path=["a", "b"])
    assert expected in text and ("output_dir" in text or "logging_dir" in text)


def test_the_place_is_named(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text("seed: 1\nmodel_args:\n  output_dir: ${oc.env:ABSENT}\n")
    with pytest.raises(ConfigError, match=r"^output_dir: \$\{oc\.env:ABSENT\}: .*x\.yaml:3"):
        load(str(path), None, "version")


def test_references_that_double_are_bounded():
    keys = ["output_dir", "logging_dir", "eval_output", "checkpoint", "lora_path", "input_dir", "chat_template"]
    given: dict[str, object] = {name: f"${{{after}}}" * 30 for name, after in itertools.pairwise(keys)}
    with pytest.raises(ConfigError, match="characters once it is replaced"):
        load(None, given | {keys[-1]: "x" * 10}, "version")
    assert "references inside one another" in message("${" * 1000 + "}" * 1000)


def test_values_without_effect_are_resolved_too():
    assert dict(load(None, {"metrics_output_path": "${RUNROOT}"}, "version").extras) == {"metrics_output_path": "/runs"}


def test_environment_variables_are_found_however_they_are_written(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text(
        'output_dir: "${\\x6fc.env:RUNROOT}/${STEPS}"\nlogging_dir: ${oc.env:ABSENT,${env:LAST}}\nseed: ${max_steps}\n'
        "max_steps: 3  # ${COMMENT}\nrun_name: $${LITERAL}\neval_dataset_path: [a, '${LISTED}']\n"
        "project: ${${INNER}}\n"
    )
    assert sorted(environment_variables(str(path))) == ["ABSENT", "INNER", "LAST", "LISTED", "RUNROOT", "STEPS"]
