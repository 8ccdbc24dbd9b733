"""Configurations: what is accepted, and what is said of what is not."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from ace_cli.core import registry
from ace_cli.core.errors import AceError, did_you_mean
from ace_cli.methods.metrics.ace import ACE, Combine
from ace_cli.methods.metrics.cosp import Mode
from ace_cli.methods.metrics.ria import RIA
from ace_cli.methods.metrics.varp import Form, Norm, VarP
from ace_cli.methods.patterns import NofM, Ratio, Scope
from ace_cli.run.config import CONFIGURATION_ERRORS, RunConfig, config_folder, explain, store_schemas

Configure = Callable[..., RunConfig]
CARDS = sorted(file.stem for file in (config_folder() / "model").glob("*.yaml"))


def test_defaults(configure: Configure) -> None:
    config = configure("model=llama7b")
    assert isinstance(config.metric, ACE)
    assert (config.calib.n_samples, config.calib.seq_len, config.calib.seed) == (128, 16, 0)
    assert config.pattern == Ratio(Fraction(1, 2), Scope.row)
    assert not config.dry_run
    assert config.output_dir.is_absolute()


def test_every_named_override_is_there(configure: Configure, documents: Path, tmp_path: Path) -> None:
    """The names that scripts rely on."""
    config = configure(
        "model=custom", f"model.path={tmp_path}", "metric=wanda", "sparsity=0.25", "scope=layer", "repair=none",
        "allocation=uniform", "propagate=dense", "calib=text", f"calib.path={documents}", "calib.n_samples=3",
        "calib.seq_len=5", "calib.seed=7", "eval=text", f"eval.path={documents}", "eval.seq_len=9",
        "eval.max_windows=2", "device=cpu", "dtype=float32", "dry_run=true", f"output_dir={tmp_path}/out",
    )  # fmt: skip
    assert config.pattern == Ratio(Fraction(1, 4), Scope.layer)
    assert (config.calib.n_samples, config.calib.seq_len, config.calib.seed) == (3, 5, 7)
    assert config.output_dir == tmp_path / "out"
    assert config.dry_run
    assert (config.device, config.dtype.value, config.propagate.value) == ("cpu", "float32", "dense")


def test_a_metric_s_fields_are_its_options(configure: Configure) -> None:
    assert configure("model=llama7b", "metric=ria", "metric.alpha=0.3").metric == RIA(alpha=0.3)
    varp = configure("model=llama7b", "metric=varp", "metric.norm=rms", "metric.form=series", "metric.wpow=2").metric
    assert varp == VarP(Norm.rms, Form.series, 2)
    ace = configure("model=llama7b", "metric=ace", "metric.mode=exact2", "metric.combine=replace").metric
    assert ace == ACE(mode=Mode.exact2, combine=Combine.replace)


def test_cards_of_the_papers_models_exist() -> None:
    for family in ("opt-350m", "opt-30b", "llama7b", "llama65b", "llama2-7b", "llama3-8b", "llama3.1-8b",
                   "llama3.2-1b", "qwen2.5-7b", "mixtral-8x7b", "smollm2"):  # fmt: skip
        assert family in CARDS


@pytest.mark.parametrize("text", ["2:4", '"2:4"', "'2:4'"])
def test_n_of_m_on_the_command_line(configure: Configure, text: str) -> None:
    assert configure("model=llama7b", f"sparsity={text}").pattern == NofM(2, 4)


@pytest.mark.parametrize("text", ["0.5", "50%", "'0.5'", ".5"])
def test_ratio_on_the_command_line(configure: Configure, text: str) -> None:
    assert configure("model=llama7b", f"sparsity={text}").pattern == Ratio(Fraction(1, 2), Scope.row)


def test_all_faults_are_told_at_once(configure: Configure) -> None:
    with pytest.raises(AceError) as caught:
        configure(
            "model=llama7b", "calib.n_samples=0", "calib.seq_len=1", "calib.seed=-1", "eval.seq_len=0", "device=tpu",
            "eval.max_windows=0", "metric=ria", "metric.alpha=-2", "sparsity=1.5",
        )  # fmt: skip
    text = str(caught.value)
    for name in ("calib.n_samples=0", "calib.seq_len=1", "calib.seed=-1", "eval.seq_len=0", "device=tpu",
                 "eval.max_windows=0", "metric.alpha=-2", "sparsity=1.5"):  # fmt: skip
        assert name in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["scope=layer", "sparsity=2:4"], "scope=layer"),
        (["calib=text"], "calib.path"),
        (["calib=text", "calib.path=/nowhere.jsonl"], "calib.path=/nowhere.jsonl: no such file"),
        (["eval=text", "eval.path=/nowhere.txt"], "eval.path=/nowhere.txt: no such file"),
        (["calib=text", f"calib.path={__file__}"], "must end in"),
        (["eval=self", "eval.max_windows=null"], "eval.max_windows"),
        (["model=custom"], "model.path"),
        (["model=custom", "model.path=/no/such/folder"], "/no/such/folder does not exist"),
        (["sparsity=124"], '"2:4"'),
    ],
)
def test_what_cannot_work_is_refused_before_any_model(
    configure: Configure, overrides: list[str], expected: str
) -> None:
    base = [] if any(override.startswith("model=") for override in overrides) else ["model=llama7b"]
    with pytest.raises(AceError) as caught:
        configure(*base, *overrides)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ("metric=ria", "metric.alpha=0.3", "sparsity=2:4", "model=llama7b", "eval=none"),
        ("calib.n_samples=3", "unit=channel", "unit.multiple=8", "repair=none", "model=llama7b"),
        (
            "recipe=wanda",
            "recover=blocks",
            "recover.epochs=2",
            "sparsity=40%",
            "samples.prompts=[]",
            "exclude=[a,'b c']",
        ),
    ],
)
def test_what_tests_compose_is_what_hydra_does(overrides: tuple[str, ...]) -> None:
    from running import _composed

    store_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder().absolute()), version_base="1.3"):
        whole = compose("prune", list(overrides))
    found = _composed(*overrides)
    assert OmegaConf.to_yaml(found) == OmegaConf.to_yaml(whole)
    assert [OmegaConf.get_type(found, name) for name in whole] == [OmegaConf.get_type(whole, name) for name in whole]


def explained(*overrides: str) -> str:
    """What a composition error becomes."""
    store_schemas()
    GlobalHydra.instance().clear()
    with (
        initialize_config_dir(str(config_folder().absolute()), version_base="1.3"),
        pytest.raises(CONFIGURATION_ERRORS) as caught,
    ):
        compose("prune", list(overrides))
    return str(explain(caught.value))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("metric=wand", "Did you mean 'wanda'?"),
        ("model=smolm2", "Did you mean 'smollm2'?"),
        ("calib=c5", "Did you mean 'c4'?"),
        ("eval=wikitext", "Did you mean 'wikitext2'?"),
        ("repair=non", "Did you mean 'none'?"),
        ("allocation=unifrom", "Did you mean 'uniform'?"),
        ("sparsty=0.5", "Did you mean 'sparsity'?"),
        ("calib.seqlen=3", "Did you mean 'seq_len'?"),
        ("metric.nrom=rms", "Did you mean 'norm'?"),
        ("model.pth=x", "Did you mean 'path'?"),
        ("metric.norm=l2", "metric.norm"),
        ("propagate=blok", "propagate"),
        ("calib.n_samples=many", "calib.n_samples"),
        ("dry_run=perhaps", "dry_run"),
    ],
)
def test_composition_errors_are_one_line_with_a_suggestion(override: str, expected: str) -> None:
    text = explained(override)
    assert expected in text
    assert override.partition("=")[0].rpartition(".")[2] in text
    assert "\n" not in text


def test_wrong_values_name_the_right_ones() -> None:
    assert "rms" in explained("metric.norm=l2")
    assert "block" in explained("propagate=blok")


def test_did_you_mean() -> None:
    assert did_you_mean("wnada", ["wanda", "ria"]) == "Did you mean 'wanda'? Available: ria, wanda."
    assert did_you_mean("xyz", ["wanda", "ria"]) == "Available: ria, wanda."


def test_an_error_is_one_sentence_after_another() -> None:
    assert str(AceError("It broke", "Mend it.")) == str(AceError("It broke.", "Mend it.")) == "It broke. Mend it."


def test_a_fault_that_is_its_own_cause_is_explained() -> None:
    """OmegaConf raises one error from another and back, which found no end."""
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert "second" in str(explain(first))


@pytest.mark.parametrize("key", ["calib.calib:1:30...`", "a.b.c.d", ".", "..x", "model", "gate.x.y"])
def test_a_key_of_any_letters_is_explained(key: str) -> None:
    assert "there is no such option" in str(explain(ValueError(f"Key '{key}' not in 'C4'\n    full_key: {key}")))


def test_the_rows_of_table_1_are_recipes(configure: Callable[..., RunConfig]) -> None:
    folder = config_folder()
    rows = OmegaConf.load(folder / "experiment" / "table1.yaml").hydra.sweeper.params.recipe.split(",")
    assert sorted(rows) == sorted(file.stem for file in (folder / "recipe").glob("*.yaml"))
    config = configure("recipe=sobp")  # what a unit brings gives way to what its row says
    choices = [registry.name_of(group, getattr(config, group)) for group in ("unit", "metric", "repair", "allocation")]
    assert choices == ["channel", "sobp", "obs", "global"]
    assert (config.requested, config.unit.uneven) == ("0.5", True)
    assert registry.name_of("metric", configure("recipe=slicegpt_eq").metric) == "slicegpt"
