"""The report is one file that stands alone, says what was found, and runs nothing that a name might hold."""

import base64
import dataclasses
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from autoplace.errors import InputError
from autoplace.report import write_report

EVIL = "<script>alert('x')</script>\"&"
VOID = {"meta", "img"}


class Balanced(HTMLParser):
    """Collects the text and the tags, and checks that every tag is closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def page(result, tmp_path):
    path = write_report(result, tmp_path / "deep" / "folder")
    assert path.name == "report.html"
    parsed = Balanced(path.read_text(encoding="utf-8"))
    assert parsed.open == []
    return parsed


def test_it_says_what_was_found(page):
    text = " ".join(page.text)
    for words in (
        "BertModel, inference", "1.42 times as fast", "1.35 to 1.49", "the whole graph, by torch.export",
        "412 ops in 14 groups", "26 measured, 2 estimated", "Energy comes from a model", "21.4 → 15.1",
        "same output, loss and 101 gradients", "out of memory on host0/cpu:1", "2.13.0", "typical figures", "±3.0%",
    ):  # fmt: skip
        assert words in text


def test_it_needs_nothing_beside_it(page):
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")


def test_the_pictures_are_whole(page, tmp_path):
    sources = [a["src"] for t, a in page.tags if t == "img"]
    assert len(sources) == 4
    for source in sources:
        root = ET.fromstring(base64.b64decode(source.partition("base64,")[2]))
        assert root.tag.endswith("svg")
    pngs = sorted((tmp_path / "deep" / "folder").glob("*.png"))
    assert [p.stem for p in pngs] == ["energy", "latency", "predicted_vs_measured", "timeline"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pngs)


def test_names_and_reasons_are_escaped(result, tmp_path):
    candidates = tuple(
        dataclasses.replace(c, label=c.label + EVIL, verdict=EVIL, check=EVIL) for c in result.candidates
    )
    odd = dataclasses.replace(
        result, model_name=EVIL, capture_reason=EVIL, notes=(EVIL,), environment={EVIL: EVIL}, candidates=candidates
    )
    page = write_report(odd, tmp_path).read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 10
    assert Balanced(page).open == []


def test_plain_kept_is_said_plainly(result, tmp_path):
    first, second, *rest = result.candidates
    changed = (dataclasses.replace(first, kept=True), dataclasses.replace(second, kept=False), *rest)
    text = write_report(dataclasses.replace(result, candidates=changed), tmp_path).read_text(encoding="utf-8")
    assert "Plain PyTorch was kept" in text
    assert "times as fast" not in text


def test_energies_of_different_sources_are_not_put_side_by_side(result, tmp_path):
    first, *rest = result.candidates
    nvml = dataclasses.replace(first, measured=dataclasses.replace(first.measured, energy_source="nvml"))
    text = write_report(dataclasses.replace(result, candidates=(nvml, *rest)), tmp_path).read_text(encoding="utf-8")
    assert "1.93 → 1.36" not in text
    assert re.search(r"1\.36</strong><small>J \(model\), chosen plan", text)


def test_a_result_without_measurements_still_gives_a_report(result, tmp_path):
    plain = dataclasses.replace(result.candidates[0], measured=None, kept=True)
    bare = dataclasses.replace(result, candidates=(plain,), notes=(), environment={}, cost_labels={}, seconds={})
    assert Balanced(write_report(bare, tmp_path).read_text(encoding="utf-8")).open == []
    assert list(tmp_path.glob("*.png")) == []


def test_the_same_result_gives_the_same_file(result, tmp_path):
    first = write_report(result, tmp_path / "a").read_bytes()
    assert write_report(result, tmp_path / "b").read_bytes() == first


def test_an_unwritable_folder_is_one_sentence(result, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another folder"):
        write_report(result, tmp_path / "file" / "report")
