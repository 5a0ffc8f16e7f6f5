"""DualSparse-MoE (2508.18376): split experts, drop weak pairs of token and expert, keep the neurons that matter.

Trains a lab model, then makes six tables (``table.tables``; ``docs/dualsparse.md``), each with contrasts that are
stated in code before any run (``experiments.dualsparse_settings.contrasts``), in bits per byte, by more than the
margin. The primary ones:

``1``           experts whole, in 2 and in 4 parts (complete transformation): as trained, after a short fine-tuning of
                each (``table.tune_steps``), and that with 1T-Drop. Parts alone change nothing; more parts gain more.
``2``           1T-Drop, 2T-Drop by partition and by reconstruction, at 25 % of routed work dropped. 2T by
                reconstruction beats 1T, beats 2T by partition, and loses nothing.
``3``           against Efficient Expert Skipping (EES), Efficient Expert Pruning (EEP) by enumeration, both, and fewer
                experts per token. 2T by reconstruction beats each.
``thresholds``  quality from 5 to 60 % dropped. 5 % (1T) and 10 % (2T) lose nothing; from 25 to 50 % quality falls.
``importance``  2T-Drop by each metric of importance. Absolute forms beat signed ones; ours beats the paper's.
``layers``      drop rate over threshold, by layer.

Commands::

    python -m experiments.run --config=configs/papers/dualsparse.py:tiny --workdir=runs/dualsparse
    python -m experiments.run --config=configs/papers/dualsparse.py:tiny,model=olmoe_like --workdir=runs/dualsparse_o
    python -m experiments.run --config=configs/papers/dualsparse.py:lab --workdir=runs/dualsparse_lab
    --config.data.root=DATA

``:tiny``   a lab model at its tiny size on the built-in corpus; 2 CPU cores, a few minutes for each training seed
            (``--config.table.seeds="(0,1,2)"`` for three).
``:lab``    the lab model (at most 25 M parameters) on six domains of text, three training seeds; one H100. DATA holds
            ``{train,valid,test}/<domain>.txt.xz`` and ``tokenizer/bpe4096.json``.
``:paper``  Mixtral-8x7B itself: sizes, for planning.
``:paper=FOLDER``  the tables on the weights of a Hugging Face folder (or workdir) as they are, without fine-tuning.

``,model=NAME`` after ``:tiny`` or ``:lab`` names another lab model: mixtral_like (the default), olmoe_like, qwen_like,
deepseek_like. Mixtral's is the only one with two experts per token, for which EES was stated.

What the paper measured are accuracies of published models; ours are bits per byte of held-out text on the model just
trained, so that the contrasts are judged, not the values. Thresholds and all else that is found come from validation
text. Results: ``experiments/results/``.
"""

from ml_collections import ConfigDict

from configs import pretrained
from configs.lab import deepseek_like, mixtral_like, olmoe_like, qwen_like
from configs.models import mixtral_8x7b

TABLES = ("1", "2", "3", "thresholds", "importance", "layers")
LAB = {
    "mixtral_like": mixtral_like, "olmoe_like": olmoe_like, "qwen_like": qwen_like, "deepseek_like": deepseek_like,
}  # fmt: skip


def get_config(variant: str = "tiny") -> ConfigDict:
    scale, equals, folder = variant.partition("=")
    if scale == "paper":
        config = pretrained.get_config(folder) if equals else mixtral_8x7b.get_config()
        config.name = "dualsparse:paper"
        config.scale = "paper"
        config.table.batch_size = 8
        config.table.max_tokens = 8 * config.data.seq_len * 10
    else:
        scale, comma, rest = variant.partition(",")
        option, _, model = (rest if comma else "model=mixtral_like").partition("=")
        if scale not in ("tiny", "lab") or option != "model" or model not in LAB:
            raise ValueError(
                f"variant {variant!r}: choose tiny, lab, paper or paper=FOLDER; after tiny and lab ,model= and one of "
                f"{', '.join(LAB)}"
            )
        config = LAB[model].get_config("tiny" if scale == "tiny" else "h100")
        config.name = f"dualsparse:{variant}"
        if scale == "tiny":
            _tiny(config)
        else:
            config.table.seeds = (0, 1, 2)
            config.table.tune_steps = 100
    config.table.name = "dualsparse"
    config.table.tables = TABLES
    return config


def _tiny(config: ConfigDict) -> None:
    config.table.batch_size = 8
    config.table.max_tokens = 8 * 128 * 10  # ten batches: the bootstrap wants eight
    config.table.tune_steps = 60
