"""Trainers of transformers over networks of a few hundred parameters, without dropout."""

from typing import Any

import torch

TEXTS, LENGTH, WORDS = 18, 7, 20


def settings(folder: Any, **extra: Any) -> Any:
    from transformers import TrainingArguments

    given = dict(per_device_train_batch_size=4, num_train_epochs=1, learning_rate=1e-2, seed=3)
    quiet = dict(report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", logging_strategy="no")
    return TrainingArguments(str(folder), **{**given, **quiet, **extra})


def language_model(dropout: float = 0.0) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    rest = dict(resid_pdrop=0.0, embd_pdrop=dropout, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=8, n_embd=8, n_layer=1, n_head=2, **rest))


def texts(n: int = TEXTS) -> list[dict[str, torch.Tensor]]:
    """Padded texts of several lengths; the first two labels of each are a prompt, which does not count."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, WORDS, (n, LENGTH), generator=generator)
    lengths = torch.randint(4, LENGTH + 1, (n,), generator=generator)
    mask = torch.arange(LENGTH) < lengths[:, None]
    labels = ids.masked_fill(~mask, -100)
    labels[:, :2] = -100
    columns = {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}
    return [{key: value[i] for key, value in columns.items()} for i in range(n)]


def language_trainer(folder: Any, model: Any = None, data: Any = None, **extra: Any) -> Any:
    from transformers import Trainer

    own = {key: extra.pop(key) for key in ("compute_loss_func", "data_collator", "processing_class") if key in extra}
    model = language_model() if model is None else model
    return Trainer(model, settings(folder, **extra), train_dataset=texts() if data is None else data, **own)


def classifier(kind: str = "ForSequenceClassification", **config: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    size = dict(vocab_size=WORDS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    still = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=8)
    return getattr(transformers, f"Bert{kind}")(transformers.BertConfig(**size, **still, **config))


def labelled(labels: torch.Tensor) -> list[dict[str, Any]]:
    """The texts with labels of another kind."""
    kept = ("input_ids", "attention_mask")
    return [
        {**{key: text[key] for key in kept}, "labels": y} for text, y in zip(texts(len(labels)), labels, strict=True)
    ]
