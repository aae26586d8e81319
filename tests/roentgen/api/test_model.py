"""A model in this process: what it gives is what plain transformers and PyTorch hooks give, and nothing of it stays behind."""

import _thread
import gc
import signal
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
import transformers as tr

import roentgen
from roentgen.linear_probe import ProbeCard, SavedProbe, save_probes
from roentgen.store import NonFiniteRowsError
from serve_app.engines.protocol import EngineStoppedError
from tests.serve_app.engines.subjects import save_tiny

CHAT = [{"role": "user", "content": "hi <b>"}]


def hooked(module: tr.PreTrainedModel, fed: list[int], layer: int, add: torch.Tensor | None = None) -> torch.Tensor:
    """What leaves a layer for every token, by a hook of PyTorch's own; a vector may be added there."""
    seen = []

    def hook(part: Any, args: Any, output: Any) -> Any:
        rows = output[0] if isinstance(output, tuple) else output
        if add is not None:
            rows = rows + add
        seen.append(rows[0])
        return (rows, *output[1:]) if isinstance(output, tuple) else rows

    handle = module.model.layers[layer].register_forward_hook(hook)
    with torch.no_grad():
        module(input_ids=torch.tensor([fed]), use_cache=False)
    handle.remove()
    return seen[0]


def test_a_trace_of_one_s_own_sees_what_a_capture_keeps(model: roentgen.Model, reference: tr.PreTrainedModel) -> None:
    text = "to be or"
    with model.nnsight.trace(text):
        seen = nnsight.save(model.nnsight.model.layers[1].output)
    rows = seen[0] if isinstance(seen, tuple) else seen
    expected = hooked(reference, model.tokenizer(text).input_ids, 1)
    torch.testing.assert_close(rows.squeeze(0), expected, rtol=1e-4, atol=1e-5)
    with model.nnsight.trace(text):  # and may change it, for this trace only
        model.nnsight.model.layers[0].output[:] = 0
        changed = nnsight.save(model.nnsight.lm_head.output)
    with model.nnsight.trace(text):
        logits = nnsight.save(model.nnsight.lm_head.output)
    assert not torch.allclose(changed, logits)
    assert model.nnsight is model.nnsight
    (again,) = model.generate(text, max_tokens=4, capture={"layers": [1], "hook_points": ["resid_post"]})
    torch.testing.assert_close(again["layers.1.resid_post"][: len(expected)], expected, rtol=1e-4, atol=1e-5)


def saved_probe(model: roentgen.Model, **changed: Any) -> SavedProbe:
    torch.manual_seed(1)
    width = model.structure.d_model
    card: dict[str, Any] = {
        "model": model.name, "revision": model.revision, "key": "layers.1.resid_post", "positions": "last_prompt",
        "kind": "logistic", "label": "correct", "target": "binary", "strength": 1.0, "folds": 2, "metrics": {},
        "data_hash": "0", "seed": 0, "roentgen": "0",
    }  # fmt: skip
    parts = torch.randn(1, width), torch.randn(1), torch.randn(width), torch.rand(width) + 0.5
    return SavedProbe(*parts, ProbeCard(**{**card, **changed}))


def test_rows_are_those_of_plain_hooks(model: roentgen.Model, reference: tr.PreTrainedModel) -> None:
    prompts: list[Any] = ["to be or", CHAT, "x"]
    capture = {"layers": [0, -1], "hook_points": ["resid_post"]}
    outs = model.generate(prompts, max_tokens=6, n=2, temperature=1, seed=3, capture=capture)
    assert [out.prompt for out in outs] == ["to be or", "to be or", CHAT, CHAT, "x", "x"]
    assert outs[0].token_ids != outs[1].token_ids
    assert outs[2].sequence.text.startswith("[user]hi <b>[reply]")
    for out in outs:
        fed = out.prompt_ids + out.token_ids[:-1]
        assert len(out.tokens) == len(fed) == len(out.positions)
        assert "".join(out.tokens) == out.sequence.text[: out.sequence.token_offsets[len(fed)]]
        assert out.keys() == ["layers.0.resid_post", "layers.2.resid_post"]
        for layer in (0, 2):
            torch.testing.assert_close(
                out[f"layers.{layer}.resid_post"], hooked(reference, fed, layer), rtol=1e-4, atol=1e-4
            )
        with torch.inference_mode():
            logits = reference(input_ids=torch.tensor([fed])).logits[0].log_softmax(-1)
        own = [logits[len(out.prompt_ids) - 1 + i, token].item() for i, token in enumerate(out.token_ids)]
        assert out.logprobs == pytest.approx(own, abs=1e-4)


