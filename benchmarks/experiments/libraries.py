"""From a trained Trainer to the ten training texts that count most: fastif beside captum, kronfluence and bergson.

FASTIF_DATA=folder python -m benchmarks.experiments.libraries   # without the folder: generated texts
python -m benchmarks.figures.keep keep runs/libraries/results.json libraries

Two networks are trained by a Trainer: a BERT that tells the intents of BANKING77, and a Llama that learns its texts.
Each contender is a function of libraries_code.py, what a user of the library writes; this script counts its lines, with
neither imports, blank lines and comments nor the function's own head, as ruff formats them at 120 columns. All compute
the same numbers in the same layers and batches, so that their scores have to agree before a row is kept. Each runs in a
process of its own with one thread, its library imported before the clock starts. Memory is what the process took beyond
what it held before. Libraries that are not installed are left out, and the results name them. bergson was installed by
pip's --no-deps --target, so that torch stayed as it was, into a folder on PYTHONPATH; `datasets` failed to pickle its
modules until that folder was called site-packages.
"""

from __future__ import annotations

import argparse
import ast
import csv
import gc
import importlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import tempfile
import textwrap
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments.libraries_code import BATCH, CONTENDERS, DAMPING, TEXTS
from fastif.files import write_whole
from fastif.measure import environment

LENGTH = 32  # tokens of a text, at most
AGREE, SHARED = 1e-3, 0.9  # of the scores, relative to the largest of a query; of the ten rows of a query


