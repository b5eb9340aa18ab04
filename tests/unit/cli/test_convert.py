"""The arguments of `erniekit convert`, which reads no configuration file."""

import pytest

from erniekit.cli import convert
from erniekit.utils.errors import ConfigError


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["a", "b", "format=pt"], ("a", "b", "pt", 5.0, False)),
        (["--format", "paddle", "a", "--max_shard_size=0.5", "b"], ("a", "b", "paddle", 0.5, False)),
        (["a", "b", "format=pt", "max_shard_size=500MB"], ("a", "b", "pt", 0.5, False)),
        (["a", "b", "format=pt", "overwrite=true"], ("a", "b", "pt", 5.0, True)),
    ],
)
def test_arguments(args: list[str], expected: tuple[str, str, str, float]):
    assert convert.parse(args) == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "expected a source and a target directory, got 0"),
        (["a", "format=pt"], "expected a source and a target directory, got 1"),
        (["a", "", "format=pt"], "a path is empty; perhaps a variable in it is not set"),
        (["a", "b"], "format: needed; pt or paddle"),
        (["a", "b", "format=gguf"], "format=gguf: expected one of pt, paddle"),
        (["a", "b", "fromat=pt"], "fromat=pt: the options of `erniekit convert` are format, max_shard_size, overwrite"),
        (["a", "b", "--format"], "format: a value is missing"),
        (["a", "b", "format=pt", "overwrite=perhaps"], "overwrite=perhaps: expected True or False"),
        (["a", "b", "format=pt", "max_shard_size=-1"], "max_shard_size=-1: expected a number of GB"),
        (["a", "b", "format=pt", "max_shard_size=5XB"], "expected a number of GB or a size such as 5GB, 500MB or 2GiB"),
        (["a", "b", "format=pt", "max_shard_size=big"], "max_shard_size=big: expected a number"),
        (["a", "b", "format=pt", "max_shard_size=inf"], "max_shard_size=inf: expected a number"),
        (["a", "b", "format=pt", "max_shard_size=nan"], "max_shard_size=nan: expected a number"),
    ],
)
def test_what_is_wrong_is_named_with_the_usage(args: list[str], message: str):
    with pytest.raises(ConfigError) as raised:
        convert.parse(args)
    assert message in str(raised.value)
    assert "usage: erniekit convert SOURCE TARGET" in str(raised.value)
