"""Rows stored as int8 are read within half a quantization step, and all operations of the store support them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn
from safetensors.torch import load_file

from roentgen.store import CapturedRollout, CaptureSpec, NonFiniteRowsError, Session, StoreError, StoreWriter, verify
from roentgen.store.exports import export_pt
from roentgen.store.merging import compact
from roentgen.store.quantization import dequantize, quantize
from roentgen.store.schema import check_version
from tests.roentgen.store.conftest import KEYS, RolloutFactory

SHAPES = hn.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=6)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(deadline=None)
@given(hn.arrays(np.float32, SHAPES, elements=FLOATS))
def test_values_are_off_by_half_a_step_at_most(values: np.ndarray) -> None:
    rows = torch.from_numpy(values.copy())
    codes, scales = quantize(rows)
    assert (codes.dtype, scales.dtype, codes.shape) == (torch.int8, torch.float32, rows.shape)
    largest = rows.double().abs().flatten(1).amax(1)
    off = (dequantize(codes, scales).double() - rows.double()).abs().flatten(1).amax(1)
    assert (off <= largest / 254 * (1 + 1e-5) + 1e-42).all()  # float32 has no smaller steps than 1e-45
    again, _ = quantize(dequantize(codes, scales))
    assert torch.equal(again[largest > 1e-30], codes[largest > 1e-30])
    assert int(codes.abs().max()) <= 127


@settings(deadline=None)
@given(hn.arrays(np.float32, (4, 5), elements=st.floats(width=32)))
def test_a_row_that_is_not_finite_is_nan_and_others_are_not(values: np.ndarray) -> None:
    rows = torch.from_numpy(values.copy())
    back = dequantize(*quantize(rows))
    finite = rows.isfinite().all(1)
    assert torch.equal(back.isfinite().all(1), finite)
    assert back[~finite].isnan().all()


def quantized(rollout: CapturedRollout) -> CapturedRollout:
    spec = rollout.spec.model_copy(update={"dtype": "torch.int8"})
    fields = {name: getattr(rollout, name) for name in CapturedRollout.__dataclass_fields__}
    return CapturedRollout(**{**fields, "spec": spec})


def read_back(rollout: CapturedRollout, key: str) -> torch.Tensor:
    return dequantize(*quantize(rollout.tensors[key]))


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=6), together=st.booleans()
)
def test_a_store_of_int8_rows(
    lengths: list[tuple[int, int]], together: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store, make = tmp_path_factory.mktemp("s"), RolloutFactory()
    made = [quantized(make(*length)) for length in lengths]
    with StoreWriter(store, max_wait_s=60 if together else 0, merge_shards=0) as writer:
        for one in made:
            writer.submit(one)

    def check() -> None:
        session = Session.open(store / "s")
        assert verify(session).ok
        for key in KEYS:
            found = {item.rollout_id: item for item in session.activations(key)}
            for one in made:
                item = found[one.rollout_id]
                assert item.values.dtype == torch.float32
                assert torch.equal(item.values, read_back(one, key))
            frame = (
                session.rollouts(columns=()).set_index("rollout_id", drop=False).loc[[one.rollout_id for one in made]]
            )
            last = session.activations(key, where=frame, positions="last_prompt").stack()
            assert torch.equal(last, torch.stack([read_back(one, key)[one.sequence.n_prompt - 1] for one in made]))
            batches = list(session.activations(key, where=frame).batches(5, seed=1))
            values = torch.cat([batch.values for batch in batches])
            order = np.lexsort(
                [np.concatenate([b.position for b in batches]), np.concatenate([b.rollout for b in batches])]
            )
            assert torch.equal(values[torch.from_numpy(order)], torch.cat([read_back(one, key) for one in made]))

    check()
    compact(Session.open(store / "s"))
    check()


def test_the_files_are_as_documented(tmp_path: Path, rollout: RolloutFactory) -> None:
    one = quantized(rollout(4, 3, d=16))
    with StoreWriter(tmp_path) as writer:
        receipt = writer.submit(one).result()
    path = tmp_path / "s" / receipt.shard
    tensors = load_file(path)
    for key in KEYS:
        codes, scales = tensors[key], tensors[f"{key}.scale"]
        assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (torch.int8, (6, 16), torch.float32, (6,))
        assert torch.equal(codes.float() * scales[:, None], read_back(one, key))
    length = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    assert metadata["roentgen_schema"] == "2"  # so that a reader that does not know of scales refuses it
    assert CaptureSpec.model_validate_json(metadata["spec"]).dtype == "torch.int8"
    assert Session.open(tmp_path / "s").keys() == list(KEYS)
    with pytest.raises(StoreError, match="reads up to 1"):
        check_version("2", "an index")


def test_other_shapes_and_loose_files(tmp_path: Path, rollout: RolloutFactory) -> None:
    one = quantized(rollout(3, 2, keys=("layers.0.attn.output",)))
    one.tensors["layers.0.attn.output"] = torch.randn(4, 2, 5).bfloat16()
    with StoreWriter(tmp_path) as writer:
        writer.submit(one).result()
    session = Session.open(tmp_path / "s")
    (item,) = session.activations("layers.0.attn.output")
    assert torch.equal(item.values, read_back(one, "layers.0.attn.output"))
    export_pt(session, tmp_path / "pt")
    (file,) = (tmp_path / "pt").iterdir()
    assert torch.equal(torch.load(file, weights_only=True)[0], item.values)


def test_what_is_not_finite_is_refused_or_counted(tmp_path: Path, rollout: RolloutFactory) -> None:
    one = quantized(rollout(3, 2))
    one.tensors[KEYS[0]][1, 2] = torch.inf
    strict = CapturedRollout(
        **{**{n: getattr(one, n) for n in CapturedRollout.__dataclass_fields__}, "require_finite": True}
    )
    with StoreWriter(tmp_path) as writer:
        with pytest.raises(NonFiniteRowsError):
            writer.submit(strict).result()
        writer.submit(one).result()
    session = Session.open(tmp_path / "s")
    assert session.rollouts()["non_finite_rows"].tolist() == [1]
    (item,) = session.activations(KEYS[0])
    assert item.values.isnan().all(1).tolist() == [False, True, False, False]


def test_damage_of_a_scale_is_found(tmp_path: Path, rollout: RolloutFactory) -> None:
    one = quantized(rollout(4, 3))
    with StoreWriter(tmp_path) as writer:
        receipt = writer.submit(one).result()
    path = tmp_path / "s" / receipt.shard
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    content[8 + length + header[f"{KEYS[1]}.scale"]["data_offsets"][0]] ^= 1
    path.write_bytes(content)
    (damage,) = verify(Session.open(tmp_path / "s")).damage
    assert damage.rollout_id == one.rollout_id
