from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import composed
from tiny_models import add_tokenizer, make

from ace_cli.core.errors import AceError
from ace_cli.model.files import Checkpoint
from ace_cli.model.source import open_model
from ace_cli.model.streamed import StreamedModel
from ace_cli.report.facts import Report
from ace_cli.run.config import RunConfig
from ace_cli.run.meeting import met

Prune = Callable[..., Report]
#: What finds a size -> what is asked of it, the folder that it is of, and the setting that a test begins with.
FAMILIES: dict[str, tuple[list[str], str, str]] = {
    "channel": (["unit=channel", "unit.multiple=8"], "checkpoint", "sparsity=0.25"),
    "uneven": (
        ["unit=channel", "unit.multiple=8", "unit.uneven=true", "allocation=angular"], "checkpoint", "sparsity=0.25"
    ),
    "head": (["unit=head"], "checkpoint", "sparsity=0.5"),
    "block": (["unit=block", "repair=none"], "checkpoint", "sparsity=0.5"),
    "expert": (["unit=expert"], "checkpoint", "sparsity=0.5"),
    "hidden": (["unit=hidden"], "checkpoint", "sparsity=0.5"),
    "rank": (["unit=rank", "unit.factors=true"], "factors", "sparsity=0.4"),
    "packed": (["pack=true", "metric=magnitude"], "packed", "sparsity=0.4"),
    "codes": (
        ["pack=true", "quantize=int8", "quantize.group=32", "metric=magnitude", "quantize.rounding=nearest"], "packed",
        "sparsity=0.4",
    ),
    "bits": (["quantize.group=32", "metric=magnitude", "quantize.rounding=nearest"], "quantised", "quantize=int5"),
}  # fmt: skip


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make(tmp_path_factory.mktemp("mixture"), "qwen3_moe"))


def found(config: RunConfig) -> RunConfig:
    return met(config, StreamedModel(open_model(config.model), torch.device("cpu"), torch.float32))


