"""Find the least likely of 10,000 ordinary rows of eight separate clusters, with one option changed at a time.

    python tests/bench/lowest_rows.py                                 # five minutes of one core
    python tests/bench/lowest_rows.py --contenders 'default;student_t' --seeds 10

Each flow is `FlowDensity(epochs=40)` but for that option, trained on 5,000 rows.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import numpy as np
import nvpflow
from defaults import clusters, clusters_log_prob
from nvpflow.sklearn import FlowDensity

CONTENDERS: dict[str, dict[str, Any]] = {
    "default": {},
    "scale_bound": {"scale_bound": 0.5},
    "weight_decay": {"weight_decay": 0.2},
    "averaging": {"averaging": 0.95},
    "covariance": {"standardize": "covariance"},
    "tanh": {"activation": "tanh"},
    "layer_norm": {"layer_norm": True},
    "mixture": {"base": "mixture"},
    "student_t": {"base": "student_t"},
    "splines": {"coupling": "spline", "num_flows": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", default=";".join(CONTENDERS), metavar="NAME;...", help="%(default)s")
    parser.add_argument("--seeds", type=int, default=6, metavar="N")
    parser.add_argument("--epochs", type=int, default=40, metavar="N")
    options = parser.parse_args()
    warnings.simplefilter("ignore", nvpflow.DataWarning)
    tests = [clusters(10_000, seed + 1000).astype(np.float32) for seed in range(options.seeds)]
    print(f"the true lowest log p is {min(clusters_log_prob(test).min() for test in tests):.1f}\n")
    print("| contender | lowest log p | mean log p |\n| --- | --- | ---: |")
    for name in options.contenders.split(";"):
        found = []
        for seed, test in enumerate(tests):
            flow = FlowDensity(**CONTENDERS[name], epochs=options.epochs, random_state=seed)
            found.append(flow.fit(clusters(5000, seed).astype(np.float32)).score_samples(test))
        lowest = ", ".join(f"{log_p.min():.0f}" for log_p in found)
        print(f"| {name} | {lowest} | {np.mean(found):.3f} |", flush=True)


if __name__ == "__main__":
    main()
