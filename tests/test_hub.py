"""push_to_hub, against a hub that only remembers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import composed

from ace_cli.core.errors import AceError
from ace_cli.report.facts import Report
from ace_cli.report.sweep import Launched


class Hub:
    """What huggingface_hub.HfApi does, remembered."""

    calls: list[tuple[str, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., str]:
        def call(*positional: Any, **named: Any) -> str:
            self.calls.append((name, {**dict(enumerate(positional)), **named}))
            return "https://hub/me/small"

        return call


def test_a_run_goes_to_the_hub_with_a_card_that_machines_read(
    llama: Path, tmp_path: Path, prune_here: Callable[..., Report], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    Hub.calls = []
    options = ["metric=magnitude", "eval=self", "eval.seq_len=16", "eval.max_windows=2", "push_to_hub=me/small"]
    report = prune_here(llama, tmp_path / "out", *options)
    assert [name for name, _ in Hub.calls] == ["whoami", "create_repo", "upload_folder", "upload_file"]
    assert Hub.calls[2][1]["folder_path"] == tmp_path / "out" / "checkpoint"
    card = Hub.calls[3][1]["path_or_fileobj"].decode()
    data = yaml.safe_load(card.split("---\n")[1])
    (index,) = data["model-index"]
    assert index["name"] == "small"
    assert index["results"][0]["metrics"][0]["value"] == report.perplexity.pruned
    assert index["results"][0]["dataset"]["type"] == "text-sampled-from-the-dense-model"
    assert 'from_pretrained("me/small")' in card
    assert "https://hub/me/small" in capfd.readouterr().out
    from huggingface_hub import ModelCard

    assert ModelCard(card).data.eval_results[0].metric_type == "perplexity"


def test_nobody_is_logged_in(
    llama: Path, tmp_path: Path, prune_here: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoBody(Hub):
        def whoami(self) -> None:
            raise OSError("Token is required")

    monkeypatch.setattr("huggingface_hub.HfApi", NoBody)
    with pytest.raises(AceError, match="hf auth login"):
        prune_here(llama, tmp_path / "out", "metric=magnitude", "push_to_hub=me/small")
    assert not (tmp_path / "out").exists()


def test_each_job_of_a_sweep_has_a_repository_of_its_own(
    here: Callable[..., Any], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    Hub.calls = []
    options = ["metric=magnitude", "eval=none", "html=false", "output_dir=sweep"]
    done = here("-m", f"model.path={llama}", *options, "sparsity=0.3,2:4", "push_to_hub=me/small")
    assert done.returncode == 0, done.stderr
    assert [given[0] for name, given in Hub.calls if name == "create_repo"] == ["me/small-0.3", "me/small-2-4"]


def test_two_jobs_that_would_have_one_repository_are_refused(
    here: Callable[..., Any], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    Hub.calls = []
    done = here("-m", f"model.path={llama}", "exclude='*a*','*.a.*'", "push_to_hub=me/small", "output_dir=sweep")
    assert (done.returncode, done.stderr.count("\n"), Hub.calls) == (2, 1, [])
    assert "two jobs would be called me/small-a" in done.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None, reason='pip install "ace-prune[search]"'
)
def test_a_search_does_not_upload_its_trials(
    here: Callable[..., Any], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    Hub.calls = []
    options = ["metric=ria", "metric.alpha=interval(0.1,0.9)", "hydra.sweeper.n_trials=2", "eval=self", "calib=self"]
    done = here("-m", "experiment=search", f"model.path={llama}", *options, "push_to_hub=me/x", "output_dir=search")
    assert (done.returncode, Hub.calls) == (2, [])
    assert "every trial" in done.stderr.splitlines()[-1]


def test_names_of_jobs() -> None:
    jobs = Launched(2, ["metric", "sparsity"])
    assert jobs.on_hub("me/small", 1, {"metric": "varp", "sparsity": "2:4"}) == "me/small-varp-2-4"
    assert jobs.on_hub("me/small", 1, {"metric": "varp" * 30}) == "me/small-1"
    assert jobs.on_hub(None, 1, {}) is None
    assert Launched(2, ["push_to_hub"]).on_hub("me/other", 1, {}) == "me/other"


@pytest.mark.parametrize("option", ["push_to_hub=small", "push_to_hub=me/sm/all", "push_to_hub=../x"])
def test_no_name_of_a_repository(option: str) -> None:
    with pytest.raises(AceError, match="must be USER/NAME"):
        composed(option, "output_dir=/given")
    with pytest.raises(AceError, match="keep_checkpoint"):
        composed("push_to_hub=me/small", "keep_checkpoint=false", "output_dir=/given")
