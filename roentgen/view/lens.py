"""The logit lens: what the model would say next if the stream at a layer were its last (nostalgebraist 2020).

A row of the residual stream goes through the model's final norm and its head. Both are taken from the model's folder, if it is
on this machine; nothing else of the model is loaded. Rows after the final norm go through the head alone.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from roentgen.contract import split_key
from roentgen.defaults import EMBEDDED_MODEL
from roentgen.errors import RoentgenError
from roentgen.model_names import embedded_folder
from roentgen.view.schemas import Grid
from roentgen.view.sources import OpenRun, OpenSource, StoredRollout
from roentgen.view.values import arranged, check_position, row_at

STREAM = ("resid_pre", "resid_mid", "resid_post")
AFTER_NORM = "final_norm"
_ROWS_OF_HEAD = 8192
"""Of the head, made float32 at a time."""


class LensError(RoentgenError):
    """There is no logit lens for a model; the message says why."""


@dataclass(frozen=True, eq=False)
class Lens:
    """The end of a model."""

    norm: nn.Module
    """The final norm."""
    weight: Float[Tensor, "tokens d"]
    """Of the head, `[tokens, d]`."""
    bias: Float[Tensor, "tokens"] | None
    """Of the head, `[tokens]`, if it has one."""
    scale: float
    """What logits are multiplied with."""
    cap: float | None
    """What logits are bent towards (Gemma's soft cap), if so."""
    tokenizer: Any
    """Turns ids into text."""

    def logits(self, rows: Float[Tensor, "rows d"], *, normed: bool = False) -> Float[Tensor, "rows tokens"]:
        """Return the logits of rows of the stream.

        Args:
            rows: `[rows, d]`.
            normed: whether they come from after the final norm.
        """
        with torch.inference_mode():
            h = rows.float() if normed else self.norm(rows.float())
            found = torch.cat([h @ part.float().mT for part in self.weight.split(_ROWS_OF_HEAD)], dim=1)
            found = (found if self.bias is None else found + self.bias.float()) * self.scale
            return found if self.cap is None else self.cap * torch.tanh(found / self.cap)


def lens_of(source: OpenSource) -> Lens:
    """Return the lens of a source's model.

    Raises:
        LensError: if the model is not at hand, or its end is not found.
    """
    if not isinstance(source, OpenRun):
        raise LensError("a session does not say where its model is; open the run")
    return _load(model_folder(source))


def why_no_lens(source: OpenSource) -> str | None:
    """Return why a source has no lens, None if it should have one; nothing is loaded."""
    try:
        if not isinstance(source, OpenRun):
            raise LensError("a session does not say where its model is; open the run")
        if not any(key["hook_point"] in (*STREAM, AFTER_NORM) for key in source.stored_keys()):
            raise LensError("no rows of the residual stream are stored")
        model_folder(source)
    except LensError as error:
        return str(error)
    return None


def model_folder(source: OpenRun) -> Path:
    """Return the folder with the weights of a run's model.

    Raises:
        LensError: if it is not on this machine.
    """
    config = source.run.config
    try:
        root = config.model_root
    except KeyError:
        raise LensError("the run does not say which model it is of") from None
    folder = embedded_folder() if root == EMBEDDED_MODEL else Path(root)
    if not (folder / "config.json").is_file() and "/" in root and not root.startswith("/"):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(root, "config.json", revision=config.hashed.get("revision"))
        folder = Path(cached).parent if isinstance(cached, str) else folder
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise LensError(f"the weights of {root} are not on this machine")
    return folder


def lens_grid(source: OpenSource, rollout: StoredRollout, position: int) -> Grid:
    """Return per layer and hook point the token that the lens reads at a position, and its probability.

    Raises:
        ViewError: if there is no such token.
        StoreError: if rows cannot be read.
    """
    check_position(rollout, position)
    try:
        lens = lens_of(source)
    except LensError as error:
        return {"layers": [], "hook_points": [], "values": [], "texts": [], "missing": str(error)}
    found: dict[tuple[int | None, str], tuple[str, float] | None] = {}
    for key in rollout.keys:
        hook_point, layer = split_key(key)
        if hook_point in (*STREAM, AFTER_NORM) and (row := row_at(rollout, key, position)) is not None:
            shares = lens.logits(row[None], normed=hook_point == AFTER_NORM)[0].softmax(0)
            best = int(shares.argmax())
            found[layer, hook_point] = (
                lens.tokenizer.decode([best], skip_special_tokens=False),
                float(f"{shares[best]:.6g}"),
            )
    layers, hook_points, cells = arranged(found)
    return {
        "layers": layers,
        "hook_points": hook_points,
        "values": [[cell and cell[1] for cell in row] for row in cells],
        "texts": [[cell and cell[0] for cell in row] for row in cells],
        "missing": None if found else f"no row of the residual stream is stored at position {position}",
    }


@lru_cache(maxsize=2)
def _load(folder: Path) -> Lens:
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:
        raise LensError(f"the model in {folder} cannot be read: {error}") from error
    names = {module: name for name, module in model.named_modules()}
    norms = [m for m, name in names.items() if "Norm" in type(m).__name__ and not re.search(r"\.\d+\.", name)]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not norms or head is None:
        raise LensError(f"no final norm and head are found in {type(model).__name__}")
    norm, weights = norms[-1], _Weights(folder)
    own = {name: weights.get(f"{names[norm]}.{name}").float() for name, _ in norm.named_parameters()}
    norm.load_state_dict(own, assign=True)
    text = config.get_text_config()
    divided, multiplied = getattr(text, "logits_scaling", None), getattr(text, "logit_scale", None)
    return Lens(
        norm=norm,
        weight=weights.get(f"{names[head]}.weight", f"{names[embedding]}.weight"),
        bias=None if getattr(head, "bias", None) is None else weights.get(f"{names[head]}.bias"),
        scale=(multiplied or 1.0) / (divided or 1.0),
        cap=getattr(text, "final_logit_softcapping", None),
        tokenizer=tokenizer,
    )


class _Weights:
    """The tensors of a folder, found by their names with or without the prefix of the whole model."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._folder = folder
        opened = [safe_open(file, framework="pt") for file in sorted(folder.glob("*.safetensors"))]
        self._files = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - it is no dict

    def get(self, *names: str) -> Tensor:
        """Return the first of some tensors that there is.

        Raises:
            LensError: if there is none.
        """
        for name in names:
            for stored, file in self._files.items():
                if stored == name or name.endswith(f".{stored}") or stored.endswith(f".{name}"):
                    return torch.as_tensor(file.get_tensor(stored))
        raise LensError(f"{self._folder} has no tensor {names[0]}")