def test_one_prompt_without_capture(model: roentgen.Model, reference: tr.PreTrainedModel) -> None:
    (out,) = model.generate("abc", max_tokens=5)
    ids = torch.tensor([out.prompt_ids])
    expected = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
    assert out.prompt_ids + out.token_ids == expected[0].tolist()
    assert out.prompt_ids == model.tokenizer("abc")["input_ids"]
    assert (out.keys(), out.positions, out.scores) == ([], [], {})
    (read,) = model.generate(
        "abc", max_tokens=0, capture={"layers": 1, "hook_points": "resid_post", "positions": "last"}
    )
    assert (read.tokens, read.token_ids, read.positions) == (["a", "b", "c"], [], [2])
    assert read["layers.1.resid_post"].shape == (1, model.structure.d_model)
    with pytest.raises(
        KeyError, match=r"'layers.1.resid_pst' was not captured; captured: layers.1.resid_post; did you mean"
    ):
        read["layers.1.resid_pst"]


def test_many_prompts_are_more_than_the_queue_holds(folder: Path, reference: tr.PreTrainedModel) -> None:
    with roentgen.load(str(folder), dtype="float32", device="cpu", max_batch=2, max_queue=1) as model:
        outs = model.generate([f"{number}" for number in range(12)], max_tokens=2)
    assert [out.prompt for out in outs] == [f"{number}" for number in range(12)]


