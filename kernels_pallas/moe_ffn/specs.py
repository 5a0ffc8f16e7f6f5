"""Shapes of whole MoE layers for the benchmark; names of models give the sizes of one of their layers."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """T tokens, D x F experts of which each token takes k of E.

    `sonicmoe` is what SonicMoE (arXiv 2512.14080, figure 14, read from its bars, within 5) reports for it on an H100:
    TFLOP/s forward and backward, None where it has no bar.
    """

    name: str
    tokens: int
    d_model: int
    d_expert: int
    experts: int
    top_k: int
    kind: str = "gpu"
    sonicmoe: tuple[int | None, int | None] | None = None

    @property
    def rows(self) -> int:
        """P: pairs of a token and an expert."""
        return self.tokens * self.top_k


def _sonic(tokens: int, d: int, f: int, e: int, k: int, forward: int, backward: int | None) -> LayerShape:
    return LayerShape(f"sonic_d{d}_f{f}_e{e}", tokens, d, f, e, k, "sonic", (forward, backward))


SHAPES = {
    shape.name: shape
    for shape in (
        LayerShape("tiny", 96, 24, 16, 4, 2, "test"),
        LayerShape("cpu", 1024, 256, 128, 64, 8, "cpu"),
        LayerShape("qwen3_30b", 32768, 2048, 768, 128, 8),
        LayerShape("olmoe", 16384, 2048, 1024, 64, 8),
        LayerShape("mixtral", 8192, 4096, 14336, 8, 2),
        _sonic(40960, 768, 256, 128, 8, 337, 365),
        _sonic(40960, 768, 1024, 32, 2, 403, 433),
        _sonic(24576, 1536, 256, 128, 8, 363, 403),
        _sonic(24576, 1536, 512, 64, 4, 433, 438),
        _sonic(24576, 1536, 1024, 32, 2, 466, 466),
        _sonic(32768, 4096, 256, 256, 16, 427, 459),
        _sonic(32768, 4096, 512, 128, 8, 502, 511),
        _sonic(32768, 4096, 1024, 64, 4, 552, 554),
        _sonic(32768, 4096, 512, 256, 16, 517, None),
        _sonic(32768, 4096, 1024, 128, 8, 558, 567),
        _sonic(32768, 4096, 2048, 64, 4, 594, 586),
    )
}
# What a run times unless told otherwise: models, and the two of SonicMoE's shapes that torch was timed on too.
DEFAULT = ("qwen3_30b", "olmoe", "mixtral", "sonic_d4096_f512_e128", "sonic_d1536_f256_e128")
