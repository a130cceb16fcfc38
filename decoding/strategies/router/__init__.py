"""Whether a question wants an outline at all: a list of points suits "How can I sleep better?", not "What is 7 × 8?".

Ning et al. 2024 (SoT-R) ask the model itself, or a trained classifier; both are here. What routing cost is in the
answer's part "router".
"""

from decoding.strategies.router.base import EXAMPLE, ROUTERS, Always, FunctionRouter, Route, Router, as_router
from decoding.strategies.router.classifier import Classifier
from decoding.strategies.router.prompted import Prompted

__all__ = ["EXAMPLE", "ROUTERS", "Always", "Classifier", "FunctionRouter", "Prompted", "Route", "Router", "as_router"]
