"""The pages: their numbers, that the HTML stands alone, and what they make of odd results."""

import base64
import copy
import re
import resource
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from test_figures import write_digits
from test_statistics import record, runs_of

from mnist_ops.lab import experiments, markdown, pages, reports


class Html(HTMLParser):
    """Tags that are open, attributes, text outside of style, tables as rows of cells."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.words, self.rows = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.words.append(text)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += text


def results():
    """Two seeds of the original, one of ReLU, a guess and a rotation."""
    runs = runs_of("original", [[(96.71, 99.04), (99.0, 99.41), (99.342, 99.5)],
                                [(96.75, 99.00), (99.1, 99.3), (99.4, 99.4)]])  # fmt: skip
    runs += [record("relu", 1, [(96.50, 98.73), (98.8, 99.0)], commit="1" * 40, torch="2.10")]
    runs += [
        record("relu--all-local", 1, [(96.52, 98.74)]),
        record("rotation-0.2", 1, [(95.4, 98.8)]),
    ]
    runs[0] |= {"commit": "abcdef0123", "torch": "2.15.0", "machine": "a <fast> machine"}
    runs[0]["filters"] = torch.arange(100.0).view(4, 1, 5, 5).tolist()
    runs[0]["mistakes"] = [{"index": 5, "true": 3, "predicted": 5, "confidence": 0.99}]
    environment = {"commit": "fedcba9876", "torch": "9.9", "machine": "of whoever collected them"}
    return {"format": 1, "environment": environment, "runs": runs}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_digits(root, 20)
    return root


@pytest.fixture(scope="module")
def written(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("pages")
    given = results()
    paths = pages.write(given, folder, images)
    assert given == results()
    assert [path.name for path in paths] == ["report-1.md", "report-2.md", "report.html"]
    return folder, *(path.read_text("utf-8") for path in paths)


def test_numbers_beside_print(written):
    _, first, second, page = written
    row = "| original | 1 | 96.71 | 96.71 | 0 | 96.73 ± 0.03 (2) "
    row += "| 99.04 | 99.04 | 0 | 99.02 ± 0.03 (2) |"
    assert row in first
    # Epoch 2: 99.04 printed stands for 59,424 to 59,429 of 60,000; 99.0 is 59,400.
    assert "| original | 2 | 99.04 | 99.00 | −24 |" in first
    assert "| original | 4 |" not in first and "; 7 of 10 epochs not run yet" in first
    words = "4 of 20 equal, 14 not run; farthest −24 images (epoch 2, training)"
    assert f"original: **{words}**" in first and f"| {words} |" in first
    assert "| `rotation-0.2` | 1 | 1 | 95.40 | 98.80 | 98.80 |" in second
    # A figure's points likewise: 96.093 and 98.856 were read off for epoch 1.
    assert "| rotation-0.2 | 1 | 96.09 | 95.40 | −414 | 98.85 | 98.80 | −6 |" in second
    assert "| rotation-0.2 | 2 |" not in second and "; 43 of 44 epochs not run yet" in second
    assert "Not run: `plain`, `lbfgs-after-5`, `lbfgs-after-7`" in second
    for text in written[1:]:
        assert not re.search(r"\b1 (epochs|runs|seeds|images|numbers|groups)\b", text)
    assert "rotation-0.2: **0 of 87 equal, 85 not run; farthest −414 images" in second
    rows = Html(page).rows
    assert [cell.strip() for cell in row.split("|")[1:-1]] in rows


def test_numbers_are_those_of_runs_not_of_who_printed_them(written):
    for text in written[1:]:
        assert "fedcba9" not in text and "9.9 " not in text and "whoever" not in text
    assert "(seed 1: `original/float64-seed1` at commit abcdef0)" in written[1]
    assert (
        "| abcdef0 | 2.15.0 | float64 | cpu: a <fast> machine | `original/seed1`: 3 |" in written[1]
    )
    assert "| 1111111 | 2.10 | float64 | cpu: unknown | `relu/seed1`: 2 |" in written[1]
    assert "a &lt;fast&gt; machine" in written[3] and "<fast>" not in written[3]


def test_every_claim_has_its_verdict(written):
    for number in (1, 2):
        claims = [c for c in reports.CLAIMS.values() if c.report == number]
        told = re.findall(
            r"^- “(.*)” \*\*(Supported|Contradicted|Open|Not tested)\*\*: .", written[number], re.M
        )
        assert sorted(quote for quote, _ in told) == sorted(claim.quote for claim in claims)
        assert f"Of {len(claims)} statements in the text" in written[number]


def test_sources_are_cited(written):
    for number in ("1", "2"):
        source = reports.SOURCES[number]
        head = written[int(number)].split("##")[0]
        for key in ("title", "authors", "date", "repository", "folder"):
            assert source[key] in head
        assert reports.SOURCES["starter"] in head


def test_the_authors_log_and_guesses(written):
    assert (
        "**The original network** (`original/float64-seed1` at commit abcdef0): 4 of 6"
        in written[1]
    )
    assert "Training, more or fewer right than there: −24 in epoch 2." in written[1]
    assert "| ReLU in all, local digits | 96.52 (0) | 98.74 (+1) |" in written[1]
    assert "**ReLU, printed 96.52 / 98.73: not found**" in written[1]


def test_the_html_stands_alone(written):
    folder, *markdown, text = written
    page = Html(text)
    assert "<script" not in text and "url(" not in text
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert links and all(link.startswith("https://github.com/") for link in links)
    shown = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    named = [name for one in markdown for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", one)]
    files = {f"figures/{path.name}" for path in (folder / "figures").iterdir()}
    assert set(named) == files and len(named) == len(files) == len(shown)
    contents = [base64.b64decode(s.removeprefix("data:image/png;base64,")) for s in shown]
    assert contents == [(folder / name).read_bytes() for name in named]
    assert {"figures/filters.png", "figures/mistakes.png", "figures/normalization.png"} <= files
    # The same words, without the Markdown.
    for block in "\n".join(markdown).split("\n\n"):
        if block[:1].isalpha():
            plain = re.sub(r"\*|`|\[([^\]]*)\]\([^)]*\)", r"\1", block)
            assert "".join(plain.split()) in "".join(page.text.split()), block


def test_tables_are_whole(written):
    for text in written[1:3]:
        assert "\n\n\n" not in text and re.search(r"[^\n]\n#", text) is None
        blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
        assert len(blocks) >= 3
        for block in blocks:
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block}) == 1, block


def test_the_same_bytes(written, tmp_path, images):
    pages.write(results(), tmp_path, images)
    for path in written[0].rglob("*.*"):
        assert (tmp_path / path.relative_to(written[0])).read_bytes() == path.read_bytes()


def test_everything_is_escaped():
    evil = "<b>&\"'{{ 777 }}|*_</details>"
    cell = evil.replace("|", "\\|")
    blocks = [f"# {evil}", f"{evil} x", f"- {evil}", f"| {cell} |\n| --- |", f"![{evil}](a.png)"]
    page = Html(markdown.to_html("\n\n".join(blocks), {"a.png": b""}))
    assert page.text.count(evil) == 4 and ("img", "alt", evil) in page.attributes


@pytest.fixture
def no_figures(monkeypatch):
    """Where the words are looked at: a second a figure."""
    monkeypatch.setattr(pages.figures, "render", lambda *_: b"PNG")


@pytest.mark.parametrize("case", ["none", "empty", "unknown", "limit", "other data"])
def test_odd_results(tmp_path, case, images, no_figures):
    runs = {
        "none": [],
        "empty": [record("relu", 1, [])],
        "unknown": [record("mystery", 1, [(96.0, 98.0)])],
        "limit": [record("relu", 1, [(60.0, 70.0)], limit=2000)],
        "other data": [record("relu", 1, [(60.0, 70.0)], data="md5:0123")],
    }[case]
    first, second, page = pages.write({"format": 1, "runs": runs}, tmp_path, images)
    text = first.read_text("utf-8")
    assert ("used the first 2,000 images of each split" in text) == (case == "limit")
    assert ("used other data" in text) == (case == "other data")
    assert ("`mystery/seed1`: 1" in second.read_text("utf-8")) == (case == "unknown")
    assert not any(word in Html(page.read_text("utf-8")).text.split() for word in ("nan", "None"))


def test_runs_of_an_experiment_that_has_changed_are_not_used(tmp_path, images, no_figures):
    given = results()
    given["runs"][2]["settings"] = {"loss": "mse"}
    text = pages.write(given, tmp_path, images)[0].read_text("utf-8")
    assert "`relu/seed1`: 2 (its experiment has changed since: not used)" in text
    assert "reLU: **not run**" in text


def test_the_small_set(tmp_path, images, no_figures):
    """The epoch that comes nearest to 78, 60 and 45 %, and the setting nearest to 30 %."""
    runs = []
    for size, accuracies in ((32, (57, 77, 80)), (64, (40, 61, 63)), (128, (25, 45, 51))):
        history = [(10.0, float(x)) for x in accuracies]
        runs += [record(f"small-batch-{size}", s, history) for s in (1, 2)]
        runs += [record(f"batch-{size}", 1, [(75.0, 90.0)])]
    runs += [record("small-momentum-0.9-lr-1e-1", 1, [(60.0, 50.0), (39.0, 31.0)])]
    runs += [record("small-momentum-0-lr-1e-3", s, [(0.0, 90.0 + s)]) for s in (1, 2, 3)]
    text = pages.write({"runs": runs}, tmp_path, images)[1].read_text("utf-8")
    assert "| small set | test | 2 of 3 | 77.0 | 61.0 | 45.0 | 1.0 |" in text
    assert "| all of MNIST | training | 1 of 1 | 75.0 | 75.0 | 75.0 | 30.0 |" in text
    assert "local normalization |" not in text  # not run
    assert "nearest: 77.0 / 61.0 / 45.0 (small set, test, epoch 2 of 3) |" in text
    assert "| momentum | learning rate 1e-3 | learning rate 1e-1 |" in text
    assert "| 0 | 92.00 ± 1.00 (3) | – |" in text and "| 0.9 | – | 31.00 |" in text
    assert "nearest: 31.0 % (`small-momentum-0.9-lr-1e-1`) |" in text


def test_experiments_of_neither_report(tmp_path, images, no_figures, monkeypatch):
    extra = replace(experiments.EXPERIMENTS["original"], name="new", title="a new one", section="")
    choice = replace(extra, name="new--first", title="a choice", validation=5000)
    monkeypatch.setitem(experiments.EXPERIMENTS, "new", extra)
    monkeypatch.setitem(experiments.CHOICES, "new", [choice])
    runs = [record("new", s, [(99.0, 99.6 + s / 100)]) for s in (1, 2, 3)]
    text = pages.write({"runs": runs}, tmp_path, images)[1].read_text("utf-8")
    assert "## Beyond the reports" in text and "`new`: a new one." in text
    assert "without the last 5,000 training images" in text and "Not run: `new--first`." in text
    assert "| `new` | 3 | 1 | 99.00 ± 0.00 (3) | 99.62 ± 0.01 (3) | 99.62 ± 0.01 (3) |" in text


def test_a_full_disk_leaves_the_old_pages(tmp_path, images):
    paths = pages.write(results(), tmp_path, images)
    before = [path.read_bytes() for path in paths]
    changed = copy.deepcopy(results())
    changed["runs"][0]["epochs"][0]["test_accuracy"] = 90.0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"table-3\.1\.png"):
            pages.write(changed, tmp_path, images)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.read_bytes() for path in paths] == before
    assert not list(tmp_path.rglob("*.part"))
