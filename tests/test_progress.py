"""A status line for people at a terminal: it says what goes on, and leaves nothing behind."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from autoplace import progress as progress_module
from autoplace.hands_off import hands_off
from autoplace.progress import StatusLine, progress_bars, terminal_progress


class Terminal(io.StringIO):
    """Keeps what a terminal would show: a carriage return goes back to the start of the line."""

    def isatty(self):
        return not super().isatty()  # raises once closed

    @property
    def shown(self):
        line: list[str] = []
        column = 0
        for char in self.getvalue():
            if char == "\r":
                column = 0
            else:
                line[column : column + 1] = [char]
                column += 1
        return "".join(line).rstrip()


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()


def test_the_line_follows_the_phases_and_is_gone_at_the_end(terminal, monkeypatch):
    monkeypatch.setattr(progress_module, "_REDRAW_S", 0.0)
    line = terminal_progress(terminal)
    assert line is not None
    line("discover devices", 0, 1)
    assert terminal.shown == "autoplace tunes this model: discover devices (0 s)"
    line("discover devices", 1, 1)
    assert terminal.shown == ""
    line("measure", 0, 1)
    line("measure", 3, 40)
    assert terminal.shown == "autoplace tunes this model: measure 3/40 (0 s)"
    line("measure", 40, 40)
    line("measure", 1, 1)
    assert terminal.shown == "" and "\n" not in terminal.getvalue()


def test_steps_in_quick_succession_are_not_drawn_and_new_phases_are(terminal, monkeypatch):
    monkeypatch.setattr(progress_module, "_REDRAW_S", 1000.0)
    line = StatusLine(terminal)
    line("measure", 1, 40)
    line("measure", 2, 40)
    assert "1/40" in terminal.shown
    line("other", 2, 40)
    assert "other 2/40" in terminal.shown


def test_a_line_that_is_dropped_erases_itself_and_a_long_one_is_cut(terminal, monkeypatch):
    line = StatusLine(terminal)
    line("a phase with a very long name " * 5, 1, 10)
    assert len(terminal.shown) == 79
    del line
    assert terminal.shown == ""


def test_a_terminal_that_has_gone_is_no_error(terminal):
    line = StatusLine(terminal)
    line("measure", 1, 10)
    terminal.close()
    line("measure", 1, 1)
    assert terminal_progress(terminal) is None


def test_where_nobody_looks_there_is_no_line(terminal, monkeypatch, capsys):
    assert terminal_progress(io.StringIO()) is None
    assert terminal_progress() is None, "pytest's standard error is no terminal"
    with hands_off():
        assert terminal_progress(terminal) is None
    monkeypatch.setenv("TERM", "dumb")
    assert terminal_progress(terminal) is None


def test_bars_count_the_steps_of_each_phase():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress_bars(console) as update:
        for phase, total in (("capture", 1), ("measure", 12)):
            update(phase, 0, 1)
            if total > 1:
                update(phase, total, total)
            update(phase, 1, 1)
    shown = console.file.getvalue()
    assert "capture" in shown and "1/1" in shown and "12/12" in shown
