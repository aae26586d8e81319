"""Writes an exported run's dataset card: the README.md of a Hugging Face dataset, with YAML metadata and a description.

All of it comes from the run's configuration and its summary, so that a reader knows what the data is and how to reproduce it.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml

from eval_jobs.settings import EvalSettings
from roentgen.contract import execution_order, split_key
from roentgen.runs import RunConfig
from roentgen.workflows.dataset_tables import Table

_NOT_ASKED = {"output", "base_url", "ray_address", "verbose", "new", "dry_run", "store", "parallel", "extractor"}
"""Options that depend on the machine of the run, or that the card states elsewhere."""


def write_card(
    title: str, config: RunConfig, summary: Mapping[str, Any], stored: Mapping[str, Any] | None, tables: Sequence[Table],
    command: str,
) -> str:  # fmt: skip
    """Return the card's text.

    Args:
        title: of the data set.
        config: the run's.
        summary: the run's numbers.
        stored: what all its rollouts were stored as (a `CaptureSpec`'s fields); None if there are none.
        tables: what was written.
        command: what wrote it.
    """
    keys = [table.name for table in tables[2:]]
    front = {
        "pretty_name": title,
        "tags": ["activations", "interpretability", "evaluation", "roentgen"],
        "size_categories": [_size(max(table.rows for table in tables))],
        "configs": [
            {
                "config_name": table.name,
                "data_files": [{"split": "train", "path": f"{table.name}/*.parquet"}],
                **({"default": True} if table.name == "samples" else {}),
            }
            for table in tables
        ],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {title}",
        _abstract(config, summary, keys),
        "## Loading",
        _loading(keys),
        "## Tables",
        _tables(tables),
        "## How it was made",
        _facts(config, summary, stored, tables, command),
        "The configuration that decides what the model did, of which the configuration's hash is a hash:",
        f"```json\n{json.dumps(config.hashed, indent=2, ensure_ascii=False)}\n```",
        "The prompt:",
        f"```json\n{json.dumps(config.prompt, indent=2, ensure_ascii=False)}\n```",
        "No license is set here: it is that of the problems, and of the model's outputs. Add `license: …` at the top.",
    ]
    return "\n\n".join(parts) + "\n"


def evaluation_command(config: RunConfig) -> str:
    """Return the command that reproduces a run: its non-default options, with files by name."""
    words = ["roentgen", "eval"]
    for name, field in EvalSettings.model_fields.items():
        value = config.settings.get(name)
        default = field.get_default(call_default_factory=True)
        default = list(default) if isinstance(default, tuple) else default
        if name in _NOT_ASKED or value is None or value == default:
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            pairs = [f"{key}={one}" for key, one in value.items()] if isinstance(value, dict) else value
            spelled = ",".join(map(str, pairs)) if isinstance(pairs, list) else str(pairs)
            words += [flag, PurePath(spelled).name if spelled.startswith("/") else spelled]
    return shlex.join(words)


def _abstract(config: RunConfig, summary: Mapping[str, Any], keys: Sequence[str]) -> str:
    kept = f", and {_hook_points(keys)}, for every token that was kept" if keys else "; no activations were kept"
    return (
        f"{summary['samples']:,} samples of `{config.hashed['model']}` on {summary['scored_problems']:,} problems of "
        f"`{PurePath(str(config.problems['source'])).name}`, made with Roentgen: prompts, answers, "
        f"the verdict of every extractor{kept}."
    )


def _hook_points(keys: Sequence[str]) -> str:
    layers: dict[str, list[int]] = {}
    for key in sorted(keys, key=execution_order):
        hook_point, layer = split_key(key)
        layers.setdefault(hook_point, []).extend([] if layer is None else [layer])
    return "; ".join(
        f"`{name}`" + (f" at layers {', '.join(map(str, own))}" if own else "") for name, own in layers.items()
    )


def _loading(keys: Sequence[str]) -> str:
    lines = [
        "from datasets import load_dataset",
        "",
        'where = "…"  # this repository (user/name), or the folder',
        'samples = load_dataset(where, "samples", split="train")    # a row per sample',
    ]
    if keys:
        key = keys[len(keys) // 2]
        lines += [
            'rollouts = load_dataset(where, "rollouts", split="train")  # text, tokens, labels; joined by sample_id',
            f'rows = load_dataset(where, "{key}", split="train").with_format("numpy")  # a row per token',
            'X, y = rows["values"][:], rows["correct"][:]               # [tokens, d], and whether the answer was right',
        ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _tables(tables: Sequence[Table]) -> str:
    lines = ["| configuration | a row is | rows | bytes |", "| --- | --- | ---: | ---: |"]
    for number, table in enumerate(tables):
        what = (
            ("a sample", "a rollout: one turn of a sample")[number]
            if number < 2
            else f"a token, `values` [{table.width}]"
        )
        lines.append(f"| `{table.name}` | {what} | {table.rows:,} | {table.nbytes:,} |")
    text = "\n".join(lines)
    if len(tables) > 2:
        text += (
            "\n\n`values` are float32, and exactly what was stored. `position` counts a sequence's tokens from 0 (−1: a mean "
            "over several), `generated` tells the completion's from the prompt's. The row of a token is the model's state "
            "where that token was fed; the last sampled token was never fed and has no row. `labels` and `messages` are JSON. "
            "`verdict` is correct, wrong or no_answer, by the primary extractor; `samples` has a column for each."
        )
    return text


def _facts(
    config: RunConfig,
    summary: Mapping[str, Any],
    stored: Mapping[str, Any] | None,
    tables: Sequence[Table],
    command: str,
) -> str:
    accuracy = summary["accuracy"]
    share = "none" if accuracy["value"] is None else f"{accuracy['value']:.4f}"
    if accuracy.get("low") is not None:
        share += f" (95%: {accuracy['low']:.4f} to {accuracy['high']:.4f})"
    prompt = config.hashed.get("prompt") or {}
    facts = {
        "model": f"`{config.hashed['model']}`",
        "revision": f"`{config.hashed.get('revision')}`",
        "computed in": config.hashed.get("dtype"),
        "problems": f"`{PurePath(str(config.problems['source'])).name}`, {config.problems['samples']:,} × "
        f"{config.problems.get('epochs', 1)}, hash `{config.problems.get('hash')}`",
        "prompt": f"`{prompt.get('name')}`, hash `{prompt.get('hash')}`",
        "configuration's hash": f"`{config.config_hash}`",
        "samples": f"{summary['samples']:,}, and {summary['errors']:,} that failed",
        "accuracy": f"{share}, read by `{summary['extractor']}`",
    }
    if (quantization := config.hashed.get("quantization")) is not None:
        facts["computed in"] = f"{facts['computed in']}, weights quantized with {quantization}"
    if stored is not None:
        facts |= {
            "hook points": _hook_points([table.name for table in tables[2:]]),
            "positions": stored["positions"],
            "stored as": stored["dtype"],
            "rollouts": f"{tables[1].rows:,}",
            "rows per key": f"{max((table.rows for table in tables[2:]), default=0):,}",
        }
    facts |= {
        "bytes": f"{sum(table.nbytes for table in tables):,}",
        "made": config.created,
        "versions": ", ".join(f"{name} {number}" for name, number in config.versions.items()),
        "evaluated by": f"`{evaluation_command(config)}`",
        "exported by": f"`{command}`",
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.items() if value)])


def _size(rows: int) -> str:
    """Return the hub's class of a number of rows, such as "10K<n<100K"."""
    names = ("1K", "10K", "100K", "1M", "10M", "100M", "1B")
    reached = sum(rows >= 1_000 * 10**power for power in range(len(names)))
    if not reached:
        return f"n<{names[0]}"
    return f"n>{names[-1]}" if reached == len(names) else f"{names[reached - 1]}<n<{names[reached]}"