def weighs(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_choice_that_loses_least_meets_the_size_to_the_byte(
    family: str, llama: Path, mixture: Path, tmp_path: Path, prune_here: Prune
) -> None:
    options, form, setting = FAMILIES[family]
    if family in ("codes", "bits"):
        pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    source = mixture if family == "expert" else llama
    name, value = setting.split("=")
    nothing = ["sparsity=0"] if name == "quantize" else []
    prune_here(source, tmp_path / "asked", *options, *nothing, setting)
    size = weighs(tmp_path / "asked" / form)
    auto = ["quantize=auto"] if name == "quantize" else []
    report = prune_here(source, tmp_path / "found", *options, *auto, f"target_gb={size / 1e9:.9f}")
    told = report.target
    assert told is not None
    assert (told.size, told.planned, told.measured, told.form) == (size, size, size, form)
    assert told.way == (f"sparsity={report.method['pattern']}" if name == "sparsity" else setting)
    assert float(report.method["pattern"]) <= (float(value) if name == "sparsity" else 0)
    text = (tmp_path / "found" / "report.md").read_text()
    assert f"is met: {form}/ has {size:,} bytes of weights" in text
    less = composed(
        "model=custom", f"model.path={source}", "calib=self", "eval=none", *options, *auto,
        f"target_gb={(size - 1) / 1e9:.9f}",
    )  # fmt: skip
    if family in ("head", "block", "expert"):  # of these there is no fewer
        with pytest.raises(AceError, match=r"can have [^ ]+ GB \(sparsity=0.5\)"):
            found(less)
        return
    smaller = found(less)
    assert smaller.target is not None and smaller.target.planned < size
    if name == "sparsity":
        assert float(str(smaller.pattern)) > float(value)


@pytest.mark.parametrize("family", ["channel", "block", "rank"])
def test_parameters_are_met_as_well(family: str, llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    options, form, _ = FAMILIES[family]
    count = sum(entry.numel for entry in Checkpoint(llama).tensors.values())
    report = prune_here(llama, tmp_path / "out", *options, f"target_params={0.9 * count / 1e3:.3f}k")
    written = Checkpoint(tmp_path / "out" / form, bare=True)
    assert report.target is not None
    assert report.target.measured == sum(entry.numel for entry in written.tensors.values()) == report.target.planned
    assert 0.5 * count < report.target.measured <= 0.9 * count


def test_uneven_shares_stay_within_the_size(llama: Path, tmp_path: Path, prune_here: Prune) -> None:
    for family, allocation in (("packed", "owl"), ("rank", "sensitivity")):
        options, form, _ = FAMILIES[family]
        kind = [f"allocation={allocation}", "metric=wanda" if family == "packed" else "metric=svd_llm"]
        given = [option for option in options if not option.startswith("metric=")]
        report = prune_here(llama, tmp_path / family, *given, *kind, "target_gb=0.00022")
        assert report.target is not None
        assert 0.9 * 220_000 < weighs(tmp_path / family / form) == report.target.measured <= report.target.planned
        assert report.target.planned <= 220_000


def test_the_plan_says_it_and_a_dry_run_too(llama: Path, tmp_path: Path, here: Callable[..., Any]) -> None:
    options = [
        "model=custom",
        f"model.path={llama}",
        "calib=self",
        "eval=none",
        "device=cpu",
        "unit=channel",
        "unit.multiple=8",
    ]
    done = here(*options, "target_params=60k", "dry_run=true", f"output_dir={tmp_path / 'out'}")
    assert done.returncode == 0
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("target "))
    assert re.fullmatch(
        r"target       target_params=60k is met by sparsity=0.\d+: 0.05\d+ M parameters in checkpoint/", line
    )
    assert not (tmp_path / "out").exists()


def test_a_sweep_of_sizes(llama: Path, tmp_path: Path, here: Callable[..., Any]) -> None:
    done = here(
        "-m", "model=custom", f"model.path={llama}", "calib=self", "calib.n_samples=8", "eval=none", "device=cpu",
        "pack=true", "metric=magnitude", "target_gb=0.00020,0.00025,0.001", f"output_dir={tmp_path / 'out'}",
    )  # fmt: skip
    assert done.returncode == 1
    sizes = [weighs(tmp_path / "out" / job / "packed") for job in ("0", "1")]
    assert 195_000 < sizes[0] <= 200_000 and 245_000 < sizes[1] <= 250_000
    jobs = json.loads((tmp_path / "out" / "sweep.json").read_text())["jobs"]
    assert "target_gb=0.001 cannot be met" in jobs[2]["error"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["unit=channel", "target_gb=1", "sparsity=0.5"], "target_gb finds how much goes: leave out sparsity=0.5"),
        (["unit=channel", "target_gb=1", "keep=8"], "leave out keep=8"),
        (["experiment=smaller", "target_params=1B"], "leave out sparsity=20%"),
        (["unit=channel", "target_gb=1", "target_params=1B"], "are two sizes"),
        (["unit=channel", "target_gb=0"], "target_gb=0.0: must be more than 0"),
        (["unit=channel", "target_params=many"], "target_params=many: give a number, such as 100M"),
        (["unit=channel", "target_params=-5"], "target_params=-5: give a number"),
        (["target_gb=1"], "zeros are stored like any weight"),
        (["target_gb=1", "quantize=int4"], "add pack=true, quantize=auto"),
        (["target_params=1B", "pack=true"], "a zero is a parameter, too"),
        (["target_gb=1", "pack=zstd"], "use pack=true"),
        (["target_gb=1", "pack=true", "quantize=auto"], "give the bits"),
        (["target_gb=1", "unit=rank"], "add unit.factors=true"),
        (["quantize=auto"], "quantize=auto finds the bits for a target_gb"),
        (["quantize=auto", "target_gb=1", "sparsity=0.5"], "leave out sparsity=0.5"),
        (["quantize=auto", "target_gb=1", "allocation=owl"], "sparsity=0 prunes nothing"),
    ],
)
def test_what_no_target_goes_with_is_one_line(
    options: list[str], words: str, configure: Callable[..., RunConfig]
) -> None:
    with pytest.raises(AceError) as caught:
        configure("model=llama7b", *options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_made_beside_a_smaller_checkpoint_does_not_count(configure: Callable[..., RunConfig]) -> None:
    target = configure("model=llama7b", "unit=channel", "pack=true", "export=gguf", "target_gb=1").target
    assert target is not None and target.form == "checkpoint"


@pytest.mark.parametrize(  # both ends are always looked at, and both are told
    ("family", "size"),
    [*zip(FAMILIES, itertools.cycle(["0.00001", "1"]), strict=False), ("channel", "1"), ("packed", "0.00001")],
)
def test_a_size_out_of_reach_is_refused_with_what_can_be_had(
    family: str, size: str, llama: Path, mixture: Path
) -> None:
    options, form, _ = FAMILIES[family]
    source, auto = mixture if family == "expert" else llama, ["quantize=auto"] if family == "bits" else []
    config = composed(
        "model=custom", f"model.path={source}", "calib=self", "eval=none", *options, *auto, f"target_gb={size}"
    )
    with pytest.raises(AceError) as caught:
        found(config)
    text = str(caught.value)
    assert re.search(rf"cannot be met: the model has [\d.]+ GB, {form}/ can have .* GB \(.*\) to .* GB \(.*\)", text)
    assert "\n" not in text


def test_a_width_that_no_configuration_says_is_passed_over(tmp_path: Path) -> None:
    """Of 6 heads of 64 inputs 5, 3 and 1 do not divide them, and a Llama says no width of a head where it is 64 / 6."""
    source = make(
        tmp_path / "model", "llama", hidden_size=96, num_attention_heads=6, num_key_value_heads=6, head_dim=16
    )
    options = ["model=custom", f"model.path={source}", "calib=self", "eval=none", "unit=head"]
    size = weighs(source) - 1
    config = found(composed(*options, f"target_gb={size / 1e9:.9f}"))
    assert str(config.pattern) == "0.333333"  # 5 heads of 96 inputs cannot be said
