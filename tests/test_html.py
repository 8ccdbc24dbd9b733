"""report.html: complete, self-contained, and right in a real browser."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import browser, look
from running import Terminal, composed, run

from ace_cli.evaluation.dense import DenseCache
from ace_cli.report.facts import Perplexity
from ace_cli.report.html import error_rows, kind_of, model_name, render
from ace_cli.report.verdict import VERDICTS


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory, documents: Path) -> Path:
    """The folder of a run with everything on."""
    out = tmp_path_factory.mktemp("html") / "out"
    config = composed(
        "model=custom", f"model.path={llama}", f"output_dir={out}", "metric=varp", "sparsity=2:4", "calib=text",
        f"calib.path={documents}", "calib.n_samples=8", "eval=text", f"eval.path={documents}", "eval.seq_len=32",
        "eval.max_windows=5", "device=cpu", "gate.max_ppl_ratio=0.5", "samples.prompts=['w5 <b>w6</b>']",
    )  # fmt: skip
    assert run(config, "ace-prune model.path=a<b", Terminal(), DenseCache()) is not None
    return out


@pytest.fixture(scope="module")
def page(finished: Path) -> str:
    return (finished / "report.html").read_text()


@pytest.fixture
def report(finished: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished / "report.json").read_text())
    return found


def test_the_page_is_made_of_report_json(page: str, report: dict[str, Any]) -> None:
    assert render(report) == page


def test_the_page_needs_no_network_and_no_script(page: str) -> None:
    assert not re.search(r'(?:src|href)="(?!#|data:)', page)
    assert "@import" not in page
    assert "<script" not in page
    assert "url(http" not in page


def test_text_of_others_is_text(page: str) -> None:
    assert "ace-prune model.path=a&lt;b" in page
    assert "w5 &lt;b&gt;w6&lt;/b&gt;" in page
    assert "<b>w6</b>" not in page


def test_what_was_measured_is_shown(page: str, report: dict[str, Any]) -> None:
    numbers = (f"{report['perplexity']['pruned']:.3f}", f"{report['fidelity']['kl']:.4f}", "5 windows of 32")
    parts = (
        'class="badge',
        "from_pretrained(folder)",
        "Smaller or faster?",
        "NOT passed",
        "viewport",
        "prefers-color-scheme",
        "@media print",
        "Memory over time",
        "Share of inputs",
    )
    for text in (*numbers, *parts):
        assert text in page
    assert (
        page.count("<svg") == 3 + 2 + 2 + 1 + 4 + 3
    )  # quality, cost, blocks, kinds, norms of four inputs, activations


def test_ids_are_unique(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 50


def test_a_run_without_data_or_evaluation(report: dict[str, Any]) -> None:
    bare = {**report, "fidelity": None, "samples": [], "gate": None, "calibration": None, "zero_shot": None}
    bare["perplexity"] = dataclasses.asdict(Perplexity())
    bare["slots"] = [{**slot, "activations": None, "error": None} for slot in report["slots"]]
    bare["blocks"] = [{**block, "output": None} for block in report["blocks"]]
    text = render(bare)
    assert "not measured (eval=none)" in text
    assert text.count("<svg") == 2
    assert "Inside the model" not in text, "nothing was looked at"


def test_kinds_of_weights_are_shown_by_what_they_lose(report: dict[str, Any], page: str) -> None:
    rows = {row["kind"]: row for row in error_rows(report)}
    assert next(iter(rows)) == "self_attn.q_proj"
    assert len(rows) == 7
    found = [slot["error"] for slot in report["slots"] if slot["name"].endswith("down_proj.weight")]
    assert rows["mlp.down_proj"]["mean"] == pytest.approx(sum(found) / 2)
    assert rows["mlp.down_proj"]["worst"] == max(found)
    assert f"{max(found):.1%}".replace("%", " %") in page


def test_the_title_says_what_was_done(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ace_cli.report.plots.svg", lambda name, draw, height=2.5: "")
    report["method"] |= {"metric": "wanda", "repair": "sparsegpt", "recover": "blocks"}
    assert "pruned to 2:4 with wanda and sparsegpt and blocks</h1>" in render(report)


def test_a_model_is_called_by_its_name() -> None:
    assert [model_name(path) for path in ("org/Model-1.5B", "/x/small.Q4.gguf")] == ["Model-1.5B", "small.Q4"]


def test_verdicts(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ace_cli.report.plots.svg", lambda name, draw, height=2.5: "")  # seconds a page
    words = []
    for ratio in (0.99, 1.1, 1.3, 2.0, 9.0):
        report["perplexity"]["ratio"] = ratio
        words.append(next(each.word for _, each in VERDICTS if f">{each.word}</b>" in render(report)))
    assert words == [each.word for _, each in VERDICTS]


@pytest.mark.parametrize(("name", "kind"), [
    ("model.layers.3.mlp.up_proj.weight", "mlp.up_proj"), ("transformer.h.0.attn.c_attn.weight", "attn.c_attn"),
    ("model.layers.0.mlp.experts.7.down_proj.weight", "down_proj"), ("lm_head.weight", "lm_head"),
])  # fmt: skip
def test_kinds_of_weights(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_in_a_browser(finished: Path, tmp_path: Path) -> None:
    """Phone and desk, light and dark: no errors, nothing fetched, nothing to scroll sideways, letters one can see."""
    with browser() as session:
        for width in (360, 390, 1100):
            papers = []
            for scheme in ("light", "dark"):
                seen = look(session, finished / "report.html", width, scheme, tmp_path / f"{width}{scheme}.png")
                assert seen["errors"] == []
                assert [name for name in seen["requests"] if not name.startswith("data:")] == []
                assert seen["width"] <= width
                assert "What they write" in seen["text"]
                papers.append(brightness(seen["paper"]))
                assert abs(papers[-1] - brightness(seen["ink"])) > 150
            assert papers[0] > 200
            assert papers[1] < 60
            assert (tmp_path / f"{width}dark.png").stat().st_size > 20_000
        session.execute_script("document.querySelector('.load button').click()")
        assert session.execute_script("return getSelection().toString()").startswith("from transformers import")
        assert session.execute_script("return document.querySelector('.load button').textContent") == "copied"


def brightness(colour: str) -> float:
    """Of "rgb(1, 2, 3)"."""
    parts = [float(part) for part in re.findall(r"[\d.]+", colour)[:3]]
    return sum(parts) / 3


def test_no_html_where_none_is_wanted(llama: Path, tmp_path: Path) -> None:
    config = composed("model=custom", f"model.path={llama}", "metric=magnitude", "eval=none", "html=false",
                      f"output_dir={tmp_path / 'out'}")  # fmt: skip
    report = run(config, "test", Terminal(), DenseCache())
    assert not (tmp_path / "out" / "report.html").exists()
    assert report is not None
    assert "<html" in render(json.loads(json.dumps(dataclasses.asdict(report))))
