"""Every way to turn a request into an answer."""

from decoding.strategies.autoregressive import Autoregressive
from decoding.strategies.base import REGISTRY, Strategy, TokenStrategy, parse
from decoding.strategies.block_diffusion import BlockDiffusion
from decoding.strategies.jacobi import Jacobi
from decoding.strategies.lookahead import Lookahead
from decoding.strategies.mask_predict import MaskPredict
from decoding.strategies.skeleton import SkeletonOfThought
from decoding.strategies.speculative import Speculative

__all__ = [
    "REGISTRY",
    "Autoregressive",
    "BlockDiffusion",
    "Jacobi",
    "Lookahead",
    "MaskPredict",
    "SkeletonOfThought",
    "Speculative",
    "Strategy",
    "TokenStrategy",
    "parse",
]
