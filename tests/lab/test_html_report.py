"""The report of many runs: its numbers, that it stands alone, and what it makes of odd results."""

import base64
import copy
import re
import resource
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from test_figures import Described, runs_of, write_digits

from mnist_ops.lab import html_report, reports


class Page(HTMLParser):
    """Tags that are open, attributes, ids, text outside of style, tables as rows of cells."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.ids, self.words, self.rows = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.words.append(text)
        if self.open and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] += text


def described():
    rows = {
        "original": ("original", reports.TABLE_3_1),
        "relu": ("activation", dict(reports.TABLES["3.3"]["relu"])),
        "rotation-0.2": ("rotation", {}),
        "normalization-15": ("normalization", {}),
        "asgd": ("optimizers", {}),
    }
    made = {name: Described(name, reported) for name, (_, reported) in rows.items()}
    for name, (group, _) in rows.items():
        made[name].group, made[name].title = group, f"the title of {name}"
    made["rotation-0.2"].section = "report 2, section 2.0.4"
    return made


def results():
    """Two seeds: the original, ReLU and a rotation, with filters, confusion and mistakes."""
    runs = runs_of("original", [[(96.71, 99.04), (99.0, 99.4), (99.3, 99.5)],
                                [(96.75, 99.00), (99.1, 99.3), (99.4, 99.4)]])  # fmt: skip
    runs += runs_of("relu", [[(96.50, 98.73), (98.8, 99.0)], [(96.52, 98.72), (98.8, 99.1)]])
    runs += runs_of("rotation-0.2", [[(95.4, 98.8)]])
    counts = [[0] * 10 for _ in range(10)]
    for i in range(10):
        counts[i][i] = 999
        counts[i][(i + 1) % 10] = 1
    runs[0]["epochs"][-1]["confusion"] = counts
    runs[0]["filters"] = torch.arange(100.0).view(4, 1, 5, 5).tolist()
    runs[0]["mistakes"] = [{"index": 5, "true": 3, "predicted": 5, "confidence": 0.99}]
    return {
        "format": 1,
        "environment": {"machine": "a <fast> machine", "commit": None, "torch": "2.15"},
        "options": {"seeds": [1, 2], "epochs": None},
        "runs": runs,
    }


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    write_digits(root)
    return str(root)


@pytest.fixture(scope="module")
def written(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("report")
    given = results()
    given["options"]["data"] = digits
    before = copy.deepcopy(given)
    paths = html_report.write_report(given, described(), folder)
    assert given == before
    assert paths == (folder / "summary.md", folder / "report.html")
    return folder, paths[0].read_text("utf-8"), paths[1].read_text("utf-8")


def test_compare():
    """96.71 and 96.75 against 96.71: 0.02 points, 12 of 60,000 digits."""
    runs = results()["runs"]
    first = html_report.compare(runs, described()["original"])[0]
    assert (first.epoch, first.n) == (1, 2)
    assert first.train.value == "96.73 ± 0.03"
    assert first.train.points == pytest.approx(0.02)
    assert first.train.samples == pytest.approx(12)
    assert first.train.difference == "+0.02 (+12)"
    assert first.test.difference == "−0.02 (−2)"
    alone = html_report.compare(runs[:1], described()["original"])
    assert (alone[0].train.value, alone[0].train.difference) == ("96.71", "same")
    assert alone[1].train.difference == "−0.04 (−24)"
    later = html_report.compare(
        runs_of("rotation-0.2", [[(95.0, 98.0)]]), described()["rotation-0.2"]
    )
    assert later[0].train.difference == "" and later[0].train.points is None


def test_compare_counts_the_digits_that_were_used():
    runs = runs_of("original", [[(96.61, 99.04)]])
    for options, own in (({"limit": 2000}, {}), ({}, {"limit": 2000})):
        limited = [run | own for run in runs]
        row = html_report.compare(limited, described()["original"], options)[0]
        assert (row.train.digits, row.test.digits) == (2000, 2000)
        assert row.train.difference == "−0.10 (−2)"
    runs[0]["epochs"][0]["confusion"] = [[30, 20], [0, 50]]
    assert html_report.compare(runs, described()["original"])[0].test.digits == 100
    mixed = [runs[0], runs[0] | {"seed": 2, "limit": 5}]
    assert html_report.compare(mixed, described()["original"])[0].train.digits is None


def test_numbers_on_the_page(written):
    _, summary, page = written
    rows = Page(page).rows
    wanted = ["original", "1", "2", "96.73 ± 0.03", "96.71", "+0.02 (+12)", "99.02 ± 0.03", "99.04",
              "−0.02 (−2)"]  # fmt: skip
    assert rows[rows.index(["original"]) + 1] == wanted[1:]
    assert "| " + " | ".join(wanted) + " |" in summary
    relu = rows[rows.index(["relu"]) + 1]
    # 98.73 and 98.72 make 98.725, which is cut off to 98.72.
    assert relu[2:5] == ["96.51 ± 0.01", "96.52", "−0.01 (−6)"] and relu[7] == "−0.01 (−1)"
    verdict = next(row for row in rows if row[0].startswith("the numbers of Table 3.3"))
    assert verdict[1:4] == ["contradicted", "1", "1 of 4 numbers equal"]
    t = next(row for row in rows if row[0].startswith("tanh works better than ReLU in training"))
    assert t[2] == "2" and re.fullmatch(r"\+0.\d{3} \[[+−]\d.\d{3}, \+\d.\d{3}\] points", t[3])
    assert len([row for row in rows if row and row[0].endswith(("3.3", "3.4", "3.5"))]) >= 3


def test_the_baseline_is_shown_as_far_as_it_is_compared(written):
    rows = Page(written[2]).rows
    start = rows.index(["relu"])
    assert [row[0] for row in rows[start - 3 : start + 3]] == [
        "original",
        "1",
        "2",
        "relu",
        "1",
        "2",
    ]
    # Nothing is printed of this experiment: no column says so.
    assert rows[rows.index(["rotation-0.2"]) + 1] == ["1", "1", "95.40", "98.80"]


def test_the_page_stands_alone(written):
    folder, _, text = written
    page = Page(text)
    assert "<script" not in text and "http" not in text and "url(" not in text
    images = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    files = sorted(path.name for path in (folder / "figures").iterdir())
    assert len(images) == len(files) == 7
    shown = {base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in images}
    assert shown == {(folder / "figures" / name).read_bytes() for name in files}
    assert all(content.startswith(b"\x89PNG") for content in shown)
    assert {"confusion.png", "filters.png", "mistakes.png", "report-2-figure-1.png"} <= set(files)
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert {link.removeprefix("#") for link in links} == set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "prefers-color-scheme: dark" in text
    words = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(words) == len(images) and all(words)


def test_the_summary_names_its_figures(written):
    folder, summary, _ = written
    names = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", summary)
    assert sorted(names) == sorted(f"figures/{p.name}" for p in (folder / "figures").iterdir())
    # Every table begins after an empty line and has as many cells in every row.
    blocks = [block.splitlines() for block in summary.split("\n\n") if block.startswith("|")]
    assert len(blocks) >= 4
    for block in blocks:
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in block}
        assert len(cells) == 1, block
    assert re.search(r"[^\n]\n#", summary) is None


def test_everything_said(written):
    text = Page(written[2]).text
    for words in ("the title of relu", "a <fast> machine", "Not run: normalization-15, asgd"):
        assert words in text
    assert "commit" not in text
    assert len(reports.CLAIMS) > 50
    for claim in reports.CLAIMS.values():
        assert " ".join(claim.text.split()) in text


def test_the_same_bytes(written, tmp_path, digits):
    given = results()
    given["options"]["data"] = digits
    html_report.write_report(given, described(), tmp_path)
    for path in written[0].rglob("*.*"):
        assert (tmp_path / path.relative_to(written[0])).read_bytes() == path.read_bytes()


def test_everything_is_escaped(tmp_path):
    evil = "<b>&\"'{{ 777 * 777 }}|*_"
    experiment = Described(evil)
    experiment.title = experiment.group = experiment.section = experiment.note = evil
    runs = runs_of(evil, [[(96.0, 98.0)]])
    runs[0] |= {"engine": evil, "dtype": evil, "device": evil}
    given = {"environment": {evil: evil}, "options": {evil: evil}, "runs": runs}
    summary, page = html_report.write_report(given, {evil: experiment}, tmp_path)
    text = page.read_text()
    assert "<b>" not in text and str(777 * 777) not in Page(text).text
    assert Page(text).text.count(evil) >= 9
    assert "<b>" not in summary.read_text().replace("\\<b\\>", "")


@pytest.mark.parametrize("case", ["none", "empty", "nan", "unknown", "limit", "one digit"])
def test_odd_results(tmp_path, case):
    nan = float("nan")
    runs = {
        "none": [],
        "empty": [{"experiment": "relu", "seed": 1, "epochs": [], "epochs_wanted": 3}],
        "nan": runs_of("relu", [[(nan, nan), (None, None)]]),
        "unknown": runs_of("mystery", [[(96.0, 98.0)]]),
        "limit": [run | {"limit": 2000} for run in runs_of("relu", [[(60.0, 70.0)]])],
        "one digit": runs_of("relu", [[(0.0, 100.0)]]),
    }[case]
    html_report.write_report({"format": 1, "runs": runs}, described(), tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert ("only the first 2,000 digits" in page.text) == (case == "limit")
    assert ("not a registered experiment" in page.text) == (case == "unknown")
    assert "0 of 3" in page.text or case != "empty"
    assert not any(word in page.text.split() for word in ("nan", "None"))


def test_many_epochs_are_folded(tmp_path):
    epochs = [(96.0 + e / 10, 98.0 + e / 100) for e in range(1, 32)]
    given = {"runs": runs_of("original", [epochs])}
    summary, page = html_report.write_report(given, described(), tmp_path)
    rows = [line for line in summary.read_text().splitlines() if line.startswith("| original | ")]
    assert [int(row.split("|")[2]) for row in rows] == [1, 2, 3, 5, 10, 15, 20, 25, 30, 31]
    assert "all 31 rows" in page.read_text()
    numbers = [row for row in Page(page.read_text()).rows if len(row) == 8 and row[0].isdigit()]
    assert len(numbers) == 10 + 31 and np.isclose(float(numbers[-1][2]), 99.1)


def test_format(tmp_path):
    with pytest.raises(ValueError, match="write_report: format must be 1, got 2"):
        html_report.write_report({"format": 2}, {}, tmp_path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "results: expected an object, got []"),
        ({"runs": {}}, "results, runs: expected a list, got {}"),
        ({"runs": [[]]}, "results, runs[0]: expected an object, got []"),
        ({"runs": [{"seed": "1"}]}, 'runs[0], seed: expected an integer from 0 on, got "1"'),
        ({"runs": [{"epochs": {}}]}, "epochs: expected a list, got {}"),
        ({"runs": [{"epochs": [{}]}]}, "epochs[0]: epoch is missing"),
        ({"runs": [{"epochs": [{"epoch": "1"}]}]}, "epoch: expected an integer"),
        ({"runs": [{"epochs": [{"epoch": 1, "test_accuracy": "9"}]}]}, "a number or null"),
        ({"runs": [{"epochs": [{"epoch": 1, "confusion": [1]}]}]}, "a square of counts"),
        ({"runs": [{"filters": "x"}]}, "nested lists of numbers"),
        ({"runs": [{"mistakes": [{"index": -1}]}]}, "mistakes[0], index: expected an integer"),
        ({"environment": []}, "environment: expected an object or null, got []"),
        ({"options": "x"}, "options: expected an object or null"),
    ],
)
def test_what_is_no_results_is_refused(tmp_path, given, words):
    with pytest.raises(ValueError, match=r"^write_report: results") as caught:
        html_report.write_report(given, described(), tmp_path / "out")
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_runs_may_be_null(tmp_path):
    html_report.write_report({"runs": None, "options": None}, described(), tmp_path)
    assert (tmp_path / "report.html").exists()


def test_a_full_disk_leaves_the_old_report(tmp_path):
    paths = html_report.write_report(results(), described(), tmp_path)
    before = [path.read_bytes() for path in paths]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        for given, name in (({"runs": []}, "summary.md"), (results(), "group-original.png")):
            with pytest.raises(OSError, match=name):
                html_report.write_report(given, described(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.read_bytes() for path in paths] == before
    assert not list(tmp_path.rglob("*.part"))


def test_mistakes_on_other_data_are_not_drawn_as_mnist(tmp_path):
    given = results()
    given["runs"][0]["data"] = "md5:0123"
    html_report.write_report(given, described(), tmp_path)
    assert "runs used other data than MNIST" in (tmp_path / "summary.md").read_text()
    assert not (tmp_path / "figures" / "mistakes.png").exists()
    assert (tmp_path / "figures" / "filters.png").exists()
