"""The hardware table: every number has a source, and a user's file extends it."""

from pathlib import Path

import pytest

from erniekit.plan.hardware import PRECISIONS, hardware_names, load_hardware, numbers_with_sources
from erniekit.utils import log
from erniekit.utils.errors import ConfigError

EXPECTED = (
    "A100",
    "A800",
    "H100",
    "H800",
    "H200",
    "H20",
    "B200",
    "L20",
    "L40S",
    "RTX4090",
    "RTX6000Ada",
    "V100",
    "CPU",
)


def test_every_number_has_a_source_that_is_described():
    numbers = list(numbers_with_sources())
    assert len(numbers) > 200
    assert all(source for _, _, source in numbers)


@pytest.mark.parametrize("name", hardware_names())
def test_every_card_is_complete_and_plausible(name: str):
    card = load_hardware(name)
    assert card.half_peak > 0 and card.memory_bandwidth > 0
    assert 0 < card.efficiency.of_size(512) < card.efficiency.of_size(8192) <= 1
    for precision in PRECISIONS[1:]:
        if card.fp8:
            assert card.peak(precision) > card.peak("bf16")
            assert card.efficiency.product[precision] > 0
        else:
            with pytest.raises(ConfigError, match="no FP8 units"):
                card.peak(precision)


def test_the_cards_that_people_rent_are_there_and_uncertain_ones_are_marked():
    assert set(EXPECTED) <= set(hardware_names())
    assert load_hardware("Ascend 910B").contested and load_hardware("kunlun p800").contested
    assert not load_hardware("H800").contested


@pytest.mark.parametrize("spelling", ["rtx 4090", "RTX-4090", "GeForce RTX 4090", "rtx4090"])
def test_a_card_has_several_spellings(spelling: str):
    assert load_hardware(spelling).name == "RTX4090"


def test_an_unknown_card_suggests_the_nearest_names():
    with pytest.raises(ConfigError, match=r"'H1000' is not in the hardware table. Nearest names: H100.*hardware=FILE"):
        load_hardware("H1000")


def test_efficiency_grows_smoothly_with_the_smallest_dimension():
    efficiency = load_hardware("H100").efficiency
    sizes = [efficiency.of_size(size) for size in (8, 64, 100, 128, 512, 700, 4096, 5000, 100_000)]
    assert sizes == sorted(sizes)
    assert efficiency.of_size(512) == pytest.approx(0.67)
    assert efficiency.of_size(1e9) == 1.0


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cards.yaml"
    path.write_text(text, "utf-8")
    return path


def test_a_users_file_adds_a_card_and_changes_a_number(tmp_path: Path):
    path = write(
        tmp_path,
        "cards:\n  H100: {network_gb_s: 12.5}\n  MyCard: {like: H100, bf16: 500, memory_bytes: 60e9}\n"
        "efficiencies:\n  hopper: {product: {bf16: 0.5}}\n",
    )
    known, mine, changed = load_hardware("H100"), load_hardware("mycard", path), load_hardware("H100", path)
    assert (mine.bf16, mine.memory_bytes, mine.fp8) == (500, 60e9, known.fp8)
    assert (changed.network_gb_s, changed.bf16) == (12.5, known.bf16)
    assert changed.efficiency.product["bf16"] == 0.5
    assert changed.efficiency.product["fp8"] == known.efficiency.product["fp8"]
    assert load_hardware("H100") == known


def test_a_number_without_effect_is_named(tmp_path: Path):
    with log.captured() as lines:
        load_hardware("X", write(tmp_path, "cards:\n  X: {like: H100, fast_ranks: 72}\n"))
    assert lines == [(True, "hardware: X: fast_ranks: no effect: gpus_per_node says how many cards have fast links")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cards:\n  X: {like: H100, bf16: -5}\n", "cards.yaml:2: X: bf16: must be a positive number, got -5"),
        ("cards:\n  X: {like: H100, memory_bytes: 0}\n", "memory_bytes: must be a positive number"),
        ("cards:\n  X: {bf16: 5}\n", "X: fp16: a number is missing"),
        ("cards:\n  X: {like: Y}\n", "like: 'Y' names no other entry"),
        ("cards:\n  X: {like: H100, speed: 5}\n", "unknown key 'speed'"),
        ("cards:\n  X: {like: H100, bf16: [1, 2, 3]}\n", "expected a number or"),
        ("cards:\n  X: {like: H100, memory_bytes: 80GB}\n", "X: memory_bytes: expected a number, got '80GB'"),
        ("cards: 5\n", "expected `key: value` lines, got 5"),
        ("gpus:\n  X: {}\n", "unknown key 'gpus'"),
        ("cards:\n  X: {like: H100, efficiency: fast}\n", "efficiency: 'fast' is not one of"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError) as refused:
        load_hardware("X", write(tmp_path, text))
    assert message in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none.yaml: not found"):
        load_hardware("H100", tmp_path / "none.yaml")
