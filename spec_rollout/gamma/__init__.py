"""γ, the number of guessed tokens per step: measured costs, measured acceptance, chosen by goodput. No torch."""

from spec_rollout.gamma.acceptance import AcceptanceModel
from spec_rollout.gamma.controller import FixedGamma, GammaController
from spec_rollout.gamma.cost_model import CostModel, Measurement

__all__ = ["AcceptanceModel", "CostModel", "FixedGamma", "GammaController", "Measurement"]
