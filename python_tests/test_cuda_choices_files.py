"""Files of measured tiles of the CUDA kernels: which go first, how a wrong one is left aside, what is said of them."""

import json
import re

import pytest
from cuda_on_cpu import OnCpu
from json_changes import change
from test_cuda_choices import FORM, HERE, HOPPER, cache, choice, put, pytestmark, row  # noqa: F401 (cache: a fixture)

from llmfp4_kernels import cli
from llmfp4_kernels.backends import cuda, cuda_choices, measured
from llmfp4_kernels.backends.cuda_choices import Tile
from llmfp4_kernels.errors import BadFile
from llmfp4_kernels.formats import E2M1
from llmfp4_kernels.problem import Problem


def test_the_cache_folder_goes_before_the_package():
    with OnCpu([], **HOPPER):
        shipped = put(row(m=1), row(m=64), folder=measured.SHIPPED)
        own = put(row(m=1, splits=5))
        known = cuda_choices.known(cuda.machine, HERE)
        one = cuda_choices.choose(known, FORM, 1, ("cuda.sm80",), 132)
        many = cuda_choices.choose(known, FORM, 64, ("cuda.sm80",), 132)
        assert one[0].splits == 5 and one[1].endswith(f"in {own}") and many[1].endswith(f"in {shipped}")
        assert str(known) == (
            f"measured, 1 rows of {own}, the last one of 2000-01-01, commit 0000000000; "
            f"measured, 2 rows of {shipped}, the last one of 2000-01-01, commit 0000000000"
        )
        put(row(m=1, splits=6), row("cuda.gemv", 0, "16x8", 3, m=1))
        content = json.loads(own.read_text())
        assert [(r["config"]["kernel"], r["config"]["splits"]) for r in content["rows"]] == [
            ("cuda.sm80", 6), ("cuda.gemv", 3)]  # fmt: skip
        assert [entry.name for entry in own.parent.iterdir()] == ["cuda-cpu-132.json"]


BAD = [
    (lambda content: json.dumps(content)[:-40], r"bytes\) is not JSON"),
    (change("format", value="llmfp4 triton tiles"), "is not of format 'llmfp4 cuda tiles', version 2"),
    (change("conditions", "gpu", value="Other GPU"), "measured with gpu Other GPU, here it is cpu"),
    (change("conditions", "capability", value="sm_80"), "measured with capability sm_80, here it is sm_90"),
    (change("conditions", "multiprocessors", value=114), "measured with multiprocessors 114, here it is 132"),
    (change("rows", 0, "config", "tile", value=3), "does not run: cuda.sm80: tile 3 is none of 0 to 2"),
    (change("rows", 0, "config", "tile", value=2), "tile 2 of cuda.sm80 is 128x128, not 128x64"),
    (change("rows", 0, "config", "tile", value=-1), "tile -1 and splits = 2 are none"),
    (change("rows", 0, "config", "tile", value=1.0), "tile is 1.0, expected int"),
    (change("rows", 0, "config", "splits", value=34), "splits = 34 are not 1 to 33: the sum has 33 units of k"),
    (change("rows", 0, "config", "splits", value=0), "tile 1 and splits = 0 are none"),
    (change("rows", 0, "config", "splits", value=1 << 40), "are beyond all products"),
    (change("rows", 0, "config", "kernel", value="cuda.sm100"), "'cuda.sm100' is none of cuda.gemv, cuda.sm90"),
    (change("rows", 0, "config", "kernel", value="cuda.gemv"), "tile 1 is none of 3 to 5, which 16 rows"),
    (change("rows", 0, "config", value={}), "a tile has the fields "),
    (change("rows", 0, "form", "operand", value="int4"), "there are no 1 planes of int4 with none scales"),
    (change("rows", 0, "form", "operand", value="e4m3"), "cuda.sm80 does not multiply e4m3"),
    (change("rows", 0, "form", "planes", value=4), "there are no 4 planes of int8 with none scales"),
    (change("rows", 0, "form", "group_size", value=16), "there are no groups of 16 inputs with none scales"),
    (change("rows", 0, "form", "group_size", value=-16), "is no product of these kernels"),
    (change("rows", 0, "m", value=(1 << 30) + 1), "are beyond all products"),
    (change("rows", 0, "m", value=0), "is no product of these kernels"),
    (change("rows", 0, "seconds", value=0.0), "says seconds = 0.0"),
]


@pytest.mark.parametrize(("damage", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_a_wrong_table_is_left_aside_with_a_warning(damage, sentence):
    problem = Problem(16, 150, 2100, E2M1, E2M1, device="cuda")
    with OnCpu([], **HOPPER):
        path = put(row())
        path.write_text(damage(json.loads(path.read_text())))
        measured.forget()
        with pytest.raises(BadFile, match=f"{re.escape(str(path))}.*{sentence}"):
            measured.read(cuda_choices.KIND, path, measured.Conditions.of(cuda.machine, HERE))
        with pytest.warns(UserWarning, match=f"measured tiles are not used: .*{sentence}.*'llmfp4 tune' writes them"):
            name, tile = choice(problem)
        assert (name, tile.config) == ("cuda.gemv", Tile("cuda.gemv", 5, "64x16", 4))
        assert tile.source.startswith(f"counted: {path}")
        put(row())
        assert choice(problem)[0] == "cuda.sm80"


def test_info_and_explain_say_what_is_in_force(capsys):
    asked = ["explain", "--m", "16", "--n", "150", "--k", "2100", "--device", "cuda", "--recipe", "minmax-w4a4"]
    with OnCpu([], **HOPPER):
        for table in (False, True):
            path = table and put(row())
            assert cli.main(["info"]) == cli.main([*asked, "--json"]) == cli.main(asked) == 0
            info, _, explained = capsys.readouterr().out.partition("{")
            says = (
                f"measured, 1 rows of {path},"
                if table
                else f"counted: there is no cuda-*.json in {measured.cache_folder()}"
            )
            assert f"\ntiles      cuda: {says}" in info
            if table:
                assert '"runs": "cuda.sm80"' in explained and "\ntile measured at m = 16, n = 150" in explained
                assert "(kernel cuda.sm80, tile 1, size 128x64, splits 2)" in explained
            else:
                assert "\ntile counted: there is no cuda" in explained
    assert cli.main(["info"]) == 0
    assert "\ntiles      cuda: not used: " in capsys.readouterr().out
