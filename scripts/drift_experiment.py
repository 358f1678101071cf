"""How draft heads follow a policy that GRPO moves: frozen, refreshed, with twice the budget, and the ceiling.

python scripts/drift_experiment.py --policy policies/small --out drift
"""

import sys

from spec_rollout.experiments.drift import main

if __name__ == "__main__":
    sys.exit(main())
