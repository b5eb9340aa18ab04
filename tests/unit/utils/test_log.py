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