def test_probes_score_every_token(model: roentgen.Model, tmp_path: Path) -> None:
    probe = saved_probe(model)
    save_probes(tmp_path, [probe])
    path = tmp_path / "layers.1.resid_post@last_prompt"
    capture = {"layers": [1], "hook_points": ["resid_post"]}
    (out,) = model.generate([CHAT], max_tokens=4, capture=capture, probes={"own": probe, "saved": str(path)})
    expected = probe.scores(out["layers.1.resid_post"])[:, 0]
    torch.testing.assert_close(out.scores["own"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.scores["saved"], out.scores["own"])
    page = out._repr_html_()
    assert "hi" in page
    assert "&lt;" in page
    assert "<b>" not in page
    assert page.count("<span") == len(out.tokens)
    sink = out.scores["own"].clone()
    sink[0] = 1e6
    assert replace(out, scores={"own": sink}).html().count(", 1.0)") > 1  # one row does not leave the others pale
    with pytest.raises(KeyError, match="'other' did not score this rollout; scores: own, saved"):
        out.html("other")


@pytest.mark.parametrize("kind", ["vector", "probe"])
def test_steering_adds_what_a_hook_adds(model: roentgen.Model, reference: tr.PreTrainedModel, kind: str) -> None:
    probe = saved_probe(model)
    direction: Any = probe.direction[0] if kind == "vector" else probe
    steer = roentgen.Steer(direction, layer=1, scale=4, hook_point="resid_post")
    capture = {"layers": "all", "hook_points": ["resid_post"]}
    (out,) = model.generate(["abc"], max_tokens=6, capture=capture, steering=[steer])
    fed = out.prompt_ids + out.token_ids[:-1]
    expected = hooked(reference, fed, 1, add=4 * probe.direction[0])
    torch.testing.assert_close(out["layers.1.resid_post"], expected, rtol=1e-4, atol=1e-4)
    assert out.token_ids != model.generate("abc", max_tokens=6)[0].token_ids


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"capture": {"layers": [9]}}, r'capture.layers: 9 is out of range; .* has layers 0–2 \(or "all"\)'),
        (
            {"capture": {"layers": [0], "hook_points": ["resid_pos"]}},
            "capture.hook_points: 'resid_pos' is not a hook point",
        ),
        (
            {"capture": {"session_id": "s"}},
            "capture.session_id: unknown field; allowed are layers, hook_points, positions",
        ),
        ({"capture": {"positions": "first"}}, "capture.positions: 'first' is not a position policy; allowed are all"),
        ({"temperature": 3}, r"temperature: Input should be less than or equal to 2 \(given: '3'\)"),
        ({"tempreature": 1}, "tempreature is unknown or not supported here"),
        ({"stream": True}, "stream: not allowed here; generate sets it itself"),
        ({"max_tokens": 450}, r"prompts\[1\]: This model's maximum context length is 512 tokens"),
        (
            {"steering": [roentgen.Steer([1.0, 2.0], layer=1)]},
            r"steering\[0\].vector: has width 2; layers.1.resid_post",
        ),
        ({"steering": [roentgen.Steer([1.0])]}, r"steering\[0\].layer: required"),
        (
            {"steering": [roentgen.Steer([1.0], layer=1, positions="last")]},
            r"steering\[0\].positions: 'last' is not known",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(model: roentgen.Model, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(roentgen.RequestError, match=said):
        model.generate([CHAT, "b" * 100], **{"max_tokens": 2, **asked})


def test_a_probe_of_another_model_is_refused(model: roentgen.Model) -> None:
    other = saved_probe(model, revision="another")
    with pytest.raises(
        roentgen.RequestError, match=r"steering\[0\]: .* belongs to revision 'another'; this server has"
    ):
        model.generate("a", steering=[roentgen.Steer(other, scale=1)])
    with pytest.raises(ValueError, match=r"probes\[1\]: another is called layers.1.resid_post@last_prompt too"):
        model.generate("a", probes=[saved_probe(model), saved_probe(model)])


@pytest.mark.parametrize(
    ("prompts", "asked", "said"),
    [
        ("a", {"probes": [3]}, r"probes\[0\]: 3 \(int\) is no probe; allowed are a SavedProbe"),
        (["a", 3], {}, r"prompts\[1\]: 3 \(int\) is not a prompt; allowed are a text, and a conversation"),
        (None, {}, r"prompts: None \(NoneType\) is not a prompt; allowed are a text, and a conversation"),
        (b"a", {}, r"prompts: b'a' \(bytes\) is not a prompt"),
        ("a", {"steering": [[1.0]]}, r"steering\[0\]: \[1.0\] \(list\) is not a roentgen.Steer"),
    ],
)
def test_what_is_of_another_kind_is_a_type_error(
    model: roentgen.Model, prompts: Any, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(TypeError, match=said):
        model.generate(prompts, **asked)


def test_one_vector_and_one_probe_need_no_list(model: roentgen.Model, tmp_path: Path) -> None:
    probe = saved_probe(model)
    save_probes(tmp_path, [probe])
    steer, path = roentgen.Steer(probe, scale=4), str(tmp_path / probe.card.name)
    (several,) = model.generate("a", max_tokens=3, steering=[steer], probes=[probe])
    for one in (probe, path):
        (out,) = model.generate("a", max_tokens=3, steering=steer, probes=one)
        assert (out.token_ids, list(out.scores)) == (several.token_ids, [probe.card.name])


def test_rows_that_are_not_finite_are_refused_unless_they_are_allowed(tmp_path: Path) -> None:
    broken = save_tiny(tmp_path / "broken")
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("inf")
    broken.save_pretrained(tmp_path / "broken")
    capture = {"layers": [2], "hook_points": ["resid_post"]}
    with roentgen.load(str(tmp_path / "broken"), dtype="float32", device="cpu") as model:
        with pytest.raises(NonFiniteRowsError, match=r"rows contain NaN or infinity, first layers.2.resid_post"):
            model.generate("abc", max_tokens=0, capture=capture)
        (out,) = model.generate("abc", max_tokens=0, capture={**capture, "allow_non_finite": True})
        assert not out["layers.2.resid_post"].isfinite().all()


def engines() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "engine"]


def test_a_model_that_nobody_has_is_freed(folder: Path, reference: tr.PreTrainedModel) -> None:
    before = len(engines())
    model = roentgen.load(str(folder), dtype="float32", device="cpu")
    weights = weakref.ref(model.nnsight._module)
    assert len(engines()) == before + 1
    del model
    gc.collect()
    assert len(engines()) == before
    assert weights() is None


def test_a_closed_model_says_so(folder: Path, reference: tr.PreTrainedModel) -> None:
    model = roentgen.load(str(folder), dtype="float32", device="cpu")
    model.close()
    model.close()
    assert repr(model) == "Model(closed)"
    with pytest.raises(EngineStoppedError, match="the model is closed; load it again"):
        model.generate("a")


def test_ctrl_c_leaves_nothing_running(model: roentgen.Model) -> None:
    engine = model._held.engine
    assert engine is not None

    watching = threading.Event()

    def interrupt() -> None:
        watching.set()
        deadline = time.monotonic() + 30
        while not engine.load.running and time.monotonic() < deadline:
            time.sleep(0.002)
        _thread.interrupt_main()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    threading.Thread(target=interrupt).start()
    try:
        assert watching.wait(30)
        with pytest.raises(KeyboardInterrupt):
            model.generate(["a", "b"] * 400, max_tokens=400, ignore_eos=True)  # enough to be running when Ctrl-C comes
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 30
    while (engine.load.running or engine.load.waiting) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (engine.load.running, engine.load.waiting) == (0, 0)
    assert model.generate("a", max_tokens=1)[0].finish_reason == "length"


def test_what_is_not_there_cannot_be_loaded() -> None:
    with pytest.raises(
        roentgen.RequestError, match="dtype: Input should be 'auto', 'float32', 'float16' or 'bfloat16'"
    ):
        roentgen.load("smollm2-135m", dtype="fp8")
    with pytest.raises(roentgen.RequestError, match="taps: unknown option; allowed are batch_invariant, max_batch"):
        roentgen.load("smollm2-135m", taps=())
    with pytest.raises(roentgen.RequestError, match="/nowhere"):
        roentgen.load(Path("/nowhere"))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "is not a valid JSON file"),
        ("[1]", "Unrecognized model"),
        ('{"model_type": "unheard-of"}', "model type `unheard-of` but Transformers does not recognize"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "'hidden_size' expected int, got str"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_line(tmp_path: Path, config: str, said: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(roentgen.RequestError, match=said) as told:
        roentgen.load(tmp_path, device="cpu")
    assert str(told.value).startswith(f"model {tmp_path.name!r}: its config.json cannot be used: ")
    assert "\n" not in str(told.value)


def test_a_script_may_change_the_weights(folder: Path, reference: object) -> None:
    """A change in place through `.data` is counted nowhere, and the prompt's first tokens have been read before it."""
    capture = {"layers": [1], "hook_points": ["resid_post"]}
    prompt = "one two three " * 8  # some blocks of the prefix cache
    with roentgen.load(str(folder), dtype="float32", device="cpu") as model:
        (before,) = model.generate(prompt, max_tokens=4, capture=capture)
        module = model.nnsight._module
        module.model.layers[0].mlp.down_proj.weight.data.mul_(-50)
        (after,) = model.generate(prompt, max_tokens=4, capture=capture)
        expected = hooked(module, [*after.prompt_ids, *after.token_ids[:-1]], 1)
    torch.testing.assert_close(after["layers.1.resid_post"], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after["layers.1.resid_post"][:32], before["layers.1.resid_post"][:32], atol=1e-2)
