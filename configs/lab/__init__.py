"""Lab models: small stand-ins for published families, which every method's quality tables share as checkpoints.

At most 25 M parameters; at most 90 s each on an H100 (``:h100``) and minutes on a CPU (``:tiny``, built-in corpus).
"""

from ml_collections import ConfigDict

from configs import base

DOMAINS = {"fiction": 0.40, "docs": 0.22, "code": 0.15, "dialogue": 0.13, "math": 0.06, "facts": 0.04}


def make(name: str, variant: str) -> ConfigDict:
    """Sizes and training that the four lab models share; each file adds its family's routing."""
    if variant not in ("tiny", "h100"):
        raise ValueError(f"variant {variant!r} of configs/lab/{name}.py: choose tiny or h100")
    config = base.get_config()
    config.name = f"{name}:{variant}"
    config.scale = variant
    if variant == "tiny":
        config.model.num_layers = 4
        config.model.dim = 96
        config.model.ffn_dim = 256
        config.model.compute_dtype = "float32"
        config.model.attention.num_heads = 4
        config.model.attention.num_kv_heads = 4
        config.model.attention.head_dim = 24
        config.data.tokenizer = "bpe-train:1024"
        config.train.steps = 400
        config.train.batch_size = 16
        config.train.learning_rate = 6e-3
        config.train.warmup_steps = 40
        config.train.eval_every = 200
        config.train.checkpoint_every = 200
        config.eval.max_tokens = 16 * 128 * 4
        return config
    config.model.num_layers = 8
    config.model.dim = 256
    config.model.ffn_dim = 704
    config.model.attention.num_heads = 4
    config.model.attention.num_kv_heads = 4
    config.model.attention.head_dim = 64
    base.with_files(config, "", "bpe:tokenizer/bpe4096.json", DOMAINS)
    config.data.seq_len = 512
    config.train.steps = 800
    config.train.batch_size = 128
    config.train.learning_rate = 3e-3
    config.train.warmup_steps = 80
    config.train.log_every = 50
    config.train.eval_every = 400
    config.train.checkpoint_every = 400
    config.eval.batch_size = 64
    config.eval.max_tokens = 64 * 512
    config.table.batch_size = 16
    config.table.max_tokens = 16 * 512 * 16
    return config
