"""The README's Python runs as written, its commands exist, and its links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from autoplace.cli.app import VERBS

README = Path(__file__).parent.parent / "README.md"


def _blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = _blocks("python")
    names: dict[str, object] = {}
    exec(compile(example, str(README), "exec"), names)
    assert names["outputs"].shape == (64, 10)
    assert (tmp_path / "visualizations" / "report.html").stat().st_size > 1000


def test_every_command_names_a_verb():
    verbs = [v for block in _blocks("bash") for v in re.findall(r"bin/autoplace (\w+)", block)]
    assert verbs and set(verbs) <= set(VERBS)


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8"))
    if not (README.parent / "docs").exists():
        pytest.skip("needs the repository's docs folder")
    assert links and all((README.parent / link).exists() for link in links)


def test_every_speed_up_in_the_table_is_a_kept_result():
    results = README.parent / "docs" / "results" / "local.json"
    if not results.exists():
        pytest.skip("needs the repository's results")
    data = json.loads(results.read_text(encoding="utf-8"))
    rows = {
        (row["model"], row["mode"], row["precision"], row["batch"]): f"{row['over']['eager']['ratio']:.2f}"
        for row in data["rows"]
    }
    text = README.read_text(encoding="utf-8")
    shown = re.findall(r"^\| (\w+) \| (inference|training) \| (float32|auto) \|(.*)\|$", text, re.MULTILINE)
    found = {
        (model, mode, precision, batch): ratio
        for model, mode, precision, cells in shown
        for batch, cell in zip((2, 16), cells.split("|"), strict=True)
        for ratio in re.findall(r"^ (\d\.\d\d) \(", cell)
    }
    assert found and found == {key: rows[key] for key in found}
    assert set(rows) == set(found), "no case is left out"
    for name, mean in data["geometric_means"].items():
        if name.endswith("over eager"):
            assert f"{mean['ratio']:.3f}" in text, name
    assert data["provenance"]["commit"] in text


def test_every_ratio_of_the_planner_is_a_kept_result():
    results = README.parent / "docs" / "results" / "placement.json"
    if not results.exists():
        pytest.skip("needs the repository's results")
    text = results.read_text(encoding="utf-8")
    tables = json.loads(text)["tables"]
    rows = [*tables["zero_shot"], *tables["evaluations"], *tables["seconds"], *tables["dp"], *tables["exact"]["rows"]]
    kept = {
        (f"{row['geometric_mean']:.3f}", *(f"{end:.3f}" for end in row["interval"]))
        for row in rows
        if row["kind"] == "all"
    }
    shown = re.findall(r"\| (\d\.\d{3}) \((\d\.\d{3})–(\d\.\d{3})\) \|", README.read_text(encoding="utf-8"))
    assert len(shown) >= 8 and set(shown) <= kept
