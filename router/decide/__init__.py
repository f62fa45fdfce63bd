"""Who should answer: fit, posterior, thresholds, the rule that decides. numpy; no torch to decide, no HTTP."""
