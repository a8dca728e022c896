"""What a user of each library writes, from a trained Trainer to the ten training texts that count most.

`libraries.py` beside it counts the lines of these functions and runs them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

DAMPING = 1e-3
BATCH, QUERY_BATCH = 32, 10
Found = tuple[Tensor, Tensor]  # scores and rows of the training texts, [q, 10], best first


def fastif_products(trainer: Any, queries: Any) -> Found:
    from fastif import Identity
    from fastif.integrations import data_of, influence_of

    linear = [name for name, module in trainer.model.named_modules() if isinstance(module, nn.Linear)]
    influence, train = influence_of(trainer, Identity(), layers=linear), data_of(trainer)
    return influence.fit(train).top(data_of(trainer, queries), train, k=10)


def fastif_ekfac(trainer: Any, queries: Any) -> Found:
    from fastif import EKFAC
    from fastif.integrations import data_of, influence_of

    linear = [name for name, module in trainer.model.named_modules() if isinstance(module, nn.Linear)]
    influence, train = influence_of(trainer, EKFAC(DAMPING, fisher="empirical"), layers=linear), data_of(trainer)
    return influence.fit(train).top(data_of(trainer, queries), train, k=10)


def fastif_text_products(trainer: Any, queries: Any) -> Found:
    from fastif import Identity
    from fastif.integrations import data_of, influence_of

    influence, train = influence_of(trainer, Identity(), layers="model.layers.*_proj"), data_of(trainer)
    return influence.fit(train).top(data_of(trainer, queries), train, k=10)


def captum_products(trainer: Any, queries: Any) -> Found:
    from captum.influence import TracInCP
    from torch.utils.data import DataLoader

    class Logits(nn.Module):
        def __init__(self, model: Any):
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, mask: Tensor) -> Any:
            return self.model(input_ids=ids, attention_mask=mask).logits

    def as_tuple(examples: Any) -> tuple[Tensor, ...]:
        batch = trainer.data_collator(examples)
        return batch["input_ids"], batch["attention_mask"], batch["labels"]

    model = Logits(trainer.model).eval()
    tracin = TracInCP(
        model,
        DataLoader(trainer.train_dataset, BATCH, collate_fn=as_tuple),
        checkpoints=["last"],
        checkpoints_load_func=lambda model, path: 1.0,  # the network as it is
        layers=[name for name, module in model.named_modules() if isinstance(module, nn.Linear)],
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        sample_wise_grads_per_batch=True,
    )
    rows, scores = tracin.influence(DataLoader(queries, QUERY_BATCH, collate_fn=as_tuple), k=10)
    return scores, rows


def captum_text_products(trainer: Any, queries: Any) -> Found:
    from captum.influence import TracInCP
    from torch.utils.data import DataLoader

    class Logits(nn.Module):
        def __init__(self, model: Any):
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, mask: Tensor) -> Any:
            return self.model(input_ids=ids, attention_mask=mask).logits

    def as_tuple(examples: Any) -> tuple[Tensor, ...]:
        batch = trainer.data_collator(examples)
        return batch["input_ids"], batch["attention_mask"], batch["labels"]

    def summed(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")

    model = Logits(trainer.model).eval()
    tracin = TracInCP(
        model,
        DataLoader(trainer.train_dataset, BATCH, collate_fn=as_tuple),
        checkpoints=["last"],
        checkpoints_load_func=lambda model, path: 1.0,  # the network as it is
        layers=[name for name, module in model.named_modules() if name.endswith("_proj")],
        loss_fn=summed,
        sample_wise_grads_per_batch=True,
    )
    rows, scores = tracin.influence(DataLoader(queries, QUERY_BATCH, collate_fn=as_tuple), k=10)
    return scores, rows


def kronfluence_products(trainer: Any, queries: Any) -> Found:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            return nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    task, folder = Classification(), tempfile.mkdtemp()
    model = prepare_model(trainer.model.eval(), task)
    analyzer = Analyzer("classifier", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=trainer.data_collator))
    how = dict(per_device_query_batch_size=QUERY_BATCH, per_device_train_batch_size=BATCH)
    analyzer.fit_all_factors("factors", trainer.train_dataset, factor_args=FactorArguments(strategy="identity"))
    analyzer.compute_pairwise_scores("scores", "factors", queries, trainer.train_dataset, **how)
    return analyzer.load_pairwise_scores("scores")["all_modules"].topk(10)


def kronfluence_ekfac(trainer: Any, queries: Any) -> Found:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            return nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_attention_mask(self, batch: Any) -> Tensor:
            return batch["attention_mask"]

    task, folder = Classification(), tempfile.mkdtemp()
    model, train = prepare_model(trainer.model.eval(), task), trainer.train_dataset
    analyzer = Analyzer("classifier", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=trainer.data_collator))
    factors, scores = FactorArguments("ekfac", use_empirical_fisher=True), ScoreArguments(damping_factor=DAMPING)
    how = dict(per_device_query_batch_size=QUERY_BATCH, per_device_train_batch_size=BATCH, score_args=scores)
    analyzer.fit_all_factors("factors", train, per_device_batch_size=BATCH, factor_args=factors)
    analyzer.compute_pairwise_scores("scores", "factors", queries, train, **how)
    return analyzer.load_pairwise_scores("scores")["all_modules"].topk(10)


def kronfluence_text_products(trainer: Any, queries: Any) -> Found:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    class Texts(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return [name for name, module in trainer.model.named_modules() if name.endswith("_proj")]

    task, folder = Texts(), tempfile.mkdtemp()
    model = prepare_model(trainer.model.eval(), task)
    analyzer = Analyzer("texts", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=trainer.data_collator))
    how = dict(per_device_query_batch_size=QUERY_BATCH, per_device_train_batch_size=BATCH)
    analyzer.fit_all_factors("factors", trainer.train_dataset, factor_args=FactorArguments(strategy="identity"))
    analyzer.compute_pairwise_scores("scores", "factors", queries, trainer.train_dataset, **how)
    return analyzer.load_pairwise_scores("scores")["all_modules"].topk(10)


def bergson_text_products(trainer: Any, queries: Any) -> Found:
    from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
    from datasets import Dataset

    def gradients(examples: Any) -> Tensor:
        model, data = trainer.model.eval(), Dataset.from_list([{"input_ids": one["input_ids"]} for one in examples])
        cfg = IndexConfig(tempfile.mkdtemp())
        cfg.partial_run_path.mkdir(exist_ok=True)
        collector = InMemoryCollector(model=model.base_model, data=data, cfg=cfg, processor=GradientProcessor())
        batches = [list(range(i, min(i + BATCH, len(data)))) for i in range(0, len(data), BATCH)]
        CollectorComputer(model, data, collector=collector, batches=batches, cfg=cfg).run_with_collector_hooks()
        return torch.cat(list(collector.gradients.values()), 1)

    return (gradients(queries) @ gradients(trainer.train_dataset).T).topk(10)


class Contender(NamedTuple):
    task: str
    library: str
    code: Callable[[Any, Any], Found]
    times_n: bool = False  # whether its scores are the number of training texts times fastif's
    imports: tuple[str, ...] = ()


PRODUCTS = "BERT classifier: products of gradients, all linear layers"
EKFAC = "BERT classifier: EK-FAC, all linear layers"
TEXTS = "Llama language model: products of gradients, linear layers of the blocks"
_CAPTUM, _KRONFLUENCE = ("captum.influence",), ("kronfluence.analyzer", "kronfluence.utils.dataset")
CONTENDERS = (
    Contender(PRODUCTS, "fastif", fastif_products),
    Contender(PRODUCTS, "captum", captum_products, True, _CAPTUM),
    Contender(PRODUCTS, "kronfluence", kronfluence_products, True, _KRONFLUENCE),
    Contender(EKFAC, "fastif", fastif_ekfac),
    Contender(EKFAC, "kronfluence", kronfluence_ekfac, True, _KRONFLUENCE),
    Contender(TEXTS, "fastif", fastif_text_products),
    Contender(TEXTS, "captum", captum_text_products, True, _CAPTUM),
    Contender(TEXTS, "kronfluence", kronfluence_text_products, True, _KRONFLUENCE),
    Contender(TEXTS, "bergson", bergson_text_products, True, ("bergson", "datasets")),
)