def count_lines(code: Callable[..., Any]) -> int:
    """Lines of a function's body that hold code: no imports, blank lines, comments or docstrings."""
    source = textwrap.dedent(inspect.getsource(code))
    [function] = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    left_out = [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
    left_out += [node for node in ast.walk(function) if isinstance(node, ast.Expr) and _is_text(node.value)]
    gone = {i for node in left_out for i in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    lines = source.splitlines()
    rows = range(function.body[0].lineno, (function.end_lineno or 0) + 1)
    return sum(i not in gone and bool(lines[i - 1].split("#")[0].strip()) for i in rows)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


# --------------------------------------------------------------------------------------------------- networks and data


def read_texts(root: str | None, n: int, q: int) -> tuple[list[str], list[int], str]:
    """n + q texts, their labels and what they are: BANKING77's in an order drawn once, or words of twenty topics."""
    draw = torch.Generator().manual_seed(0)
    if root is None:
        labels = torch.randint(0, 20, (n + q,), generator=draw).tolist()
        lengths = torch.randint(6, 20, (n + q,), generator=draw).tolist()
        words = [torch.randint(0, 60, (length,), generator=draw).tolist() for length in lengths]
        texts = [" ".join(f"w{i if i < 40 else y * 20 + i}" for i in row) for row, y in zip(words, labels, strict=True)]
        return texts, labels, "generated texts"
    folder = next(f for f in (Path(root), Path(root) / "banking77") if (f / "train.csv").is_file())
    with (folder / "train.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    classes = {name: i for i, name in enumerate(sorted({row["category"] for row in rows}))}
    if len(rows) < n + q:
        raise ValueError(f"libraries: --n + --queries must be at most the {len(rows)} texts of {folder}, got {n + q}")
    rows = [rows[i] for i in torch.randperm(len(rows), generator=draw)[: n + q].tolist()]
    return [row["text"] for row in rows], [classes[row["category"]] for row in rows], "texts of BANKING77"


def make_tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from tokenizers.trainers import WordLevelTrainer
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    words.train_from_iterator(
        texts, WordLevelTrainer(special_tokens=["[PAD]", "[UNK]"], min_frequency=2, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def make_problems(folder: Path, root: str | None, n: int, q: int, epochs: int) -> dict[str, Any]:
    """Trains both networks and writes them, with their data, into the folder; what they are, for the results."""
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    texts, labels, what = read_texts(root, n, q)
    tokenizer = make_tokenizer(texts[:n])
    rows = tokenizer(texts, truncation=True, max_length=LENGTH, return_token_type_ids=False)
    data = [
        {"input_ids": ids, "attention_mask": mask}
        for ids, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True)
    ]
    size = dict(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=LENGTH, pad_token_id=0)
    torch.manual_seed(0)
    bert = BertForSequenceClassification(
        BertConfig(
            **size, hidden_size=128, num_attention_heads=2, intermediate_size=256, num_labels=max(labels) + 1,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    llama = LlamaForCausalLM(LlamaConfig(**size, hidden_size=64, num_attention_heads=2, intermediate_size=128))
    facts: dict[str, Any] = {"texts": what, "n": n, "queries": q, "epochs": epochs, "batch": BATCH, "damping": DAMPING}
    for name, model in (("bert", bert), ("llama", llama)):
        own = [{**one, "labels": y} for one, y in zip(data, labels, strict=True)] if name == "bert" else data
        (folder / name).mkdir()
        torch.save((own[:n], own[n:]), folder / name / "data.pt")
        tokenizer.save_pretrained(folder / name)
        model.save_pretrained(folder / name)
        trainer, _ = load_trainer(folder / name, epochs)
        result = trainer.train()
        trainer.model.save_pretrained(folder / name)
        facts[name] = {"parameters": model.num_parameters(), "training_loss": result.training_loss}
    return facts


def load_trainer(folder: Path, epochs: int = 1) -> tuple[Any, Any]:
    """A Trainer of what stands in the folder, and the queries."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(folder)
    classes = folder.name == "bert"
    kind = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    collator = DataCollatorWithPadding(tokenizer) if classes else DataCollatorForLanguageModeling(tokenizer, mlm=False)
    train, queries = torch.load(folder / "data.pt")
    arguments = TrainingArguments(
        str(folder / "trainer"), per_device_train_batch_size=BATCH, num_train_epochs=epochs, learning_rate=1e-3,
        report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(kind.from_pretrained(folder), arguments, train_dataset=train, data_collator=collator)
    return trainer, queries


# ----------------------------------------------------------------------------------------------------------- measuring


def _memory(field: str) -> int | None:
    """Bytes of this process by /proc: VmRSS now, VmHWM the most since it was reset; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def run_contender(place: int, folder: Path, answers: Any) -> None:
    """In a process of its own: the contender's answer, seconds, and bytes beyond those that were there before."""
    import fastif

    torch.set_num_threads(1)
    fastif.set_progress(False)
    contender = CONTENDERS[place]
    for module in contender.imports:
        importlib.import_module(module)
    trainer, queries = load_trainer(folder / ("llama" if contender.task == TEXTS else "bert"))
    gc.collect()
    before = _memory("VmRSS")
    reset = Path("/proc/self/clear_refs")
    if before is not None and os.access(reset, os.W_OK):
        reset.write_text("5")  # VmHWM begins anew
    wall, cpu = time.perf_counter(), time.process_time()
    scores, rows = contender.code(trainer, queries)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    most = _memory("VmHWM")
    n = len(trainer.train_dataset)
    answers.put(
        {
            "scores": (scores.detach().double() / (n if contender.times_n else 1)).tolist(), "rows": rows.tolist(),
            "seconds": seconds, "cpu_seconds": cpu_seconds,
            "peak_bytes": None if most is None or before is None else most - before,
        }
    )  # fmt: skip


def _run_alone(place: int, folder: Path, answers: Any) -> None:
    tempfile.tempdir = str(folder)  # what contenders write goes with the rest
    run_contender(place, folder, answers)


def in_own_process(place: int, folder: Path) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.SimpleQueue()
    process = spawn.Process(target=_run_alone, args=(place, folder, answers))
    process.start()
    while process.is_alive() and answers.empty():
        process.join(0.1)
    if answers.empty():
        one = CONTENDERS[place]
        raise RuntimeError(f"libraries: {one.library}, {one.task}: its process ended with {process.exitcode}")
    answer = answers.get()
    process.join()
    return answer


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float]:
    """How far scores differ, relative to the largest of their query, and the share of rows that both have."""
    error, shared, asked = 0.0, 0, 0
    for scores, rows, other_scores, other_rows in zip(
        ours["scores"], ours["rows"], theirs["scores"], theirs["rows"], strict=True
    ):
        other = dict(zip(other_rows, other_scores, strict=True))
        both = [(score, other[row]) for row, score in zip(rows, scores, strict=True) if row in other]
        largest = max(abs(score) for score in scores)
        error = max([error, *(abs(a - b) / largest for a, b in both)])
        shared, asked = shared + len(both), asked + len(rows)
    return error, shared / asked


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=os.environ.get("FASTIF_DATA"), help="folder with banking77; '' for generated")
    parser.add_argument("--n", type=int, default=2000, help="training texts")
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--libraries", nargs="+", help="beside fastif; default all that are installed")
    parser.add_argument("--out", type=Path, default=Path("runs/libraries"))
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    found = {one.library: importlib.util.find_spec(one.library) is not None for one in CONTENDERS}
    others = [library for library in [*found, "transformers"] if library != "fastif"]  # its own stands in environment()
    versions = {library: version(library) if found.get(library, True) else None for library in others}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts = make_problems(folder, asked.root or None, asked.n, asked.queries, asked.epochs)
        ours: dict[str, Any] = {}
        for place, one in enumerate(CONTENDERS):
            wanted = asked.libraries is None or one.library in asked.libraries
            if one.library != "fastif" and not (found[one.library] and wanted):
                continue
            answer = in_own_process(place, folder)
            ours = answer if one.library == "fastif" else ours
            error, shared = compare(ours, answer)
            if not (error <= AGREE and shared >= SHARED):  # NaN agrees with nothing
                raise AssertionError(
                    f"libraries: {one.task}: scores of {one.library} differ from fastif's by {error:.2g} of the "
                    f"largest (at most {AGREE}) and share {shared:.0%} of the rows (at least {SHARED:.0%})"
                )
            kept = {key: answer[key] for key in ("seconds", "cpu_seconds", "peak_bytes")}
            rows.append(
                {"task": one.task, "library": one.library, "lines": count_lines(one.code), **kept}
                | {"error": error, "shared": shared}
            )
            print(json.dumps(rows[-1]), flush=True)
    facts["libraries"] = versions
    results = {"meta": {**facts, **environment(torch.device("cpu"))}, "rows": rows}
    asked.out.mkdir(parents=True, exist_ok=True)
    write_whole(asked.out / "results.json", json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
