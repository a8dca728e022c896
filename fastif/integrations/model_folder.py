"""Models of transformers in a local folder: classifiers of texts and images, and causal language models.

Only weights in safetensors are read, and no code that a folder or a hub brings is run. `transformers` is imported when
a folder is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

Kind = Literal["causal_lm", "texts", "images"]
TrainedLoss = Literal["causal_lm", "cross_entropy", "bce", "mse"]

_MAPPINGS: dict[str, Kind] = {
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "causal_lm",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "texts",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "images",
}
_NO_REPORTS = 50  # logging.CRITICAL
_UNBOUNDED = 1 << 24  # a tokenizer that knows no length says 10³⁰


class ModelFolder(NamedTuple):
    """A model and what makes its inputs."""

    model: nn.Module  # float32, in eval mode
    kind: Kind
    loss: TrainedLoss
    processor: Any  # its tokenizer, or image processor
    longest: int | None  # tokens that it takes
    path: Path

    @property
    def labels(self) -> dict[str, int]:
        """The classes by their names; empty where it gives a number."""
        config: Any = self.model.config
        return {} if self.loss == "mse" else {str(name): int(place) for name, place in config.label2id.items()}


def load_model_folder(folder: str | Path) -> ModelFolder:
    """The model of a folder that `save_pretrained` wrote, its tokenizer or image processor beside it.

    Weights are taken in float32 whatever they are stored in, and the model is in eval mode. The loss is that of its
    training, as config.problem_type says: "causal_lm"; of classifiers "cross_entropy", "bce" where an example may have
    several labels, "mse" of numbers and, without a problem_type, with one output.

    Raises ValueError for a folder that is not there (a name on a hub is not fetched), without a config or weights in
    safetensors, with code of its own, adapters alone, quantised weights, weights that lack some of the model's (they
    would be drawn), another kind of model, or several labels an example; ModuleNotFoundError without transformers.
    """
    path = Path(folder)
    _check_files(path)
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a folder with a model needs transformers: pip install transformers") from error

    known: dict[str, Any] = dict(local_files_only=True, trust_remote_code=False)
    with _quiet():
        try:
            config: Any = transformers.AutoConfig.from_pretrained(path, **known)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: transformers cannot read its config.json: {_first_line(error)}") from error
        kind, name = _kind_of(path, config)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"{path}: its weights are quantised, and what they compute is not what gradients are of: save the "
                "model in float32 or bfloat16"
            )
        how: dict[str, Any] = dict(use_safetensors=True, output_loading_info=True, dtype=torch.float32, **known)
        try:
            model, info = getattr(transformers, name).from_pretrained(path, config=config, **how)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: transformers cannot load {name}: {_first_line(error)}") from error
        missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
        if missing:
            raise ValueError(
                f"{path}: its weights lack {missing[0]} ({len(missing)} of {name}'s), which would be drawn at random: "
                "train the model first, and save it with save_pretrained"
            )
        processor = _processor_of(path, kind, known)
    for module in model.modules():  # a job goes on wherever its model's folder is
        if hasattr(module, "name_or_path"):
            module.name_or_path = ""
    model.config._name_or_path = ""
    return ModelFolder(model.eval(), kind, _loss_of(kind, config), processor, _longest(model, processor), path)


def _check_files(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(
            f"no folder {path}: models come from a local folder that save_pretrained wrote, and names on a hub are not "
            "fetched"
        )
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ValueError(
            f"{path} holds adapters alone: merge them into their base (merge_and_unload().save_pretrained), or "
            "use a script"
        )
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json: models come from a folder that save_pretrained wrote")
    if not any(path.glob("*.safetensors")):
        others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.h5") for file in path.glob(pattern))
        beside = f", and {others[0]} is not read, as pickled weights can run code" if others else ""
        raise ValueError(f"{path} has no weights in safetensors{beside}: save_pretrained writes them")


def _kind_of(path: Path, config: Any) -> tuple[Kind, str]:
    """What a model is for, and its class."""
    from transformers.models.auto import modeling_auto

    (name, *_) = [*(config.architectures or []), None]
    if getattr(config, "auto_map", None):
        raise ValueError(f"{path} brings code of its own (auto_map in config.json), which is not run: use a script")
    for mapping, kind in _MAPPINGS.items():
        for names in getattr(modeling_auto, mapping).values():
            if name in ([names] if isinstance(names, str) else names):
                return kind, name
    raise ValueError(
        f"{path}: its architecture is {name}, and folders may hold a causal language model (…ForCausalLM, "
        "…LMHeadModel), …ForSequenceClassification or …ForImageClassification: use a script for others"
    )


def _loss_of(kind: Kind, config: Any) -> TrainedLoss:
    """Of the training: as config.problem_type says, and without a word as transformers takes it."""
    if kind == "causal_lm":
        return "causal_lm"
    said: dict[str | None, TrainedLoss] = {
        "multi_label_classification": "bce",
        "regression": "mse",
        "single_label_classification": "cross_entropy",
    }
    return said.get(config.problem_type, "mse" if config.num_labels == 1 else "cross_entropy")


def _processor_of(path: Path, kind: Kind, known: dict[str, Any]) -> Any:
    import transformers

    auto = transformers.AutoImageProcessor if kind == "images" else transformers.AutoTokenizer
    try:
        processor: Any = auto.from_pretrained(path, **known)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        what = "image processor" if kind == "images" else "tokenizer"
        raise ValueError(
            f"{path} has no {what} that transformers reads ({_first_line(error)}): save_pretrained writes it"
        ) from error
    files = {"tokenizer.json", *getattr(processor, "vocab_files_names", {}).values()}
    if kind != "images" and not any((path / name).is_file() for name in files):  # transformers makes an empty one up
        raise ValueError(f"{path} has no tokenizer ({', '.join(sorted(files))}): save_pretrained writes it")
    return processor


def _longest(model: nn.Module, processor: Any) -> int | None:
    config: Any = model.config
    limits = [
        getattr(processor, "model_max_length", None),
        getattr(config, "max_position_embeddings", None),
        getattr(config, "n_positions", None),
    ]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)  # RoBERTa counts from behind the padding's
    return min((int(limit) for limit in limits if limit is not None and 0 < limit < _UNBOUNDED), default=None)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and reports, of which the errors here say what matters."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(_NO_REPORTS)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
