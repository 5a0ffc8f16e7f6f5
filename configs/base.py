"""The smallest complete config: every field that there is, with its default.

Other configs start from ``get_config()`` and change what they are about. The fields' meanings, in full, stand in
``moejax/config.py``; a test holds this file to those dataclasses.

    python -m experiments.run --config=configs/base.py --workdir=runs/base --config.train.steps=20
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "base"
    config.scale = "custom"  # tiny | h100 | paper | custom
    config.init_from = ""  # workdir, checkpoint folder or Hugging Face folder whose parameters start the run
    config.model_from = "config"  # config | init_from: whose model it is

    config.model = ConfigDict()
    config.model.vocab_size = 0  # 0: the tokenizer's, rounded up to a multiple of 64
    config.model.num_layers = 2
    config.model.dim = 128
    config.model.ffn_dim = 512  # hidden width of dense FFN layers
    config.model.activation = "swiglu"  # swiglu | geglu | gelu | relu | swiglu_clamped
    config.model.mtp_layers = 0  # modules that predict a token further each
    config.model.wiring = "standard"  # standard | longcat
    config.model.tie_embeddings = True
    config.model.scale_embeddings = True
    config.model.norm_eps = 1e-6
    config.model.norm = "rms"  # rms | layer | layer_bias
    config.model.sandwich_norm = False  # norms after attention and FFN too
    config.model.logit_scale = 1.0
    config.model.logit_bias = False
    config.model.logit_softcap = 0.0
    config.model.init_scale = 1.0
    config.model.compute_dtype = "bfloat16"  # parameters are float32 always
    config.model.layer_loop = "scan"  # unroll: slower to compile, open to a debugger
    config.model.remat = "none"  # none | block | dots

    config.model.attention = ConfigDict()
    config.model.attention.num_heads = 4
    config.model.attention.num_kv_heads = 4
    config.model.attention.head_dim = 32
    config.model.attention.qk_norm = False
    config.model.attention.bias = False
    config.model.attention.rope_theta = 10_000.0
    config.model.attention.kind = "grouped"  # grouped | latent
    config.model.attention.qk_norm_over = "head"  # head | projection
    config.model.attention.output_bias = False
    config.model.attention.sinks = False  # a learned logit for each head in the softmax
    config.model.attention.window = 0  # tokens that a query sees; 0: all
    config.model.attention.window_layers = ()  # layers that have the window; (): all
    config.model.attention.window_kind = "sliding"  # sliding | chunks
    config.model.attention.no_rope_layers = ()  # layers without rotary positions
    config.model.attention.temperature = 0.0  # of their queries, growing with the position; 0: none
    config.model.attention.temperature_length = 8192
    config.model.attention.qk_unit_norm = False  # norm without a scale after rotation
    config.model.attention.clip_qkv = 0.0  # 0: not
    config.model.attention.score_softcap = 0.0  # 0: none
    config.model.attention.softmax_scale = 0.0  # 0: 1 / sqrt(query head's dimensions)
    config.model.attention.query_rank = 0  # latent attention: this and the next four
    config.model.attention.latent_rank = 0
    config.model.attention.rope_head_dim = 0
    config.model.attention.value_head_dim = 0
    config.model.attention.scale_latents = False
    config.model.attention.implementation = "auto"  # auto | xla | cudnn

    config.model.attention.rope = ConfigDict()
    config.model.attention.rope.layout = "halves"  # halves | interleaved
    config.model.attention.rope.fraction = 1.0  # share of the head's dimensions that rotate
    config.model.attention.rope.scaling = "none"  # none | linear | yarn | llama3 | longrope
    config.model.attention.rope.factor = 1.0
    config.model.attention.rope.original_length = 0
    config.model.attention.rope.beta_fast = 32.0
    config.model.attention.rope.beta_slow = 1.0
    config.model.attention.rope.truncate = True
    config.model.attention.rope.mscale = 0.0
    config.model.attention.rope.mscale_all_dim = 0.0
    config.model.attention.rope.attention_factor = 0.0
    config.model.attention.rope.low_freq_factor = 1.0
    config.model.attention.rope.high_freq_factor = 4.0
    config.model.attention.rope.short_factor = ()  # longrope: this and the next three
    config.model.attention.rope.long_factor = ()
    config.model.attention.rope.short_mscale = 1.0
    config.model.attention.rope.long_mscale = 1.0

    config.model.moe = ConfigDict()
    config.model.moe.num_experts = 8
    config.model.moe.expert_dim = 128  # hidden width of one routed expert
    config.model.moe.first_dense = 0  # the first so many layers are dense
    config.model.moe.every = 1  # then the last layer of every so many is MoE
    config.model.moe.shared_experts = 0
    config.model.moe.shared_gate = "none"  # none | sigmoid
    config.model.moe.shared_dim = 0  # width of the shared FFN; 0: shared_experts * expert_dim
    config.model.moe.dense_layers = ()  # further dense layers, by index
    config.model.moe.expert_bias = False
    config.model.moe.weigh = "output"  # output | input: what the gate weight multiplies
    config.model.moe.zero_experts = 0  # experts that return their input, beside num_experts
    config.model.moe.parts = 1  # parts of each expert, stored and dispatched apart (docs/partition.md)
    config.model.moe.part_order = "expert"  # expert | part: which of them stand together, and so on one rank
    config.model.moe.capacity_factor = 0.0  # 0: dropless
    config.model.moe.capacity_order = "score"  # score | order | reverse | random
    config.model.moe.capacity_limits = ()  # any limits instead, ("expanded_drop:factor=1.5",): docs/limits.md
    config.model.moe.dispatcher = "local"  # local | ep | dense
    config.model.moe.ep_exchange = "auto"  # auto | padded | ragged | chunked
    config.model.moe.ep_send = "auto"  # auto | pairs | tokens: what travels
    config.model.moe.ep_buffer_factor = 0.0  # 0: the worst case; rows as a multiple of an even share
    config.model.moe.ep_chunks = 2  # pieces of tokens for "chunked"
    config.model.moe.virtual_ranks = 1  # ranks that limits see on one device
    config.model.moe.implementation = "auto"  # back end of the grouped matmul
    config.model.moe.losses = ConfigDict({"balance": 0.01, "z": 0.001})

    config.model.moe.router = ConfigDict()
    config.model.moe.router.name = "topk_of_softmax"
    config.model.moe.router.k = 2
    config.model.moe.router.renormalise = True
    config.model.moe.router.scale = 1.0
    config.model.moe.router.jitter = 0.0
    config.model.moe.router.bias_update_rate = 0.001
    config.model.moe.router.noncausal = "refuse"  # refuse | allow
    config.model.moe.router.bias = False  # learned, on the logits
    config.model.moe.router.groups = 1  # group-limited top-k: groups of consecutive experts ...
    config.model.moe.router.groups_kept = 1  # ... of which each token takes so many
    config.model.moe.router.group_score = "max"  # max | top2_sum
    config.model.moe.router.copies = 1  # consecutive experts that are parts of one (docs/dualsparse.md)
    config.model.moe.router.mask_margin = 0.01  # sparsemixer: how much worse a rival may be, halved

    config.data = ConfigDict()
    config.data.source = "builtin"  # builtin | files
    config.data.root = ""  # folder that the domains' paths are relative to
    config.data.domains = ConfigDict()  # {name: {train, valid, test, weight}}; builtin reads weights only
    config.data.tokenizer = "byte"  # byte | bpe:FILE | pretrained:FOLDER | bpe-train:SIZE | init_from
    config.data.seq_len = 128
    config.data.document_marker = "<|endoftext|>"
    config.data.text_field = "text"
    config.data.cache_dir = ""
    config.data.seed = 0

    config.train = ConfigDict()
    config.train.steps = 100
    config.train.batch_size = 16  # sequences per optimizer step, over devices and micro-batches
    config.train.accumulate = 1
    config.train.balance_scope = "batch"  # batch | micro
    config.train.learning_rate = 3e-3
    config.train.warmup_steps = 10
    config.train.final_fraction = 0.1
    config.train.weight_decay = 0.1
    config.train.b1 = 0.9
    config.train.b2 = 0.95
    config.train.clip_norm = 1.0
    config.train.mtp_weight = 0.0  # of the loss of model.mtp_layers
    config.train.seed = 0
    config.train.log_every = 10
    config.train.eval_every = 100
    config.train.checkpoint_every = 100
    config.train.keep_checkpoints = 2

    config.eval = ConfigDict()
    config.eval.batch_size = 16
    config.eval.max_tokens = 0  # tokens of each domain that validation reads; 0: all
    config.eval.final_max_tokens = 0
    config.eval.final_split = "test"  # valid | test
    config.eval.tasks = ()
    config.eval.task_limit = 0

    config.watch = ConfigDict()  # when training warns of a collapsing router (docs/healthy.md); 0: never
    config.watch.dead_experts = 1  # experts of a layer without a pair in the window
    config.watch.min_load_entropy = 0.5  # 1 is an even load, 0 is all tokens on the same k experts
    config.watch.max_busiest = 0.75  # of the busiest expert: 0 is an even share of tokens, 1 is all of them
    config.watch.min_router_entropy = 0.02  # of a token's router probabilities, as a share of ln E
    config.watch.min_pairs = 100  # an expert's even share of the window in which it is judged

    config.mesh = ConfigDict()
    config.mesh.data = -1  # -1: all devices that the other axes leave
    config.mesh.expert = 1
    config.mesh.model = 1

    config.table = ConfigDict()
    config.table.name = ""  # module under experiments/papers
    config.table.seeds = ()
    config.table.tables = ("1",)  # of the module's tables those that are made
    config.table.arms = ()
    config.table.factors = ()
    config.table.layer_factors = ()  # one for each MoE layer, of a row of its own
    config.table.margin = 0.005
    config.table.tune_steps = 0  # of each model that the table fine-tunes
    config.table.max_tokens = 0
    config.table.batch_size = 16
    return config


def with_files(config: ConfigDict, root: str, tokenizer: str, weights: dict[str, float]) -> ConfigDict:
    """Points ``config`` at ``root/{train,valid,test}/<domain>.txt.xz`` with one weight for each domain."""
    config.data.source = "files"
    config.data.root = root
    config.data.tokenizer = tokenizer
    for name, weight in weights.items():
        paths = {split: f"{split}/{name}.txt.xz" for split in ("train", "valid", "test")}
        config.data.domains[name] = ConfigDict({**paths, "weight": weight})
    return config
