"""Text a model writes itself, for calibration and evaluation without any data."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from ace_cli.core.errors import AceError, first_line
from ace_cli.core.memory import Trimmer
from ace_cli.core.steps import NOBODY, Steps
from ace_cli.core.torch_api import has_bfloat16_units
from ace_cli.data.token_ids import check_ids

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ace_cli.model.files import Checkpoint

#: What windows are for: the same seed never gives two of them the same text.
CALIBRATION, EVALUATION, TRAINING = 0, 1, 1 << 40


def sample_windows(
    checkpoint: Checkpoint, count: int, length: int, seed: int, purpose: int, device: str, steps: Steps = NOBODY
) -> Tensor:
    """``count`` windows of ``length`` tokens, int64 (count, length), sampled at temperature 1 from the start token.

    The start token itself is the first token of every window.
    """
    import torch

    ids_N1 = torch.full((count, 1), start_token(checkpoint), dtype=torch.int64)
    return continue_windows(checkpoint, ids_N1, length, seed, purpose, device, steps)


def continue_windows(
    checkpoint: Checkpoint, ids_NL: Tensor, length: int, seed: int, purpose: int, device: str, steps: Steps = NOBODY
) -> Tensor:
    """``ids_NL`` (int64, on the CPU) written on by the model at temperature 1 until every row has ``length`` tokens.

    All rows grow together, with a cache. The whole model is in memory while it writes: in the stored dtype on a device,
    on the CPU in bfloat16 where it has units for it and in float32 where not. A step is a token of every row.
    """
    import torch

    on_cpu = torch.bfloat16 if has_bfloat16_units() else torch.float32
    dtype = on_cpu if device == "cpu" else "auto"
    model = whole_model(checkpoint, dtype, device, "Use text of your own.")
    check_ids(ids_NL, model.get_input_embeddings().weight.shape[0], checkpoint, "the text to be written on")
    generator = torch.Generator().manual_seed((2 * seed + purpose) % 2**64)
    kept = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # before 5.24
    cache, new_NL, trimmer = None, ids_NL, Trimmer()
    steps.of(length - ids_NL.shape[1])
    with torch.inference_mode():
        while ids_NL.shape[1] < length:
            out = model(new_NL.to(device), **{kept: cache}, use_cache=True, logits_to_keep=1)
            cache = out[kept]
            new_NL = draw(out.logits[:, -1], generator)
            ids_NL = torch.cat([ids_NL, new_NL], dim=1)
            steps()
            trimmer()  # a cache that grows at every step leaves holes in the heap
    return ids_NL


def whole_model(checkpoint: Checkpoint, dtype: torch.dtype | str, device: torch.device | str, hint: str) -> Any:
    """transformers' own model, all of it in memory, ready to write; with images or without, it is given text alone.

    ``dtype``: "auto" for the stored one. Raises AceError with ``hint`` when transformers cannot load the folder.
    """
    from ace_cli.model.adapted import peft, quietly
    from ace_cli.model.configuration import transformers_config
    from ace_cli.model.loading import class_that_loads

    config, folder = transformers_config(checkpoint.folder), checkpoint.folder
    loads = class_that_loads(config)
    try:
        model = loads.from_pretrained(folder, config=config, dtype=dtype, trust_remote_code=False)
        if checkpoint.adapter is not None:
            model = quietly(peft().PeftModel.from_pretrained, model, str(checkpoint.adapter))
        return model.to(device).eval()
    except Exception as fault:  # whatever a damaged folder makes the library raise
        problem = f"{checkpoint.folder} cannot be loaded to write text: {first_line(fault)}"
        raise AceError(problem, hint) from fault


def draw(logits_NV: Tensor, generator: torch.Generator) -> Tensor:
    """One token of each row, int64 (N, 1), where a uniform number falls in the summed probabilities.

    Drawn on the CPU, with the same generator for every device; ``torch.multinomial`` takes twenty times as long.
    """
    import torch

    reach_NV = logits_NV.float().softmax(-1).cpu().double().cumsum(1)
    point_N1 = torch.rand(len(reach_NV), 1, generator=generator, dtype=torch.float64) * reach_NV[:, -1:]
    return torch.searchsorted(reach_NV, point_N1, right=True).clamp(max=reach_NV.shape[1] - 1)


def start_token(checkpoint: Checkpoint) -> int:
    """The id a text starts with: the beginning-of-text token, else the end-of-text token, else 0.

    A negative id says that there is none.
    """
    config = checkpoint.config()
    for name in ("bos_token_id", "eos_token_id"):
        value = config.get(name)
        if isinstance(value, list) and value:
            value = value[0]
        if type(value) is int and value >= 0:
            return value
    return 0
