import time

import mogul.core.log as talk
from mogul.core.log import progress, say


def test_short_work_stays_silent(capsys):
    with progress("reading", total=3) as bar:
        for _ in range(3):
            bar.advance()
    assert capsys.readouterr() == ("", "")


def test_long_work_speaks_on_standard_error_only(capsys, monkeypatch):
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr(talk.time, "monotonic", lambda: next(clock))
    with progress("reading", total=4) as bar:
        bar.advance(1, note="loss 2.0")
        bar.advance(3)
    out, err = capsys.readouterr()
    assert out == ""
    assert "reading:  25 %" in err
    assert "loss 2.0" in err
    assert err.count("100 %") == 1


def test_a_long_step_is_told_while_it_runs(capsys, monkeypatch):
    monkeypatch.setattr(talk, "SILENT_S", 0.05)
    monkeypatch.setattr(talk, "PLAIN_EVERY_S", 0.05)
    err, end = "", time.monotonic() + 3
    with progress("measuring", total=2) as bar:
        for note in ("first call of one", "first call of another"):
            bar.update(bar.done, note)
            while note + "\n" not in err and time.monotonic() < end:
                time.sleep(0.01)
                err += capsys.readouterr().err
    assert "measuring:   0 %" in err
    assert err.count("first call of one") == err.count("first call of another") == 1


def test_say_goes_to_standard_error(capsys):
    say("using the slower backend")
    assert capsys.readouterr() == ("", "using the slower backend\n")
