"""Many sites on one machine: phantoms, splits, engines, baselines and the report."""
