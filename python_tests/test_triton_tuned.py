"""The file of measured tiles: what it serves, and how one that does not hold here is left aside."""

import dataclasses
import json
import warnings

import pytest
import torch
from json_changes import change

from llmfp4_kernels import cli
from llmfp4_kernels.backends import cuda, measured, triton
from llmfp4_kernels.backends.triton import configs, machine, tuned
from llmfp4_kernels.backends.triton.form import Form
from llmfp4_kernels.errors import BadFile
from llmfp4_kernels.formats import E2M1, E4M3
from llmfp4_kernels.problem import Problem

WHY_NOT = machine.problem_with_triton()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
PROBLEM = Problem(16, 4096, 4096, E2M1, E2M1, device="cuda")
FORM = Form.of("gemv", PROBLEM)
TILE = configs.Config(rows=32, tokens=16, block_k=64, warps=2, stages=6, splits=8)
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """A machine with an sm_90 that was never seen, and an empty cache folder."""
    monkeypatch.setenv(measured.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(machine.here, "capability", lambda index=None: (9, 0), raising=False)
    monkeypatch.setattr(machine.here, "multiprocessors", lambda device: 132, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU (SXM)")
    measured.forget()
    yield
    measured.forget()


def row(m=16, form=FORM, config=TILE, **more):
    given = dict(seconds=1e-5, guess_seconds=2e-5, timed=3, candidates=4, commit="unknown", date="2000-01-01")
    return tuned.Row(form, m, config, **(given | more))


def guess(m=16):
    return configs.choose(FORM, m, (9, 0), machine.version(), 132)


def test_the_cache_folder(monkeypatch, tmp_path):
    assert measured.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv(measured.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measured.cache_folder() == tmp_path / "llmfp4_kernels"
    for nothing in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert measured.cache_folder() == tmp_path / "home" / ".cache" / "llmfp4_kernels"


def test_a_measured_tile_is_chosen_and_others_are_guessed():
    assert tuned.choose(FORM, 16, GPU) == tuned.Choice(
        guess(), f"guessed: there is no triton-*.json in {path().parent} or {measured.SHIPPED}"
    )
    assert tuned.put(row(), GPU) == path() and path().name == "triton-some-gpu-sxm-132.json"
    choice = tuned.choose(FORM, 16, GPU)
    assert choice.config == TILE and choice.source == "measured at m = 16, 2000-01-01, commit unknown"
    for changes in (dict(n=4097), dict(k=64), dict(scale=E4M3, group_size=16), dict(activation=None)):
        form = Form.of("gemv", dataclasses.replace(PROBLEM, **changes))
        assert tuned.choose(form, 16, GPU).source.startswith(
            f"guessed: {path()} has no measurement for it; there is no "
        )
    assert [entry.name for entry in path().parent.iterdir()] == [path().name]


def test_rows_of_one_form_and_m_replace_each_other():
    for config in (guess(), TILE):
        for m in (1, 16):
            tuned.put(row(m, config=config), GPU)
    content = json.loads(path().read_text())
    assert [(r["m"], r["config"]) for r in content["rows"]] == [(m, dataclasses.asdict(TILE)) for m in (1, 16)]
    assert content["conditions"]["gpu"] == "Some GPU (SXM)" and content["conditions"]["capability"] == "sm_90"


def test_which_tokens_a_measurement_serves():
    gemm = dataclasses.replace(FORM, kernel="gemm")
    rows = [row(1), row(16), row(64, gemm), row(256, gemm)]
    served = {m: {r.m for r in rows if r.form == (FORM if m <= 16 else gemm) and measured.serves(r.m, m)}
              for m in (1, 2, 16, 17, 64, 65, 256, 257)}  # fmt: skip
    assert served == {1: {1, 16}, 2: {16}, 16: {16}, 17: {64}, 64: {64}, 65: {256}, 256: {256}, 257: set()}
    tuned.put(row(16), GPU)
    tuned.put(row(1, config=guess()), GPU)
    assert tuned.choose(FORM, 1, GPU).config == guess() and tuned.choose(FORM, 2, GPU).config == TILE


def path():
    return measured.cache_folder() / tuned.KIND.file(tuned.Conditions.here(GPU))


def without(*keys):
    def changed(content):
        at = content
        for key in keys[:-1]:
            at = at[key]
        del at[keys[-1]]
        return json.dumps(content)

    return changed


BAD = [
    (lambda content: json.dumps(content)[:-40], r"bytes\) is not JSON"),
    (lambda content: "", r"\(0 bytes\) is not JSON"),
    (lambda content: "[1, 2]", "is not of format"),
    (change("format", value="gemlite"), "is not of format 'llmfp4 triton tiles', version 1"),
    (change("version", value=2), "version 1"),
    (change("conditions", "gpu", value="Other GPU"), "measured with gpu Other GPU, here it is Some GPU"),
    (change("conditions", "capability", value="sm_80"), "measured with capability sm_80, here it is sm_90"),
    (change("conditions", "multiprocessors", value=66), "measured with multiprocessors 66, here it is 132"),
    (change("conditions", "triton", value="3.5.1"), "measured with triton 3.5.1, here it is"),
    (change("conditions", "kernels", value="0" * 16), "measured with kernels 0000000000000000, here it is"),
    (without("conditions", "package"), "a conditions has the fields"),
    (without("rows"), "has no list of rows"),
    (change("rows", 0, value=7), "a row has the fields 7"),
    (without("rows", 0, "seconds"), "a row has the fields"),
    (change("rows", 0, "m", value="16"), "m is '16', expected int"),
    (change("rows", 0, "m", value=True), "m is True, expected int"),
    (change("rows", 0, "m", value=0), "is no product of these kernels"),
    (change("rows", 0, "form", "kernel", value="gemx"), "does not run: there is no kernel gemx of int8"),
    (change("rows", 0, "seconds", value=float("nan")), "says seconds = nan"),
    (change("rows", 0, "config", "warps", value=4), "does not run: 4 warps would multiply some of 32 rows"),
    (change("rows", 0, "config", "tokens", value=24), "does not run: tokens = 24 is none of"),
    (change("rows", 0, "config", "splits", value=1000), "does not run: splits = 1000 of k = 4096 are not 1"),
    (without("rows", 0, "config", "splits"), "a config has the fields"),
    (
        change("rows", 0, "config", value=dataclasses.asdict(configs.Config(256, 256, 256, 8, 8, 1))),
        "does not run: 131072 sums are 512 of each of 256 threads, which have 255 registers",
    ),
    (
        change("rows", 0, "config", value=dataclasses.asdict(configs.Config(256, 64, 256, 8, 4, 1))),
        "does not run: 4 stages take 245760 bytes of shared memory or more, sm_90 has 232448",
    ),
]


@pytest.mark.parametrize(("damage", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_a_file_that_does_not_hold_here_is_left_aside_with_a_warning(damage, sentence):
    tuned.put(row(), GPU)
    path().write_text(damage(json.loads(path().read_text())))
    measured.forget()
    with pytest.raises(BadFile, match=sentence):
        measured.read(tuned.KIND, path(), tuned.Conditions.here(GPU))
    with pytest.warns(UserWarning, match=f"measured tiles are not used: {path()}.*{sentence}.*'llmfp4 tune'"):
        choice = tuned.choose(FORM, 16, GPU)
    assert choice.config == guess() and choice.source.startswith(f"guessed: {path()}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert tuned.choose(FORM, 16, GPU) == choice
    tuned.put(row(), GPU)
    assert tuned.choose(FORM, 16, GPU).config == TILE


def test_a_tile_before_which_triton_forgets_a_fence_is_left_aside(monkeypatch):
    wide = dataclasses.replace(TILE, rows=64, warps=4)
    monkeypatch.setattr(machine, "version", lambda: (3, 9))
    monkeypatch.setattr(machine.here, "capability", lambda index=None: (10, 0))
    tuned.put(row(config=wide), GPU)
    assert tuned.choose(FORM, 16, GPU).config == wide
    monkeypatch.setattr(machine, "version", lambda: (3, 6))
    measured.forget()
    with pytest.warns(UserWarning, match="4 warps use tcgen05"):
        assert tuned.choose(FORM, 16, GPU).config.warps == 2


def test_explain_says_where_the_tile_is_from(capsys, monkeypatch):
    monkeypatch.setattr(triton, "_unusable", lambda problem: None)
    monkeypatch.setattr(cuda, "_unusable", lambda problem: "there is no nvcc")
    asked = ["explain", "--m", "3", "--n", "4096", "--k", "4096", "--device", "cuda", "--json"]
    for config, source in ((guess(), "guessed: there is no "), (TILE, "measured at m = 16, ")):
        assert cli.main(asked) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["runs"] == "triton.gemv" and result["tile"]["source"].startswith(source)
        assert result["tile"]["config"] == dataclasses.asdict(config) and result["tile"]["operand"] == "int8"
        tuned.put(row(form=dataclasses.replace(FORM, planes=1)), GPU)
    assert cli.main(asked[:-1]) == 0
    assert "tile measured at m = 16, 2000-01-01, commit unknown (rows 32, tokens 16," in capsys.readouterr().out
    assert cli.main(["explain", "--m", "3", "--n", "64", "--k", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tile"] is None
