"""The file of a packed tensor, and what is refused."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch

from llmfp4_kernels import packed as packed_module
from llmfp4_kernels.errors import BadFile, BadInput
from llmfp4_kernels.formats import E2M1, E4M3, E4M3FN, E8M0, Dynamic
from llmfp4_kernels.packed import PackedFP4, pack, unpack


def w4a4(n=3, k=7) -> PackedFP4:
    codes = torch.arange(n * k, dtype=torch.uint8).view(n, k) % 16
    shift = torch.arange(k, dtype=torch.uint8) % 4
    return PackedFP4(pack(codes), torch.rand(n) + 1, k, E2M1, activation=E2M1, x_scale=torch.tensor(0.5), shift=shift)


def grouped(n=2, k=40) -> PackedFP4:
    codes = torch.randint(0, 256, (n, k // 2)).to(torch.uint8)
    groups = torch.full((n, 2), 127, dtype=torch.uint8)
    return PackedFP4(codes, torch.ones(n), k, E2M1, group_scale=groups, scale=E8M0, group_size=32, recipe="mxfp4")


def fp8(n=3, k=8) -> PackedFP4:
    codes = torch.zeros(n, k // 2, dtype=torch.uint8)
    return PackedFP4(codes, torch.ones(n), k, E2M1, activation=E4M3FN, dynamic=Dynamic())


@pytest.mark.parametrize("k", [1, 2, 7, 16])
def test_pack_layout(k):
    codes = torch.randint(0, 16, (3, k)).to(torch.uint8)
    packed = pack(codes)
    assert packed.shape == (3, (k + 1) // 2)
    assert torch.equal(unpack(packed, k), codes)
    assert packed[0, 0] % 16 == codes[0, 0], "even k belongs in the low nibble"
    if k % 2:
        assert (packed[:, -1] >> 4 == 0).all()


@pytest.mark.parametrize("make", [w4a4, grouped, fp8])
def test_save_and_load(make, tmp_path):
    before = make()
    before.save(tmp_path / "deep" / "w.safetensors")
    after = PackedFP4.load(tmp_path / "deep" / "w.safetensors")
    assert after.spec() == before.spec()
    assert set(after.tensors) == set(before.tensors)
    assert all(torch.equal(after.tensors[name], t) for name, t in before.tensors.items())
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["w.safetensors"]


def test_bits_per_weight():
    assert grouped(n=8, k=64).bits_per_weight == 4 + 8 / 32 + 32 / 64


def test_missing_file(tmp_path):
    with pytest.raises(BadFile, match="there is no file"):
        PackedFP4.load(tmp_path / "absent")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "w"
    w4a4().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadFile, match="bytes"):
        PackedFP4.load(path)


def test_foreign_files(tmp_path):
    (tmp_path / "text").write_text("hello, this is no tensor at all")
    with pytest.raises(BadFile):
        PackedFP4.load(tmp_path / "text")
    safetensors.torch.save_file({"weight": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(BadFile, match="not of format 'llmfp4'"):
        PackedFP4.load(tmp_path / "other")


def save_as(path, spec: str, tensors: dict) -> None:
    packed_module.write_safetensors(path, tensors, {"format": "pt", "llmfp4": spec})


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"version": 2, "k": 7, "element": "e2m1"}, "version 2"),
        ({"k": 7, "element": "e2m1"}, "not of format"),
        ({"version": 1, "k": 7, "element": "nf4"}, "nf4"),
        ({"version": 1, "element": "e2m1"}, "'k'"),
        ({"version": 1, "k": 9, "element": "e2m1"}, r"\[3, 5\]"),
    ],
)
def test_wrong_metadata(tmp_path, spec, says):
    tensors = {name: t for name, t in w4a4().tensors.items() if name in ("codes", "row_scale")}
    save_as(tmp_path / "good", json.dumps({"version": 1, "k": 7, "element": "e2m1"}), tensors)
    assert PackedFP4.load(tmp_path / "good").shape == (3, 7)
    save_as(tmp_path / "bad", json.dumps(spec), tensors)
    with pytest.raises(BadFile, match=says):
        PackedFP4.load(tmp_path / "bad")


def test_metadata_that_is_no_json(tmp_path):
    save_as(tmp_path / "w", "not json", w4a4().tensors)
    with pytest.raises(BadFile, match="not json"):
        PackedFP4.load(tmp_path / "w")


def test_unknown_tensor_in_file(tmp_path):
    packed = w4a4()
    spec = json.dumps({"version": 1} | packed.spec())
    save_as(tmp_path / "w", spec, packed.tensors | {"zero": torch.ones(1)})
    with pytest.raises(BadFile, match="zero"):
        PackedFP4.load(tmp_path / "w")


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w"
    old = w4a4()
    old.save(path)

    def fail(tensors, beside, metadata):
        with open(beside, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        grouped().save(path)
    assert torch.equal(PackedFP4.load(path).codes, old.codes)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"k": 9}, "codes"),
        ({"codes": torch.zeros(3, 4)}, "codes"),
        ({"row_scale": torch.ones(2)}, "codes"),
        ({"row_scale": torch.ones(3).double()}, "row_scale"),
        ({"row_scale": torch.tensor([1.0, float("nan"), float("inf")])}, "2 values"),
        ({"x_scale": None}, "belong together"),
        ({"x_scale": torch.tensor(0.0)}, "positive"),
        ({"shift": torch.zeros(6, dtype=torch.uint8)}, "shift"),
        ({"shift": torch.full((7,), 4, dtype=torch.uint8)}, "limit here is 3"),
        ({"group_size": 32}, "belong together"),
        ({"group_scale": torch.zeros(3, 2, dtype=torch.uint8), "scale": E4M3, "group_size": 32}, "group_scale"),
    ],
)
def test_contradictions(change, says):
    with pytest.raises(BadInput, match=says):
        dataclasses.replace(w4a4(), **change)


@pytest.mark.parametrize(("scale", "byte"), [(E8M0, 255), (E4M3, 127), (E4M3, 255)])
def test_nan_scale_bytes(scale, byte):
    groups = torch.tensor([[127 - 7, byte], [1, 1]], dtype=torch.uint8)
    with pytest.raises(BadInput, match="1 bytes that mean NaN"):
        dataclasses.replace(grouped(), group_scale=groups, scale=scale)
