import os

import pytest

from autoplace.runtime.distributed.reports import Texts, parse, report, report_text


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(os, "write", lambda descriptor, data: lines.append((descriptor, data.decode())))
    return lines


def test_a_report_comes_back(told):
    report("error", sentence="zwölf \x1e\n", rank=3)
    ((descriptor, line),) = told
    assert descriptor == 2 and line.endswith("\n") and line.count("\n") == 1
    assert parse(line) == ("", {"kind": "error", "sentence": "zwölf \x1e\n", "rank": 3})


def test_what_stands_before_a_report_is_shown(told):
    report("started")
    assert parse("half a line" + told[0][1]) == ("half a line", {"kind": "started"})


@pytest.mark.parametrize("line", ["plain", "", "\x1eautoplace no json", "\x1eautoplace 7", '\x1eautoplace {"a": 1}'])
def test_any_other_line_is_shown_as_it_is(line):
    assert parse(line) == (line, None)


@pytest.mark.parametrize("text", ["", "short", "ü" * 5000])
def test_a_long_text_comes_in_lines_that_a_pipe_keeps_whole(told, text):
    report_text("cluster", text)
    assert all(len(line.encode()) < 4096 for _, line in told)
    parts, found = Texts(), []
    for _, line in told:
        found.append(parts.add("cluster", parse(line)[1]))
    assert found[-1] == text and found[:-1] == [None] * (len(found) - 1)
