"""Who answers: fit, route, hand-off. No Ray."""
