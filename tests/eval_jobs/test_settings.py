"""Settings: parsing, and rejection with messages that name the option."""

from pathlib import Path
from typing import Any

import pytest

from eval_jobs.settings import EvalSettings, SettingsError, check_settings


def test_the_defaults_are_the_seeds() -> None:
    settings = EvalSettings()
    assert (settings.samples, settings.parallel, settings.layers) == (3, 1, (8, 12, 16))
    assert settings.hook_points == ("input_layernorm.output", "post_attention_layernorm.output")


def test_what_the_command_line_spells_is_read() -> None:
    settings = check_settings(
        layers="0,-1", hook_points="resid_pre, resid_post", output="out", base_url="http://h:1/v1/"
    )
    assert settings.layers == (0, -1)
    assert settings.hook_points == ("resid_pre", "resid_post")
    assert settings.output == Path.cwd() / "out"
    assert settings.base_url == "http://h:1/v1"
    assert check_settings(layers="all").layers == "all"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples": 0}, "--samples: input should be greater than or equal to 1 (given: 0)"),
        ({"parallel": -1}, "--parallel: -1 is not allowed; allowed are whole numbers from 1, and auto"),
        ({"parallel": "many"}, "--parallel: 'many' is not allowed; allowed are whole numbers from 1, and auto"),
        ({"mode": "tools"}, "--mode: input should be 'no-tools' or 'with-tools' (given: 'tools')"),
        ({"sample_ids": "1,,2"}, "--sample-ids: '1,,2' contains an empty name"),
        ({"sample_ids": "1", "offset": 2}, "--sample-ids selects the problems"),
        ({"max_tokens": 0}, "--max-tokens: input should be greater than or equal to 1 (given: 0)"),
        ({"temperature": 3.0}, "--temperature: input should be less than or equal to 2 (given: 3.0)"),
        ({"top_p": 0.0}, "--top-p: input should be greater than 0 (given: 0.0)"),
        ({"layers": "eight"}, "--layers: 'eight' is not a list of layers; allowed are 8,12,16 and the like, or all"),
        ({"layers": ""}, "--layers: '' is not a list of layers; allowed are 8,12,16 and the like, or all"),
        ({"hook_points": "a,,b"}, "--hook-points: 'a,,b' contains an empty name"),
        ({"positions": "some"}, "--positions: 'some' is not a position policy; allowed are all, prompt"),
        ({"prompt": "poem"}, "--prompt: 'poem' is unknown; allowed are answer-line"),
        ({"extractor": "luck"}, "--extractor: 'luck' is unknown; allowed are answer, answer_line"),
        ({"base_url": "localhost:8000"}, "--base-url: 'localhost:8000' is not the address of a server"),
        ({"ray_address": "auto"}, "--ray-address: 'auto' uses any Ray that it finds"),
        ({"ray_address": "head"}, "--ray-address: 'head' is not an address of Ray; allowed are local and HOST:PORT"),
        ({"output": "out", "new": True}, "--new creates a folder"),
    ],
)
def test_a_bad_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        check_settings(**values)
    assert str(caught.value).startswith(message)


def test_every_bad_value_is_named() -> None:
    with pytest.raises(SettingsError) as caught:
        check_settings(samples=0, seed=-1)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["--samples", "--seed"]
