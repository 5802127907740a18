"""The two real models of the accuracy tables, with their calibration and what they are judged on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import corpus
import machine
import torch
from quantized import fingerprint, quantized

from llmfp4_kernels.evaluate import load_ids, windows

BUILD = machine.ROOT / "build"


@dataclass(frozen=True)
class Sizes(corpus.Tokens):
    """Of tokens, and numbers of sentences."""

    calibration_sentences: int = 512
    sentences: int = 1024


QUICK = Sizes(**corpus.QUICK, calibration_sentences=32, sentences=48)


@dataclass(frozen=True)
class Subject:
    name: str
    text: str
    dense: torch.nn.Module = field(repr=False)
    tokenizer: object = field(repr=False)
    calibration: list = field(repr=False)
    evaluation: torch.Tensor | list[str] = field(repr=False)
    """token ids of a language model, sentences of an encoder"""
    folder: Path
    """of the quantized models"""
    elsewhere: tuple[Path, ...] = ()
    dtype: torch.dtype = torch.float32
    """of what stays dense"""

    def fingerprint(self, recipe: str) -> str:
        return fingerprint(self.dense, recipe, self.calibration)

    def quantized(self, recipe: str):
        """(model, record), made once and then read from `folder`."""
        where = {"build": self.folder, "elsewhere": self.elsewhere}
        return quantized(self.dense, self.tokenizer, recipe, self.calibration, dtype=self.dtype, **where)


def models_folder(sizes: Sizes, build: Path) -> Path:
    return build / ("quick" if sizes == QUICK else "accuracy")


def language(sizes: Sizes, build: Path = BUILD) -> Subject:
    """The demo's language model; the demo's quantized models are used where they are the same."""
    demo = build / "demo"
    dense, tokenizer = corpus.dense_model(demo)
    texts = corpus.texts(demo)
    calibration = windows(load_ids(tokenizer, texts[0], sizes.calibration), sizes.window, batch=4)
    ids = load_ids(tokenizer, texts[1], sizes.evaluation)
    folder = models_folder(sizes, build) / "language"
    return Subject(corpus.MODEL_NAME, corpus.TEXT_NAME, dense, tokenizer, calibration, ids, folder, (demo,),
                   torch.bfloat16)  # fmt: skip


def batches_of_equal_length(tokenizer, sentences: list[str], batch: int) -> list[dict]:
    """Calibration batches without padding, which the search would take for words."""
    by_length: dict[int, list] = {}
    for ids in tokenizer(sentences, truncation=True)["input_ids"]:
        by_length.setdefault(len(ids), []).append(ids)
    pieces = [torch.tensor(rows).split(batch) for _, rows in sorted(by_length.items())]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for piece in pieces for ids in piece]


def encoder(sizes: Sizes, build: Path = BUILD) -> Subject:
    """all-MiniLM-L6-v2; calibration and evaluation share no sentence and no passage."""
    dense, tokenizer = corpus.minilm(build / "demo")
    calibration, sentences = corpus.sentences(build / "demo", sizes.calibration_sentences, sizes.sentences)
    batches = batches_of_equal_length(tokenizer, calibration, 16)
    return Subject(corpus.MINILM_NAME, corpus.SENTENCES_NAME, dense, tokenizer, batches, sentences,
                   models_folder(sizes, build) / "embedding")  # fmt: skip
