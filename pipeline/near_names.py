"""Messages for names that do not exist, with the known names that are near."""

import difflib
from collections.abc import Sequence

__all__ = ["unknown_name", "usual_names"]

# What people coming from elsewhere call an option, and the last part of its name here.
_USUAL = {
    **dict.fromkeys(("dim", "d_model", "hidden_size", "embedding_dim", "hidden_dim"), "width"),
    **dict.fromkeys(("layers", "num_layers", "n_layers", "blocks"), "num_blocks"),
    **dict.fromkeys(("heads", "n_heads"), "num_heads"),
    **dict.fromkeys(("maxlen", "max_len", "seq_len", "sequence_length"), "max_length"),
    **dict.fromkeys(("lr", "learningrate"), "learning_rate"),
    **dict.fromkeys(("wd", "l2"), "weight_decay"),
    **dict.fromkeys(("bs", "batch", "batchsize"), "batch_size"),
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs"), "max_epochs"),
    **dict.fromkeys(("steps", "num_steps"), "max_steps"),
    **dict.fromkeys(("minutes", "time"), "max_minutes"),
    **dict.fromkeys(("negatives", "num_neg", "n_negatives"), "num_negatives"),
    **dict.fromkeys(("warmup", "lr_warmup"), "warmup_steps"),
    **dict.fromkeys(("clip", "grad_clip", "max_grad_norm", "gradient_clip_val"), "clip_norm"),
    **dict.fromkeys(("accumulate_grad_batches", "gradient_accumulation_steps"), "accumulate"),
    **dict.fromkeys(("early_stopping", "early_stop"), "patience"),
    **dict.fromkeys(("amp", "bf16", "fp16", "dtype"), "precision"),
    **dict.fromkeys(("random_state", "random_seed"), "seed"),
    "schedule": "decay",
    "scheduler": "decay",
}
_MOST_LISTED = 20


def unknown_name(what: str, name: str, known: Sequence[str]) -> str:
    """The error message for an unknown name, with similar known names.

    Example:
        >>> unknown_name("metric", "ndgc@10", ["NDCG@10", "MRR@10"])
        "metric must be a known name, got 'ndgc@10'; did you mean NDCG@10?"
    """
    lower = {one.lower(): one for one in known}
    near = usual_names(name, known)
    near += [lower[one] for one in difflib.get_close_matches(name.lower(), lower, n=4, cutoff=0.5)]
    last = {full.rpartition(".")[2]: full for full in known}
    near += [
        last[key]
        for key in difflib.get_close_matches(name.rpartition(".")[2], last, n=3, cutoff=0.6)
    ]
    hint = f"known names: {', '.join(known)}"
    if near:
        hint = f"did you mean {', '.join(dict.fromkeys(near))}?"
    elif len(known) > _MOST_LISTED and any("." in one for one in known):
        hint = "`shardrec options` explains all of them"
    return f"{what} must be a known name, got {name!r}; {hint}"


def usual_names(name: str, known: Sequence[str]) -> list[str]:
    """The dotted names in ``known`` that end in this name, or in the one we use for it.

    If several match, only those with the fewest parts are returned.

    Example:
        >>> usual_names("lr", ["optimizer.learning_rate", "optimizer.eps", "catalog.learning_rate"])
        ['optimizer.learning_rate', 'catalog.learning_rate']
    """
    last = name.lower().replace("-", "_").rpartition(".")[2]
    found = [one for one in known if one.rpartition(".")[2] in (last, _USUAL.get(last))]
    depth = min((one.count(".") for one in found), default=0)
    return [one for one in found if one.count(".") == depth]
