r"""GPT-2 of 124M random parameters: plan, EK-FAC fit of all linear layers of its blocks, and scores, in time and
memory; and kronfluence beside it, on some layers, with the attention masks of padded texts.

python -m benchmarks.experiments.gpt2 --out runs/gpt2.json
python -m benchmarks.figures.keep keep runs/gpt2.json gpt2

Both sides get the same model, texts, empirical Fisher and damping (a tenth of each layer's mean eigenvalue). Memory is
of tensors beside the model, as `fastif.measure.Measure` counts it. kronfluence knows no Conv1D: it is given the same
weights in nn.Linear.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import fastif
from fastif.measure import Measure, environment
from fastif.model.losses import IGNORED

Batch = dict[str, Tensor]


def texts(n: int, length: int, words: int, seed: int) -> Batch:
    """Random tokens, padded on the right from lengths between a half and the whole."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, words, (n, length), generator=g)
    lengths = torch.randint(length // 2, length + 1, (n, 1), generator=g)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def measured(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    with Measure() as found:
        result = work()
    return result, {"seconds": found.seconds, "bytes": found.peak_bytes or 0}


def run_fastif(model: nn.Module, train: Batch, query: Batch, layers: list[str], batch: int) -> dict[str, Any]:
    influence = fastif.Influence(
        model, "causal_lm", fastif.EKFAC(fisher="empirical"), layers=layers, batch_size=batch, progress=True
    )
    data = batches(train, batch)
    plan, planned = measured(lambda: influence.plan(data, [query]))
    _, fit = measured(lambda: influence.fit(data))
    scores, scored = measured(lambda: influence.scores([query], data))
    covered = sum(torch.Size(shape).numel() for shape in plan.covered.values())
    return {
        "parameters": covered,
        "plan": planned,
        "fit": {**fit, "planned": plan.fit_bytes},
        "scores": {**scored, "planned": plan.score_bytes},
        "held": plan.curvature_bytes,
        "values": scores,
    }


def batches(data: Batch, size: int) -> list[Batch]:
    n = len(data["labels"])
    return [{k: v[i : i + size] for k, v in data.items()} for i in range(0, n, size)]


# ---------------------------------------------------------------------------------------------------------- kronfluence


class Rows(Dataset):
    def __init__(self, data: Batch):
        self.data = data

    def __len__(self) -> int:
        return len(self.data["labels"])

    def __getitem__(self, i: int) -> Batch:
        return {key: value[i] for key, value in self.data.items()}


def with_linear(model: nn.Module) -> nn.Module:
    """A copy whose Conv1D layers are nn.Linear."""
    from transformers.pytorch_utils import Conv1D

    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.weight, linear.bias = nn.Parameter(module.weight.detach().mT.contiguous()), module.bias
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, linear)
    return model


def run_kronfluence(model: nn.Module, train: Batch, query: Batch, layers: list[str], batch: int) -> dict[str, Any]:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Texts(Task):
        def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            return F.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED
            )  # summed, as its factors and scores take it

        def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return layers

        def get_attention_mask(self, batch: Batch) -> Tensor:
            return batch["attention_mask"]

    logging.disable(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as folder:
            prepared = prepare_model(with_linear(model), Texts())
            analyzer = Analyzer("gpt2", prepared, Texts(), cpu=True, disable_tqdm=True, output_dir=folder)
            factors = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
            _, fit = measured(
                lambda: analyzer.fit_all_factors(
                    "f", Rows(train), per_device_batch_size=batch, factor_args=factors, overwrite_output_dir=True
                )
            )
            arguments = ScoreArguments(damping_factor=None)  # its heuristic: a tenth of the mean eigenvalue
            _, scored = measured(
                lambda: analyzer.compute_pairwise_scores(
                    "s", "f", Rows(query), Rows(train), per_device_query_batch_size=len(query["labels"]),
                    per_device_train_batch_size=batch, score_args=arguments, overwrite_output_dir=True,
                )
            )  # fmt: skip
            return {"fit": fit, "scores": scored, "values": analyzer.load_pairwise_scores("s")["all_modules"]}
    finally:
        logging.disable(logging.NOTSET)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--beside", type=int, nargs="*", default=[0, 11], help="blocks that kronfluence is given too")
    parser.add_argument("--beside-texts", type=int, default=16)
    parser.add_argument("--skip-whole", action="store_true", help="only what stands beside kronfluence")
    parser.add_argument("--out", type=Path, default=Path("runs/gpt2.json"))
    given = parser.parse_args(arguments)
    from transformers import GPT2Config, GPT2LMHeadModel

    warnings.filterwarnings("ignore", module="kronfluence")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    words = model.config.vocab_size
    train, query = texts(given.texts, given.tokens, words, 1), texts(given.queries, given.tokens, words, 2)
    results: dict[str, Any] = {
        "meta": {
            "parameters": sum(p.numel() for p in model.parameters()), "texts": given.texts, "tokens": given.tokens,
            "queries": given.queries, "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **environment(torch.device("cpu")),
        },
    }  # fmt: skip
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

    def named(blocks: list[int]) -> list[str]:
        return [f"transformer.h.{block}.{kind}" for block in blocks for kind in kinds]

    def keep(name: str, found: dict[str, Any]) -> Tensor:
        values = found.pop("values")
        assert bool(values.isfinite().all())
        results[name] = found
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(found), flush=True)
        return values

    began = time.perf_counter()
    some = {key: value[: given.beside_texts] for key, value in train.items()}
    if given.beside:
        layers = named(given.beside)
        ours = keep("fastif beside", run_fastif(model, some, query, layers, given.batch))
        theirs = keep("kronfluence", run_kronfluence(model, some, query, layers, given.batch))
        stacked = torch.stack([ours.flatten().double(), theirs.flatten().double()])
        away = (given.beside_texts * ours - theirs).abs().max() / theirs.abs().max()
        results["beside"] = {
            "blocks": len(given.beside), "layers": len(layers), "texts": given.beside_texts,
            "correlation": float(torch.corrcoef(stacked)[0, 1]), "error": float(away),
        }  # fmt: skip
        print(results["beside"], flush=True)
    if not given.skip_whole:
        keep("fastif", run_fastif(model, train, query, named(list(range(model.config.n_layer))), given.batch))
    print(f"{time.perf_counter() - began:.0f} s")
    given.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
