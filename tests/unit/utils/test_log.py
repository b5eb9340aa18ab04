"""Log lines that a program keeps in place of stderr."""

from erniekit.utils import log


def test_a_capture_inside_another_keeps_its_own_lines(capsys):
    with log.captured() as outer:
        log.info("one")
        with log.captured() as inner:
            log.warning("two")
        log.info("three")
    log.info("four")
    assert outer == [(False, "one"), (False, "three")] and inner == [(True, "two")]
    assert capsys.readouterr().err == "[erniekit] four\n"


def test_a_warning_is_logged_once_also_if_a_capture_collects_it_in_between(capsys):
    log.once("the disk is slow")
    with log.captured() as lines:
        log.once("the disk is slow")
        log.once("the disk is small")
        log.once("the disk is small")
    log.once("the disk is slow")
    log.once("the disk is small")
    assert lines == [(True, "the disk is slow"), (True, "the disk is small")]
    said = capsys.readouterr().err
    assert said.count("slow") == said.count("small") == 1
