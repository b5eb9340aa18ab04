"""Signals that stop a run: noted while steps are made, raised at other times, not taken from whoever has them."""

import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import os, signal, time
from erniekit.utils import stop_signals
def send(name): os.kill(os.getpid(), signal.Signals[name])
"""


def run(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
@pytest.mark.parametrize("paddle", ["", "import paddle; stop_signals.listen(); "])
def test_a_signal_is_noted_while_it_is_deferred(name: str, paddle: str):
    done = run(
        f"stop_signals.listen(); {paddle}\n"
        f"with stop_signals.deferred(): send('{name}'); print(stop_signals.requested().name)"
    )
    assert (done.returncode, done.stdout) == (0, f"{name}\n"), done.stderr
    again = "Ctrl-C: this step is finished and saved first; Ctrl-C again ends at once"
    said = again if name == "SIGINT" else f"{name}: this step is finished and saved first; SIGINT ends at once"
    assert f"[erniekit] {said}\n" in done.stderr


def test_a_module_that_is_being_imported_does_not_end_a_step(tmp_path: Path):
    """Some modules are first needed in the first step."""
    (tmp_path / "slow.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nprint('imported')\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); stop_signals.listen()\n"
    done = run(f"{code}with stop_signals.deferred():\n    import slow\n    print(stop_signals.requested().name)")
    assert (done.returncode, done.stdout) == (0, "imported\nSIGTERM\n"), done.stderr
    done = run(f"{code}import slow")
    assert (done.returncode, done.stdout) == (143, ""), done.stderr


def test_a_second_sigterm_says_what_it_waits_for():
    """Schedulers repeat it before they kill a job: ending at once would lose what a few more seconds can save."""
    code = "stop_signals.listen()\nwith stop_signals.deferred():\n"
    done = run(f"{code}    send('SIGTERM'); time.sleep(0.4); send('SIGTERM'); print('goes on')")
    assert (done.returncode, done.stdout) == (0, "goes on\n")
    assert "SIGTERM again: the step that was under way 0 s ago is finished and saved first" in done.stderr
    done = run(f"{code}    send('SIGTERM'); time.sleep(0.4); send('SIGINT'); time.sleep(9)")
    assert done.returncode == 130 and done.stderr.endswith("\ninterrupted\n")


def test_at_other_times_it_is_raised_and_known_whatever_native_code_makes_of_it():
    code = "stop_signals.listen()\ntry:\n    send('SIGTERM'); time.sleep(9)\n"
    code += "except stop_signals.Stopped as e: print(e.number)\n"
    done = run(f"{code}\nprint(stop_signals.raised().number)")
    assert (done.returncode, done.stdout) == (0, "15\n15\n"), done.stderr


def test_a_second_ctrl_c_ends_at_once_and_says_what_is_left():
    code = """
stop_signals.listen(lambda: 'all is saved')
with stop_signals.deferred():
    send('SIGINT'); time.sleep(0.4); send('SIGINT'); time.sleep(9)"""
    done = run(code)
    assert done.returncode == 130
    assert done.stderr.endswith("\ninterrupted; all is saved\n") and "Traceback" not in done.stderr


def test_a_signal_that_comes_twice_at_once_is_one():
    """`timeout -s INT` sends it to the process and to its group."""
    done = run(
        "stop_signals.listen()\nwith stop_signals.deferred():\n    send('SIGINT'); send('SIGINT'); print('goes on')"
    )
    assert (done.returncode, done.stdout) == (0, "goes on\n"), done.stderr


def test_what_is_ignored_or_somebody_elses_stays_so():
    code = "signal.signal(signal.SIGHUP, signal.SIG_IGN); signal.signal(signal.SIGTERM, lambda *_: print('theirs'))"
    done = run(f"{code}; stop_signals.listen(); send('SIGHUP'); send('SIGTERM'); print(stop_signals.requested())")
    assert (done.returncode, done.stdout) == (0, "theirs\nNone\n"), done.stderr
