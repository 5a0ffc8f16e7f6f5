"""Reading config.json strictly: every key is used, known to change no logit, or refused by name."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moejax.config import ConfigError

WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "names of the model and of the program that wrote it": (
        "architectures", "auto_map", "model_type", "name_or_path", "_name_or_path", "tokenizer_class",
        "transformers_version", "transformers.js_config", "library_name", "unsloth_version", "unsloth_fixed",
    ),
    "token ids and the settings of generation, which are the tokenizer's and the sampler's": (
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id",
        "forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "begin_suppress_tokens", "suppress_tokens",
        "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
        "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "prefix", "remove_invalid_values",
        "repetition_penalty", "return_dict_in_generate", "temperature", "top_k", "top_p", "typical_p", "max_new_tokens",
    ),
    "training only": (
        "attention_dropout", "aux_loss_alpha", "initializer_range", "output_router_logits", "router_aux_loss_coef",
        "router_jitter_noise", "seq_aux", "gradient_checkpointing", "hidden_dropout", "resid_pdrop", "embd_pdrop",
    ),
    "how it is computed, not what": (
        "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "_experts_implementation",
        "experts_implementation", "cache_implementation", "dtype", "torch_dtype", "ep_size", "pretraining_tp",
        "torchscript", "use_bfloat16", "use_cache", "chunk_size_feed_forward", "return_dict", "use_return_dict",
        "output_attentions", "output_hidden_states", "use_mla", "tf_legacy_loss",
    ),
    "the longest context, which enters only where rope scaling says nothing of it": (
        "max_position_embeddings", "initial_context_length", "max_seq_len", "model_max_length",
    ),
    "heads for other tasks": (
        "finetuning_task", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params",
    ),
    "quantised weights, which are read by what the tensors are": ("quantization_config", "compression_config"),
    "modules that predict further tokens, which change no logit of the model": (
        "num_nextn_predict_layers", "num_mtp_layers",
    ),
}  # fmt: skip
"""Keys that change no logit, by the reason."""
HARMLESS = {name for names in WITHOUT_EFFECT.values() for name in names}
ONLY: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
}
"""Keys of every model that must have one of these values."""
MOST = 2**31 - 1
"""Of a size, and of any other whole number: more than an array here has along an axis."""
MOST_LAYERS, MOST_EXPERTS = 1_000, 1_000_000
"""Of a model, experts of all layers together: far above any published one. A list is made of each of them, so a damaged
number would fill the memory."""
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "num_nextn_predict_layers")
_REQUIRED = object()
_NAMES: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "an object",
}


class Keys:
    """The keys of one config.json; remembers which were read."""

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self.raw = raw
        self.path = path
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.raw

    def refuse(self, name: str, why: str) -> ConfigError:
        return ConfigError(f"{self.path}: {name}={self.raw.get(name)!r} is not supported: {why}")

    def get(self, names: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The value of a key; several names, parted by blanks, are older and newer names of one key.

        Raises:
          ConfigError: none is there and there is no default, two disagree, or the value is of another kind.
        """
        found = [name for name in names.split() if name in self.raw]
        self._read.update(found)
        found = [n for n in found if self.raw[n] is not None] or found
        if not found:
            if default is _REQUIRED:
                raise ConfigError(f"{self.path} has no {' or '.join(names.split())}: the model needs it")
            return default
        name = found[0]
        value = self.raw[name]
        for other in found[1:]:
            if self.raw[other] != value:
                raise ConfigError(f"{self.path}: {name}={value!r} and {other}={self.raw[other]!r} are one setting")
        if value is None and kind is bool and default is True:
            raise self.refuse(name, "null counts as false in transformers, and without the key it is true: write which")
        if value is None and default is not _REQUIRED:
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(f"{self.path}: {name}={value!r}: expected {_NAMES[kind]}")
        if kind is int and value > (most := MOST_LAYERS if name in LAYERS else MOST):
            raise ConfigError(f"{self.path}: {name}={value}: is beyond any model that can be read, at most {most:,}")
        return value

    def only(self, name: str, values: Iterable[Any], need: str) -> None:
        """Refuses any other value of a key, if it is there; ``need`` says what another would take."""
        self._read.add(name)
        values = tuple(values)
        if name in self.raw and not any(type(self.raw[name]) is type(v) and self.raw[name] == v for v in values):
            raise self.refuse(name, f"only {' or '.join(repr(v) for v in values)} is; another value would need {need}")

    def done(self, family: str) -> None:
        """Raises ConfigError if a key is left that nothing read and that is not known to have no effect."""
        for name, values in ONLY.items():
            self.only(name, values, "another kind of model")
        left = sorted(name for name in self.raw if name not in self._read and name not in HARMLESS)
        if left:
            shown = ", ".join(f"{name}={self.raw[name]!r}"[:80] for name in left[:6])
            raise ConfigError(
                f"{self.path}: {len(left)} keys are not known for {family}: {shown}. What a key does that is not known "
                "cannot be computed; remove it if it changes no logit, or add it to moejax/importers/configs.py"
            )
