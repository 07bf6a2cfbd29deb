"""Images in, verdicts out: evaluators, cross-fitting, the hard band, the auditor, the kept anomaly set."""
