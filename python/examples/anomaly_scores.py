"""Find impossible readings of a household's electricity meter by their density. Runs in a few seconds.

Each reading that we corrupt has one value taken from another minute. Every value is then ordinary by itself; only the
combination is wrong, which limits per column cannot see and a joint density can.
"""

import numpy as np

import nvpflow
from nvpflow import demo

split = demo.split_data(demo.load_data())
flow = nvpflow.build(input_size=6, num_flows=8, hidden_sizes=(64, 64), standardize=True)
flow.fit(split.train, validation=split.validation, epochs=30, learning_rate=3e-3)

random = np.random.default_rng(0)
normal = split.test
corrupted = normal.copy()
rows, columns = np.arange(len(corrupted)), random.integers(0, 5, len(corrupted))
corrupted[rows, columns] = normal[random.permutation(len(normal)), columns]


def area_under_curve(normal_scores: np.ndarray, anomaly_scores: np.ndarray) -> float:
    """Return the share of (normal, anomaly) pairs in which the anomaly scores higher (ROC AUC)."""
    return float(np.searchsorted(np.sort(normal_scores), anomaly_scores).mean() / len(normal_scores))


flow_scores = [-flow.log_probability(x) for x in (normal, corrupted)]
gaussian_scores = [-demo.gaussian_log_prob(split.train, x) for x in (normal, corrupted)]
print(f"Area under the ROC curve: flow {area_under_curve(*flow_scores):.3f}, ", end="")
print(f"Gaussian {area_under_curve(*gaussian_scores):.3f}")

limit = np.quantile(-flow.log_probability(split.validation), 0.99)
flagged = [np.mean(scores > limit) for scores in flow_scores]
print(f"Alarm at 1 % of normal rows: {flagged[0]:.1%} of normal rows flagged, {flagged[1]:.1%} of corrupted ones")

print("\nMost surprising readings of the test set (score in nats):")
for i in np.argsort(flow_scores[0])[:-4:-1]:
    reading = ", ".join(f"{name} {value:.1f}" for name, value in zip(demo.COLUMNS, normal[i], strict=True))
    print(f"  {flow_scores[0][i]:6.1f}  {reading}")
