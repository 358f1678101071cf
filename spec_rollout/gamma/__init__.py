"""γ, the number of guessed tokens per step: chosen by measured costs and acceptance.

Plain Python and NumPy, no torch.
"""

from spec_rollout.gamma.acceptance import AcceptanceModel
from spec_rollout.gamma.controller import FixedGamma, GammaController
from spec_rollout.gamma.cost_model import CostModel, Measurement

__all__ = ["AcceptanceModel", "CostModel", "FixedGamma", "GammaController", "Measurement"]
