"""Capacity-Aware Inference (2503.05066): which pairs should an overloaded expert drop, and what does it cost?

Trains a small OLMoE-like model, then evaluates it with loads capped at a multiple (the capacity factor) of the mean, in
five tables (``table.tables``; ``docs/limits.md``), each with contrasts that are stated in code before any run
(``experiments.capacity_settings.contrasts``), in bits per byte, by more than the margin. The primary ones:

``1``        Token Drop by order, reverse order, at random, by score. At factor 1.0 score beats random, random beats
             order, random beats reverse order.
``sweep``    every limit from factor 0 to 3. At 1.5 Token Drop and Expanded Drop lose nothing; 1.0 beats 0.5.
``2``        Expert Drop, Token Drop, Expanded Drop, at the paper's factor and where Token Drop loses 12 % of pairs.
             There Expanded Drop beats Token Drop, that beats Expert Drop, and Expanded Drop loses nothing.
``3``        a limit on each expert against one on each device. Device level at 1.0 beats expert level at 1.5.
``latency``  all at the busiest rank's load of Token Drop at factor 1. Expanded Drop beats Token Drop, a device budget
             beats Token Drop, filling free places only beats the paper's Expanded Drop.

All but the first split tokens and experts over virtual ranks (at most 8), so that Expanded Drop is local.

Commands::

    python -m experiments.run --config=configs/papers/capacity_aware.py:tiny --workdir=runs/ca
    python -m experiments.run --config=configs/papers/capacity_aware.py:h100 --workdir=runs/ca100
    --config.data.root=DATA

``:tiny``   1.9 M parameters (16 experts, top-4), built-in corpus; 2 CPU cores, about 8 minutes.
``:h100``   about 100 M parameters (64 experts, top-8) on six domains of text; one H100, under 480 s with compilation.
            DATA holds ``{train,valid,test}/<domain>.txt.xz`` and ``tokenizer/bpe8192.json``. All five tables take
            longer than Table 1: a table that is done is not made again, so ``--config.table.tables="('1','sweep')"``
            and later the whole command is the same as the whole command.
``:lab``    the OLMoE-like lab model (at most 25 M parameters), three training seeds; DATA as above, one H100.
``:paper``  OLMoE-1B-7B itself, published on eight lm-eval tasks (average 64.0 without a limit): sizes, for planning.
``:paper=FOLDER``  the table on the weights of a Hugging Face folder (or workdir) as they are, on held-out text:
            ``--config=configs/papers/capacity_aware.py:paper=FOLDER --workdir=runs/olmoe``.

What the paper measured is the average accuracy of eight tasks on OLMoE-1B-7B; ours is bits per byte of held-out text on
the model just trained, so no value can be "reproduced": the contrasts are judged. Results: ``experiments/results/``.
"""

from ml_collections import ConfigDict

from configs import base, pretrained
from configs.lab import olmoe_like

TABLES = ("1", "sweep", "2", "3", "latency")
ARMS = ("order", "reverse", "random", "score")
FACTORS = (2.0, 1.5, 1.0, 0.75, 0.5)


def get_config(variant: str = "tiny") -> ConfigDict:
    makers = {"tiny": _tiny, "h100": _h100, "lab": _lab, "paper": _paper}
    variant, equals, folder = variant.partition("=")
    if variant not in makers or (equals and variant != "paper"):
        raise ValueError(f"variant {variant!r}: choose one of {', '.join(makers)}, paper=FOLDER")
    config = pretrained.get_config(folder) if equals else makers[variant](base.get_config())
    config.name = f"capacity_aware:{variant}"
    config.scale = "h100" if variant == "lab" else variant
    config.table.name = "capacity_aware"
    config.table.tables = TABLES
    config.table.arms = ARMS
    config.table.factors = FACTORS
    return config


def _olmoe_router(config: ConfigDict) -> None:
    """OLMoE: top-k of softmax, not renormalised; balance 0.01 and z 0.001; QK-norm."""
    config.model.moe.router.renormalise = False
    config.model.moe.losses = ConfigDict({"balance": 0.01, "z": 0.001})
    config.model.attention.qk_norm = True


def _tiny(config: ConfigDict) -> ConfigDict:
    _olmoe_router(config)
    config.model.num_layers = 4
    config.model.dim = 128
    config.model.compute_dtype = "float32"  # bfloat16 is emulated, so slower, on most CPUs
    config.model.attention.num_heads = 4
    config.model.attention.num_kv_heads = 4
    config.model.moe.num_experts = 16
    config.model.moe.expert_dim = 64
    config.model.moe.router.k = 4
    config.data.tokenizer = "bpe-train:1024"
    config.data.seq_len = 128
    config.train.steps = 350
    config.train.batch_size = 24
    config.train.learning_rate = 6e-3
    config.train.warmup_steps = 40
    config.train.log_every = 25
    config.train.eval_every = 150
    config.train.checkpoint_every = 150
    config.eval.batch_size = 24
    config.eval.max_tokens = 24 * 128 * 4
    config.eval.tasks = ("builtin",)
    config.eval.task_limit = 100
    config.table.batch_size = 12
    config.table.max_tokens = 12 * 128 * 10  # ten batches: the bootstrap wants eight
    return config


def _h100(config: ConfigDict) -> ConfigDict:
    _olmoe_router(config)
    config.model.num_layers = 8
    config.model.dim = 512
    config.model.attention.num_heads = 8
    config.model.attention.num_kv_heads = 8
    config.model.attention.head_dim = 64
    config.model.moe.num_experts = 64
    config.model.moe.expert_dim = 128
    config.model.moe.router.k = 8
    domains = {"fiction": 0.40, "docs": 0.22, "code": 0.15, "dialogue": 0.13, "math": 0.06, "facts": 0.04}
    base.with_files(config, "", "bpe:tokenizer/bpe8192.json", domains)
    config.data.seq_len = 512
    config.train.steps = 1200
    config.train.batch_size = 128
    config.train.learning_rate = 2e-3
    config.train.warmup_steps = 100
    config.train.log_every = 50
    config.train.eval_every = 500
    config.train.checkpoint_every = 500
    config.eval.batch_size = 64
    config.eval.max_tokens = 64 * 512
    config.eval.tasks = (
        "tasks/continuation4.jsonl.xz",
        "tasks/lambada_test.jsonl.xz",
        "tasks/blimp_300x67.jsonl.xz",
    )
    config.eval.task_limit = 0
    config.table.batch_size = 16  # the smallest domain's test split has 13 such batches
    config.table.max_tokens = 16 * 512 * 16
    return config


def _lab(config: ConfigDict) -> ConfigDict:
    """The OLMoE-like lab model under three training seeds: intervals speak of training runs."""
    config = olmoe_like.get_config("h100")
    config.table.seeds = (0, 1, 2)
    return config


def _paper(config: ConfigDict) -> ConfigDict:
    """OLMoE-1B-7B: 6.9 B parameters, 1.3 B active."""
    _olmoe_router(config)
    config.model.attention.qk_norm_over = "projection"
    config.model.vocab_size = 50304
    config.model.num_layers = 16
    config.model.dim = 2048
    config.model.tie_embeddings = False
    config.model.scale_embeddings = False
    config.model.attention.num_heads = 16
    config.model.attention.num_kv_heads = 16
    config.model.attention.head_dim = 128
    config.model.moe.num_experts = 64
    config.model.moe.expert_dim = 1024
    config.model.moe.router.k = 8
    config.model.remat = "block"
    config.data.seq_len = 4096
    return config
