"""Progress off a terminal: whole lines, seldom."""

from types import SimpleNamespace

import pytest

from lib.engine import progress, settings
from lib.engine.progress import progress_bar


def test_a_file_gets_a_line_every_half_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress_bar(2000, " draws", initial=1000) as bar:
        bar.set_postfix(loss="0.5", refresh=False)
        for _ in range(10):
            now[0] += 10
            bar.update(100)
    assert capsys.readouterr().err.splitlines() == [
        "1,300 of 2,000 draws after 00:30, about 01:10 left, loss 0.5",
        "1,600 of 2,000 draws after 01:00, about 00:40 left, loss 0.5",
        "1,900 of 2,000 draws after 01:30, about 00:10 left, loss 0.5",
    ]


def test_nothing_is_said_of_work_that_is_not_to_be_shown(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0)
    for shown, lines in ((None, 1), (True, 1), (False, 0)):
        with progress_bar(10, " draws", shown) as bar:
            bar.update(5)
        assert capsys.readouterr().err.count("5 of 10 draws") == lines


@pytest.mark.parametrize("compiled", [True, False])
def test_a_run_that_compiles_says_so(monkeypatch, caplog, compiled):
    """For minutes nothing else is said; the next run of a network made ready has nothing to say."""
    engine = {"device": "cpu", "dtype": "int8", "block": 4, "layout": "", "compiled": compiled}
    base = SimpleNamespace(settings=engine)
    monkeypatch.setattr(settings, "_ready", lambda job, engine: base)
    caplog.set_level("INFO", "lib")
    known = {"model_sha256": "a"}
    job = SimpleNamespace(out="x", engine={}, settings=known, readouts=None, ready={})
    for _ in range(2):
        assert settings.open_base(job, engine) is base
    assert caplog.text.count("compiling the network, once") == compiled
