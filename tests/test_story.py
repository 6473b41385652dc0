"""A run's page grows with the run: pruned, judged, deployed."""

import json

import pytest
from test_cli import pictures, run, tiny  # noqa: F401

from snows.results.deployment import Deployment
from snows.results.report import Report
from snows.results.story import METHODS, demo_page, run_page


def test_the_page_of_a_run_grows_with_it(monkeypatch, capsys, tmp_path, pictures):  # noqa: F811
    out = tmp_path / "run"
    common = ["--model", "test_cli:tiny", "--data", pictures, "--crop", 32]
    code, text = run(monkeypatch, capsys, "prune", *common, "--pattern", "2:4", "--samples", 8, "--out", out)
    assert code == 0, text
    page = (out / "report.html").read_text()
    for part in (
        "Weights kept",
        "Reconstruction loss",
        "test_cli:tiny",
        str(pictures),
        "snows prune --model test_cli:tiny",
        "UTC",
    ):
        assert part in page
    assert "times as fast" not in page
    (out / "scores.json").write_text(json.dumps({"dense": 81.25, "magnitude": 12.5, "pruned": 79.5}))
    code, text = run(monkeypatch, capsys, "deploy", out, "--objective", "size", "--trust")
    assert code == 0, text
    page, found = (
        (out / "report.html").read_text(),
        Deployment.from_json((out / "deployment.json").read_text()),
    )
    assert "12.50" in page  # by magnitude, in the chart
    for part in (
        "<b>79.50</b> %",
        "<b>81.25</b> dense",
        "-1.75 points",
        f"<b>{found.sparse_ms:.1f}</b> ms",
        f"<b>{found.dense_ms:.1f}</b> dense",
    ):
        assert part in page
    code, _ = run(monkeypatch, capsys, "report", out)
    assert code == 0
    assert "<b>79.50</b> %" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("scores.json", "{", "scores.json is damaged"),
        ("scores.json", '{"dense": 1}', "is damaged"),
        ("scores.json", '{"dense": "a", "pruned": 1}', "expected accuracies by name"),
        ("deployment.json", "[]", "deployment.json is not a deployment's report"),
        ("source.json", "{}", "source.json is damaged"),
    ],
)
def test_a_damaged_file_beside_the_report_is_named(monkeypatch, capsys, tmp_path, name, content, message):
    (tmp_path / "report.json").write_text(Report().to_json())
    (tmp_path / name).write_text(content)
    code, text = run(monkeypatch, capsys, "report", tmp_path)
    assert code == 2
    assert message in text
    assert "Traceback" not in text


def test_a_page_without_anything_measured():
    page = run_page(Report())
    assert "points" not in page
    assert "<svg" not in page


def test_the_demos_large_numbers_are_of_the_case_that_gained_most():
    rows = [{name: 90.0 + i for name in METHODS} for i in range(2)]
    slow, fast = (
        Deployment(dense_ms=2.0, sparse_ms=x, dense_bytes=2_000_000, sparse_bytes=1_000_000, samples=8)
        for x in (1.6, 1.0)
    )
    page = demo_page(rows, [("one 2:4", Report()), ("two 1:4", Report())], [slow, fast], {}, "snows demo")
    assert "The large numbers are of two 1:4" in page
    assert "2.00 times as fast" in page
    assert "<b>91.00</b> %" in page
    assert tiny()
